"""ODE pairs that training would read without an error, and that do not fit or are damaged."""

import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from tiny_model import write_config

import train
from scripts import encode_clips, encode_prompts, generate_ode_pairs
from trainer.datasets.ode_pairs import PairFolder, pair_file, write_ode_pair, write_sigmas
from utils.errors import UserError
from utils.locks import lock_folder

LEVELS = [1.0, 0.9375, 0.8333, 0.625, 0.0]
SIZES = {  # (frames, channels, height, width) of the pairs -> fragment
    "frames": ((9, 16, 4, 4), "have 9 latent frames of 4x4, but the configuration has 6 of 4x4"),
    "fewer frames": ((3, 16, 4, 4), "have 3 latent frames of 4x4"),
    "height": ((6, 16, 8, 4), "have 6 latent frames of 8x4"),
    "width": ((6, 16, 4, 2), "have 6 latent frames of 4x2"),
    "both exchanged": ((6, 16, 2, 8), "have 6 latent frames of 2x8"),
    "channels": ((6, 8, 4, 4), "have 8 channels, but the network has 16"),
}


def write_pairs(folder: Path, shape: tuple[int, ...]) -> Path:
    folder.mkdir()
    for index in range(2):
        write_ode_pair(pair_file(folder, index), f"prompt {index}", torch.randn(5, *shape))
    write_sigmas(folder, LEVELS)
    return folder


@pytest.mark.parametrize("objective", ["ode_regression", "score_distillation"])
@pytest.mark.parametrize("case", SIZES)
def test_pairs_of_another_size_than_the_configuration_are_refused(world, refuse, tmp_path, objective, case):
    shape, fragment = SIZES[case]
    config = write_config(
        tmp_path / "x.yaml",
        world.model,
        train={"objective": objective, "init": str(world.model / "transformer"), "batch_size": 1},
        distill={"max_rollout_frames": 6},
        data={"path": str(write_pairs(tmp_path / "pairs", shape)), "num_frames": 6},
    )
    refuse(train.main, ("--config_path", config, "--logdir", tmp_path / "log"), fragment)


def test_a_pair_with_flipped_bytes_is_refused(tmp_path):
    pairs = PairFolder(write_pairs(tmp_path / "pairs", (2, 4, 4, 4)))
    content = bytearray(pairs.files[1].read_bytes())
    with zipfile.ZipFile(pairs.files[1]) as archive:
        [info] = [info for info in archive.infolist() if "/data/" in info.filename]
    content[content.index(info.filename.encode()) + len(info.filename) + 400] ^= 1
    pairs.files[1].write_bytes(content)
    pairs.read(0)
    with pytest.raises(UserError, match=r"00001\.pt is damaged: .* does not match its checksum"):
        pairs.read(1)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_a_trajectory_with_nan_is_not_written(tmp_path, value):
    points = torch.zeros(2, 1, 4, 2, 2)
    points[1, 0, 0, 1, 1] = value
    with pytest.raises(UserError, match="the trajectory of 'a prompt' holds NaN or infinity in"):
        write_ode_pair(pair_file(tmp_path, 0), "a prompt", points.half())
    assert list(tmp_path.iterdir()) == []


INDICES = ["0", "-1", "0 0", "2 0", "-1 0", "0 3 3", "3 -1", "0 2 1 3", "0 0 1 2 3", "-1 -2", "3 0 1 2"]


@pytest.mark.parametrize("indices", INDICES)
def test_saved_points_that_no_reader_accepts_are_refused_before_the_teacher_runs(world, refuse, tmp_path, indices):
    words = ("--config_path", world.config, "--caption_path", world.prompts, "--num_inference_steps", 3)
    more = ("--output_folder", tmp_path / "pairs", "teacher.path=nowhere.pt", "--save_indices", *indices.split())
    refuse(generate_ode_pairs.main, (*words, *more), "fit no training: name at least two points in rising order")


def test_a_second_run_in_an_output_folder_stops_and_names_the_first(world, refuse, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    pairs = ("--config_path", world.config, "--caption_path", world.prompts, "--output_folder", out)
    prompts = ("--config_path", world.config, "--data_path", world.prompts, f"model.text_cache={out}")
    clips = ("--base", world.model, "--output", out, "--num_clips", 1, "--num_frames", 1)
    commands = {
        "generating ODE pairs in": (generate_ode_pairs.main, pairs),
        "encoding prompts in": (encode_prompts.main, prompts),
        "encoding clips in": (encode_clips.main, clips),
    }
    with lock_folder(out, "working in", keep=False):
        for activity, (main, words) in commands.items():
            line = refuse(main, words, f"another process is {activity} {out} (process ")
            assert " since 20" in line
    assert list(out.iterdir()) == []
    shutil.rmtree(out)
