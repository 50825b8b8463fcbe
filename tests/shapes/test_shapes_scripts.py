"""Scripts of the miniature, on a tiny random model: clips, ODE pairs, contact sheets, training, VAE evaluation."""

import importlib
import json
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_model import ROOT, TEXT_ENCODER, TINY_DECODER, TRANSFORMER, VAE, all_clips, write_config, write_model

from model import presets
from model.causal_wan import CausalWanModel
from model.flow import solver_sigmas
from model.tiny_decoder import TinyNetwork
from model.vae import WanVAE
from model.weights import ModelDirectory
from scripts import contact_sheet, encode_clips, evaluate_vae, generate_ode_pairs, write_shapes_clips
from shapes import world
from shapes.objectives import VAEReconstruction
from trainer.datasets.generate_pairs import loss_sigmas, nearest_indices
from utils.clips import read_video
from utils.config_loading import load_config
from utils.contact_sheet import read_strip, save_contact_sheet
from utils.rng import keyed_noise
from utils.video import VideoWriter


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "model")


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


# ---- write_shapes_clips ----


def test_written_clips_and_captions_match_the_world(tmp_path, call):
    assert call(write_shapes_clips, "--output", tmp_path, "--num_clips", 2, "--num_frames", 5, "--seed", 4)[0] == 0
    assert names(tmp_path) == ["00000.mp4", "00001.mp4", "captions.json", "captions.txt"]
    clips = [world.sample_clip(4, index) for index in range(2)]
    by_name = json.loads((tmp_path / "captions.json").read_text())
    assert by_name == {f"0000{index}.mp4": clip.scene.caption for index, clip in enumerate(clips)}
    assert (tmp_path / "captions.txt").read_text().splitlines() == [clip.scene.caption for clip in clips]
    frames, fps = read_video(tmp_path / "00001.mp4")
    assert fps == world.FPS and frames.shape == (5, 64, 64, 3)
    assert abs(frames.astype(int) - world.render(clips[1], 5)).mean() < 8


def test_captions_only_and_held_out(tmp_path, call):
    assert call(write_shapes_clips, "--output", tmp_path, "--num_clips", 30, "--captions_only", "--held_out")[0] == 0
    assert names(tmp_path) == ["captions.txt"]
    captions = (tmp_path / "captions.txt").read_text().splitlines()
    assert len(captions) == 30 and all(world.parse_caption(caption).held_out for caption in captions)


# ---- encode_clips ----


def test_encoded_clips_are_the_vaes_latents(tmp_path, call, model, monkeypatch):
    monkeypatch.setattr("trainer.datasets.encode.CLIPS_PER_SHARD", 2)
    words = ("--base", model, "--output", tmp_path, "--num_clips", 3, "--num_frames", 2, "--device", "cpu")
    assert call(encode_clips, *words)[0] == 0
    assert names(tmp_path) == ["000000.safetensors", "000002.safetensors"]
    latents, captions = all_clips(str(tmp_path))
    assert latents.shape == (3, 2, 16, 8, 8)
    assert captions == [world.sample_clip(0, index).scene.caption for index in range(3)]
    pixels = world.to_pixels(world.render(world.sample_clip(0, 2), 5)).transpose(0, 1)[None]
    expected = WanVAE(ModelDirectory.open(model).load_vae(torch.float32)).encode(pixels)[0]
    torch.testing.assert_close(latents[2].float(), expected, atol=2e-3, rtol=2e-3)

    before = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in tmp_path.iterdir()}
    (tmp_path / "000002.safetensors").unlink()
    assert call(encode_clips, *words)[0] == 0
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == {file: old[1] for file, old in before.items()}
    first = tmp_path / "000000.safetensors"
    assert first.stat().st_mtime_ns == before[first][0]


def test_clips_of_another_vae_are_encoded_again(tmp_path, call, model):
    other, clips = tmp_path / "model", tmp_path / "clips"
    shutil.copytree(model, other)
    words = ("--base", other, "--output", clips, "--num_clips", 1, "--num_frames", 2, "--device", "cpu")
    assert call(encode_clips, *words)[0] == 0
    before, _ = all_clips(str(clips))
    [weights] = (other / "vae").glob("*.safetensors")
    save_file({name: 1.1 * tensor for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    assert call(encode_clips, *words)[0] == 0
    after, _ = all_clips(str(clips))
    assert (after != before).any()


def test_shards_beyond_the_requested_clips_are_an_error(tmp_path, call, model, monkeypatch):
    monkeypatch.setattr("trainer.datasets.encode.CLIPS_PER_SHARD", 1)
    words = ("--base", model, "--output", tmp_path, "--num_frames", 2, "--device", "cpu")
    assert call(encode_clips, *words, "--num_clips", 2)[0] == 0
    code, _, err = call(encode_clips, *words, "--num_clips", 1)
    assert code == 2 and "delete 000001.safetensors" in err
    assert names(tmp_path) == ["000000.safetensors", "000001.safetensors"]


# ---- generate_ode_pairs ----


@pytest.fixture
def pairs(tmp_path, call, model):
    """pairs(name, word, ..., refused=False): generate pairs of three captions in `name`; returns (folder, output)."""
    config = write_config(tmp_path / "c.yaml", model, rollout={"denoising_step_list": [1000, 500]})
    (tmp_path / "captions.txt").write_text("a red circle\na blue square\na green triangle\n")
    words = ("--config_path", config, "--caption_path", tmp_path / "captions.txt")

    def run(name: str, *more: object, refused: bool = False) -> tuple[Path, str]:
        small = ("--num_inference_steps", 3, "--num_frames", 2)
        code, out, err = call(generate_ode_pairs, *words, "--output_folder", tmp_path / name, *small, *more)
        assert code == (2 if refused else 0), err
        return tmp_path / name, err if refused else out

    return run


def read_pair(file: Path) -> tuple[str, torch.Tensor]:
    [(prompt, points)] = torch.load(file, weights_only=True).items()
    return prompt, points


def test_a_pair_stores_the_teachers_trajectory(pairs):
    folder, _ = pairs("out")
    assert names(folder) == ["00000.pt", "00001.pt", "00002.pt", "pairs.json", "sigmas.json"]
    prompt, points = read_pair(folder / "00001.pt")
    assert prompt == "a blue square"
    assert points.shape == (1, 3, 2, 16, 4, 4) and points.isfinite().all()  # a point per step and the end
    assert torch.equal(points[0, 0], keyed_noise(7, 1, 0, 0, (2, 16, 4, 4)))  # the configuration's seed
    torch.save({prompt: points}, folder / "copy.pt")
    assert (folder / "copy.pt").stat().st_size < 2 * points.nbytes  # a view would store the whole batch


def test_save_indices_select_points_of_the_same_trajectory(pairs):
    everything, _ = pairs("all", "--save_indices", 0, 1, 2, 3)
    some, _ = pairs("some", "--save_indices", 0, 2, -1)
    for number in range(3):
        assert torch.equal(
            read_pair(some / f"0000{number}.pt")[1], read_pair(everything / f"0000{number}.pt")[1][:, [0, 2, 3]]
        )


@pytest.mark.parametrize(
    ("words", "points"),
    [
        ([], [0, 12]),  # the forward KL's one step, as published: sigma 1 and .96
        (["train.objective=ode_regression"], [0, 12, 24, 36, 48]),
        (["distill.forward_kl_steps=2", "teacher.num_inference_steps=16"], [0, 4, 8]),
        (["rollout.warp_denoising_step=false", "rollout.denoising_step_list=[1000,960,728]"], [0, 12]),
    ],
)
def test_default_points_are_those_the_loss_reads(words, points):
    config = load_config(str(ROOT / "configs/hiar.yaml"), words)
    sigmas = solver_sigmas(config.teacher.num_inference_steps, config.teacher.timestep_shift)
    assert nearest_indices(sigmas, loss_sigmas(config)) == points


def test_pairs_depend_only_on_seed_and_index(pairs, monkeypatch):
    one, _ = pairs("one")
    two, _ = pairs("two", "--batch_size", 2)
    other, _ = pairs("other", "--seed", 1)
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        ranks, _ = pairs("ranks")
    assert names(ranks) == names(one)
    for name in (name for name in names(one) if name.endswith(".pt")):
        points = read_pair(one / name)[1]
        torch.testing.assert_close(read_pair(two / name)[1], points, atol=1e-5, rtol=1e-5)
        assert torch.equal(read_pair(ranks / name)[1], points)
        assert not torch.equal(read_pair(other / name)[1], points)


def test_existing_pairs_are_kept(pairs):
    folder, _ = pairs("out")
    before = {file.name: (file.stat().st_mtime_ns, read_pair(file)[1]) for file in folder.glob("*.pt")}
    (folder / "00001.pt").unlink()
    _, out = pairs("out")
    assert "2 pairs exist already and are kept" in out
    for name, (time, points) in before.items():
        assert (folder / name).stat().st_mtime_ns == time or name == "00001.pt"
        assert torch.equal(read_pair(folder / name)[1], points)
    assert names(pairs("few", "--num_prompts", 2)[0]) == [*("00000.pt", "00001.pt", "pairs.json", "sigmas.json")]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--seed 1", "runtime.seed 7, not 1"),
        ("runtime.seed=2", "runtime.seed 7, not 2"),
        ("--guidance_scale 2", "teacher.guidance_scale 3.0, not 2.0"),
        ("--num_inference_steps 4", "teacher.num_inference_steps 3, not 4"),
        ("--timestep_shift 5", "teacher.timestep_shift 8.0, not 5.0"),
        ("--save_indices 0 -1", "sigmas [1.0, "),
        ("--model_name {model}/", "nothing"),
        ("--model_name {model}/other", "model.base {model}, not {model}/other"),
        ("teacher.path={model}/generator", "teacher.path , not {model}/generator"),
        ("teacher.negative_prompt=ugly", "teacher.negative_prompt , not ugly"),
        ("--num_frames 1", "data.num_frames 2, not 1"),
        ("--latent_shape 16 4 8", "video.width 32, not 64"),
        ("--dtype float16", "dtype float32, not float16"),
    ],
)
def test_pairs_of_other_settings_are_refused(pairs, model, monkeypatch, words, message):
    """Both with and without missing pairs, and before the teacher is loaded."""
    folder, _ = pairs("out", "--num_prompts", 1)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    if message == "nothing":
        pairs("out", *words.format(model=model).split(), "--num_prompts", 1)
        return
    monkeypatch.setattr("pipeline.teacher.Teacher.load", lambda *_: pytest.fail("the teacher was loaded"))
    for count in (1, 3):
        _, err = pairs("out", *words.format(model=model).split(), "--num_prompts", count, refused=True)
        assert f"{folder} holds pairs of {message.format(model=model)}" in err and err.count("\n") == 1
        assert "choose another --output_folder, or delete this one" in err
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


@pytest.mark.parametrize("changed", ["transformer", "text_encoder"])
def test_pairs_of_changed_weights_are_refused(pairs, model, tmp_path, changed):
    """For example after the teacher was trained again."""
    copy = tmp_path / "model"
    shutil.copytree(model, copy)
    pairs("out", f"model.base={copy}")
    [file] = (copy / changed).glob("*.safetensors")
    save_file({name: 1.5 * tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    _, err = pairs("out", f"model.base={copy}", refused=True)
    assert "holds pairs of weights " in err and err.count("\n") == 1


def test_pairs_of_other_captions_are_refused(pairs, tmp_path, monkeypatch):
    pairs("out", "--num_prompts", 2)
    monkeypatch.setattr("pipeline.teacher.Teacher.load", lambda *_: pytest.fail("the teacher was loaded"))
    for text, name, new in [
        ("a blue square\na blue square\na green triangle\n", "00000.pt", "a blue square"),
        ("a red circle\na green triangle\n", "00001.pt", "a green triangle"),  # a line was removed
    ]:
        (tmp_path / "captions.txt").write_text(text)
        _, err = pairs("out", refused=True)
        assert f"{name} is a pair of 'a " in err and f", not '{new}': choose another" in err
        assert err.count("\n") == 1
    monkeypatch.undo()
    (tmp_path / "captions.txt").write_text("a red circle\na blue square\na green triangle\na red square\n")
    assert len(list(pairs("out")[0].glob("*.pt"))) == 4  # lines appended to the file give new pairs


def test_missing_settings_files_are_restored(pairs):
    folder, _ = pairs("out")
    settings = (folder / "pairs.json").read_bytes()
    for missing in (["pairs.json"], ["pairs.json", "sigmas.json"], ["pairs.json", "00002.pt"]):
        for name in missing:
            (folder / name).unlink()
        pairs("out")
        assert (folder / "pairs.json").read_bytes() == settings
        assert names(folder) == ["00000.pt", "00001.pt", "00002.pt", "pairs.json", "sigmas.json"]


def test_pairs_without_settings_must_have_the_same_size_and_type(pairs):
    """Folders from elsewhere have no settings files. None is written beside pairs that it would not describe."""
    folder, _ = pairs("out")
    for name in ("pairs.json", "sigmas.json"):
        (folder / name).unlink()
    for words, message in [
        (("--save_indices", 0, -1), "[3, 2, 4, 4] in float32, not [2, 2, 4, 4] in float32"),
        (("--num_frames", 1), "not [3, 1, 4, 4] in float32"),
        (("--dtype", "float16"), "not [3, 2, 4, 4] in float16"),
    ]:
        _, err = pairs("out", *words, refused=True)
        assert "00000.pt is a pair of" in err and message in err and err.count("\n") == 1
    assert names(folder) == ["00000.pt", "00001.pt", "00002.pt"]


def test_guidance_changes_the_pairs_and_one_disables_it(pairs):
    guided, _ = pairs("guided")
    plain, _ = pairs("plain", "--guidance_scale", 1)
    assert not torch.equal(read_pair(guided / "00000.pt")[1], read_pair(plain / "00000.pt")[1])


# ---- contact_sheet ----


def test_a_contact_sheet_shows_a_folder(tmp_path, call):
    for number in range(3):
        with VideoWriter(tmp_path / f"{number}.mp4") as video:
            video.write(world.render(world.sample_clip(0, number), 9))
    (tmp_path / "0.json").write_text(json.dumps({"name": "the prompt"}))
    (tmp_path / ".3.1.partial.mp4").write_bytes(b"half")
    code, out, _ = call(contact_sheet, tmp_path, "--columns", 4)
    assert code == 0 and "3 videos" in out
    small = Image.open(tmp_path / "contact_sheet.png").size
    assert call(contact_sheet, tmp_path, "--output", tmp_path / "wide.png")[0] == 0
    wide = Image.open(tmp_path / "wide.png").size
    code, out, _ = call(contact_sheet, tmp_path, "--columns", 4, "--videos", 1, "--output", tmp_path / "one.png")
    one = np.asarray(Image.open(tmp_path / "one.png"))
    assert code == 0 and "1 videos" in out and one.shape[0] < small[1] / 2
    strips = [read_strip(tmp_path / f"{number}.mp4", 4) for number in range(3)]
    save_contact_sheet(tmp_path / "middle.png", [strips[1]], columns=4)
    assert np.array_equal(one, np.asarray(Image.open(tmp_path / "middle.png")))
    assert wide[0] > 1.5 * small[0] and small[0] >= 4 * 128 and small[1] >= 3 * 128


# ---- Bad arguments ----


@pytest.mark.parametrize(
    ("module", "words", "message"),
    [
        (write_shapes_clips, "--output {0} --num_clips 0", "--num_clips must be 1 to 1,000,000, not 0"),
        (write_shapes_clips, "--output {0}/file", "cannot write to folder"),
        (encode_clips, "--base {0}/none --output {0}/out --device cpu", "does not exist"),
        (encode_clips, "--output {0}/out --seed -1", "--seed must be at least 0"),
        (encode_clips, "--base {1} --output {0}/file --device cpu", "cannot write to folder"),
        (encode_clips, "--base {1} --output {0}/out --num_frames 0", "--num_frames must be 1 to 25,000, not 0"),
        (encode_clips, "--base {1} --output {0}/out --device toaster", "no device 'toaster' here"),
        (generate_ode_pairs, "--num_inference_steps 0", "--num_inference_steps must be at least 1, not 0"),
        (generate_ode_pairs, "--num_inference_steps 3 --save_indices 0 4", "must be among the 4 points 0..3"),
        (generate_ode_pairs, "--caption_path {0}/none.txt", "No such file"),
        (generate_ode_pairs, "--output_folder {0}/file", "cannot write to folder"),
        (generate_ode_pairs, "teacher.magic=1", "magic"),
        (generate_ode_pairs, "video.height=40", "not a multiple of 16"),
        (generate_ode_pairs, "teacher.path={0}/none.pt", "do not exist"),
        (contact_sheet, "{0}", "no mp4 files"),
        (contact_sheet, "{0}/none", "no mp4 files"),
        (contact_sheet, "{0} --columns 0", "no mp4 files"),
        (contact_sheet, "{0}/videos --columns 1", "--columns must be 2 to 100, not 1"),
        (contact_sheet, "{0}/videos --videos 0", "--videos must be at least 1"),
        (contact_sheet, "{0}/videos", "cannot read video"),
    ],
)
def test_invalid_arguments_are_reported_in_one_line(tmp_path, call, model, module, words, message):
    (tmp_path / "file").touch()
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos/broken.mp4").write_bytes(b"broken")
    (tmp_path / "captions.txt").write_text("a red circle\n")
    config = write_config(tmp_path / "c.yaml", model)
    always = ("--config_path", config, "--caption_path", tmp_path / "captions.txt", "--output_folder", tmp_path / "out")
    code, _, err = call(
        module, *(always if module is generate_ode_pairs else ()), *words.format(tmp_path, model).split()
    )
    assert code == 2 and message in err
    assert err.startswith("error:") and err.count("\n") == 1
    assert not (tmp_path / "out").exists() or names(tmp_path / "out") == []


# ---- train_shapes.sh ----

SCRIPT = ROOT / "scripts/train_shapes.sh"


def test_the_training_script_is_valid_bash():
    assert subprocess.run(["bash", "-n", SCRIPT], capture_output=True).returncode == 0


@pytest.fixture
def stages(tmp_path):
    """stages(word, ...): run the script with a Python stub that prints its arguments; (exit code, argument lists)."""

    def run(*words: str, fail: str = "nothing", **more: str) -> tuple[int, list[list[str]]]:
        fake = tmp_path / "python"
        fake.write_text(f'#!/usr/bin/env bash\nprintf "%q " "$@"\necho\n[[ "$*" != *{fail}* ]]\n')
        fake.chmod(0o755)
        places = {"PYTHON": str(fake), "RUNS": str(tmp_path / "runs"), "MODEL": str(tmp_path / "model")}
        environment = os.environ | places | {"CLIPS": "3", "PAIRS": "2", "PROCESSES": "1"} | more
        done = subprocess.run(["bash", SCRIPT, *words], env=environment, capture_output=True, text=True)
        return done.returncode, [shlex.split(line) for line in done.stdout.splitlines() if not line.startswith("==")]

    return run


def test_the_training_script_stops_at_a_failed_stage(stages):
    code, calls = stages("train.max_iterations=3", fail="vae_long")
    assert code != 0 and len(calls) == 3
    assert all("train.max_iterations=3" in words for words in calls)


def test_the_training_script_runs_on_several_processes(stages):
    code, calls = stages(PROCESSES="3")
    assert code == 0
    launched = [words for words in calls if words[:2] == ["-m", "torch.distributed.run"]]
    assert len(launched) == len(calls) - 1  # captions are written once
    assert all("--nproc_per_node=3" in words for words in launched)


def test_the_training_script_trains_a_model_and_resumes(tmp_path, stages, call, monkeypatch):
    """Run its stages in this process on tiny networks; a second run keeps results and replaces missing ones."""
    overrides = [
        "train.network=tiny",
        "train.max_iterations=1",
        "train.batch_size=1",
        "train.clip_frames=[5]",
        "train.total_batch_size=0",
    ]
    code, calls = stages(*overrides, "train.compile=false")
    assert code == 0
    tables = dict(TRANSFORMERS=TRANSFORMER, VAES=VAE, TEXT_ENCODERS=TEXT_ENCODER, TINY_DECODERS=TINY_DECODER)
    for table, sizes in tables.items():
        monkeypatch.setitem(getattr(presets, table), "tiny", sizes)

    def small_clip(self, index, num_frames):  # exporting the VAE measures 64 clips
        return 2 * torch.rand(3, 5, 16, 16, generator=torch.Generator().manual_seed(index)) - 1

    monkeypatch.setattr(VAEReconstruction, "clip", small_clip)
    monkeypatch.chdir(ROOT)

    def run_stages(calls: list[list[str]]) -> None:
        for script, *words in calls:
            module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
            code, _, err = call(module, *words)
            assert code == 0, (script, words, err)

    def data() -> dict[Path, bytes]:
        files = (file for suffix in ("safetensors", "pt") for file in tmp_path.rglob(f"*.{suffix}"))
        return {file: file.read_bytes() for file in files}

    run_stages(calls)
    made = data()
    for lost in ("runs/ode_pairs/00001.pt", "runs/clips/000000.safetensors", "model/hiar/config.json"):
        (tmp_path / lost).unlink()
    # All training stages resume alike; the two stages of the VAE write to different folders.
    again = ("vae.yaml", "vae_long.yaml", "encode_clips", "write_shapes_clips", "generate_ode_pairs", "model/hiar ")
    run_stages([words for words in calls if any(word in " ".join(words) + " " for word in again)])
    assert data() == made and (tmp_path / "model/hiar/config.json").exists()
    assert names(tmp_path / "runs") == [
        *("captions.txt", "clips", "hiar", "hiar_without_forward_kl", "ode_init", "ode_pairs", "self_forcing"),
        *("teacher", "text_encoder", "tiny_decoder", "vae", "vae_long", "vae_short"),
    ]
    directory = ModelDirectory.open(tmp_path / "model")
    for name in ("model/ode_init", "model/hiar", "model/self_forcing", "runs/hiar_without_forward_kl/weights"):
        net = directory.load_transformer(CausalWanModel, torch.float32, weights=tmp_path / name)
        assert all(weight.isfinite().all() for weight in net.state_dict().values())
    directory.load_vae()
    directory.load_text_encoder()


def test_the_vae_evaluation_prints_all_quarters(call, model):
    code, out, _ = call(evaluate_vae, "--base", str(model), "--num_clips", "1", "--num_frames", "9")
    lines = out.splitlines()
    assert code == 0 and lines[0].startswith("1 held-out clips of 9 frames: ") and len(lines) == 5
    code, out, _ = call(evaluate_vae, "--base", str(model), "--num_clips", "1", "--num_frames", "9", "--size", "96")
    assert code == 0 and "pebble_position_error by quarter: " in out and "absent by quarter: 1.00" in out
    tiny = model.parent / "tiny.safetensors"
    save_file(TinyNetwork(16, **TINY_DECODER).state_dict(), tiny)
    words = ("--num_clips", "1", "--num_frames", "9", "--tiny_decoder", str(tiny))
    other = call(evaluate_vae, "--base", str(model), *words)[1]
    assert other.splitlines()[0].startswith("1 held-out clips of 9 frames: ") and other.splitlines()[0] != lines[0]
    code, _, err = call(evaluate_vae, "--base", str(model), "--num_frames", "10")
    assert code == 2 and "4n+1" in err
