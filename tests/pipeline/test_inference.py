"""inference.py: equal videos on every path, files that are complete or absent, and one line per mistake.

Most tests call it in this process. Killed runs and ranks are forks of this process, so all have one thread.
"""

import errno
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_model import ROOT, write_config
from tqdm import tqdm

import inference
from model.vae import WanVAE
from model.weight_files import read_checkpoint
from model.weight_names import export_state
from model.weights import ModelDirectory
from pipeline import generate, output
from pipeline.text_to_video import TextToVideo
from utils.clips import read_video, resize_and_crop
from utils.config_loading import load_config
from utils.prompts import Prompt
from utils.video import VideoWriter


def latents(folder: Path) -> dict[str, torch.Tensor]:
    """The saved latents of all videos in a folder, by name."""
    return {file.stem: load_file(file)["latents"] for file in sorted(folder.glob("*.safetensors"))}


def assert_same(folder: Path, reference: Path, stems: Sequence[str] | None = None) -> None:
    """Check that a folder holds the videos of `reference` (or only `stems`), bit for bit, and no other files."""
    ours, theirs = latents(folder), latents(reference)
    stems = list(theirs) if stems is None else stems
    assert list(ours) == sorted(stems)
    assert names(folder) == [name for name in names(reference) if Path(name).stem in stems]
    for stem in stems:
        assert torch.equal(ours[stem], theirs[stem])
        assert (folder / f"{stem}.mp4").read_bytes() == (reference / f"{stem}.mp4").read_bytes()


CIRCLE = "a red circle-0"
ONE = ("--prompt", "a red circle")


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def videos(folder: Path) -> list[str]:
    return sorted(file.stem for file in folder.glob("[!.]*.mp4"))


def count_videos(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that receives the stem of every video that is made."""
    made: list[str] = []
    make_videos = generate.make_videos

    def counting(pipeline, batch, *rest):
        made.extend(job.files.stem for job in batch)
        return make_videos(pipeline, batch, *rest)

    monkeypatch.setattr(generate, "make_videos", counting)
    return made


# ---- Files ----


def test_each_video_has_its_files_and_nothing_else_is_left(reference):
    stems = videos(reference)
    assert [stem.split("-")[0] for stem in stems] == ["a red circle", "blue square 🎈 up_down_left", "green triangle"]
    suffixes = (".json", ".mp4", ".png", ".safetensors")
    assert names(reference) == sorted(stem + suffix for stem in stems for suffix in suffixes)
    for stem in stems:
        saved = load_file(reference / f"{stem}.safetensors")
        assert list(saved) == ["latents"] and saved["latents"].dtype == torch.float32
        assert saved["latents"].shape == (9, 16, 4, 4) and saved["latents"].isfinite().all()
        frames, fps = read_video(reference / f"{stem}.mp4")
        assert frames.shape == (4 * (9 - 1) + 1, 32, 32, 3) and fps == 16
        Image.open(reference / f"{stem}.png").verify()
        record = json.loads((reference / f"{stem}.json").read_text())
        assert record["sample"] == 0 and record["latent_frames"] == 9 and record["pixel_frames"] == 33
    different = latents(reference)
    assert not torch.equal(different[stems[0]], different[stems[2]])  # prompts matter


def test_index_names_sizes_rates_and_extended_prompts(tmp_path, world, infer, reference):
    longer = tmp_path / "longer.txt"
    longer.write_text("one, at length\n\ntwo, at length\n\na triangle\n")
    words = ("--extended_prompt_path", longer, "--save_with_index", "--num_output_frames", 3)
    infer(tmp_path / "out", *words, "--height", 16, "--width", 48, "--fps", 8, "--seed", 1)
    assert videos(tmp_path / "out") == ["0-0", "1-0", "2-0"]
    frames, fps = read_video(tmp_path / "out/1-0.mp4")
    assert frames.shape == (9, 16, 48, 3) and fps == 8
    record = json.loads((tmp_path / "out/1-0.json").read_text())
    assert record["prompt"] == "two, at length" and record["name"].startswith("blue square 🎈")
    assert not torch.equal(latents(tmp_path / "out")["2-0"][:, :, :2, :4], latents(reference)["green triangle-0"][:3])


# ---- Equal videos ----


def test_diagonal_order_gives_the_same_bits(tmp_path, infer, reference):
    infer(tmp_path, *ONE, "--order", "diagonal")
    assert_same(tmp_path, reference, [CIRCLE])


@pytest.mark.parametrize(
    "words",
    [
        ("--inference_method", "frame_first"),
        ("--inference_method", "hybrid_block0"),
        ("--window", "6", "--sink", "1"),
        ("rollout.context=input",),
        ("rollout.use_ode_trajectory=true", "rollout.leading_steps=2"),
    ],
    ids=" ".join,
)
def test_every_method_makes_another_video_and_the_same_one_in_both_orders(tmp_path, infer, reference, words):
    for order in ("step_major", "diagonal"):
        infer(tmp_path / order, *ONE, "--order", order, *words)
    assert_same(tmp_path / "step_major", tmp_path / "diagonal")
    assert not torch.equal(latents(tmp_path / "diagonal")[CIRCLE], latents(reference)[CIRCLE])


def fork(words: Sequence[object], setup: Callable[[], object]) -> multiprocessing.context.ForkProcess:
    """Start inference.py with these words in a fork of this process. `setup` runs there first."""

    def run() -> None:
        sys.argv = ["inference.py", *map(str, words)]
        setup()
        inference.main()

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def test_two_ranks_share_the_videos_and_make_the_same(tmp_path, world, reference):
    """Two processes run at the same time, with the environment variables of torchrun."""
    words = ["--config_path", world.config, "--data_path", world.prompts, "--output_folder", tmp_path / "out"]

    def become_rank(rank: int) -> None:
        os.environ.update(RANK=str(rank), WORLD_SIZE="2")
        sys.stdout = (tmp_path / f"rank{rank}.log").open("w", buffering=1)

    ranks = [fork([*words, "--save_latents"], partial(become_rank, rank)) for rank in range(2)]
    for process in ranks:
        process.join(100)
        assert process.exitcode == 0
    assert_same(tmp_path / "out", reference)
    text = "".join((tmp_path / f"rank{rank}.log").read_text() for rank in range(2))
    assert "rank 0 wrote 2 videos to" in text and "rank 1 wrote 1 video to" in text


def test_more_samples_do_not_change_the_first(tmp_path, infer, reference):
    infer(tmp_path, *ONE, "--num_samples", 3)
    samples = list(latents(tmp_path).values())
    assert len(samples) == 3 and torch.equal(samples[0], latents(reference)[CIRCLE])
    assert not any(torch.equal(samples[0], other) for other in samples[1:])


def test_videos_made_together_equal_those_made_one_by_one(tmp_path, infer, reference):
    infer(tmp_path, "--batch_size", 2)  # the last batch is not full
    together = latents(tmp_path)
    assert names(tmp_path) == names(reference) and len(together) == 3
    for stem, expected in latents(reference).items():
        torch.testing.assert_close(together[stem], expected, atol=1e-4, rtol=0)


def test_videos_made_together_may_continue_an_image(tmp_path, infer):
    words = (*ONE, "--num_samples", 2, "--image", write_image(tmp_path / "start.png"), "--num_output_frames", 4)
    infer(tmp_path / "one", *words)
    infer(tmp_path / "two", *words, "--batch_size", 2)
    together = latents(tmp_path / "two")
    assert len(together) == 2
    for stem, expected in latents(tmp_path / "one").items():
        torch.testing.assert_close(together[stem], expected, atol=1e-4, rtol=0)


def test_unfused_context_writes_make_the_same_video(tmp_path, infer, reference):
    infer(tmp_path, *ONE, "rollout.fuse_context=false")
    torch.testing.assert_close(latents(tmp_path)[CIRCLE], latents(reference)[CIRCLE], atol=2e-4, rtol=0)


def test_the_sink_and_the_window_change_the_video_where_they_end_its_context(tmp_path, infer, reference):
    """The window holds the third block and one other: the first one with a sink of three frames, else the second."""
    whole = latents(reference)[CIRCLE]
    for sink in (0, 3):
        infer(tmp_path / str(sink), *ONE, "--window", 6, "--sink", sink)
    short, with_sink = (latents(tmp_path / str(sink))[CIRCLE] for sink in (0, 3))
    for other in (short, with_sink):
        torch.testing.assert_close(other[:6], whole[:6], atol=2e-4, rtol=0)
    for one, other in ((short, whole), (with_sink, whole), (short, with_sink)):
        assert (one[6:] - other[6:]).abs().max() > 1e-3


def test_the_metadata_reproduces_the_video(tmp_path, infer, command, reference):
    words = ("--prompt", "blue square 🎈 up/down\\left", "--num_samples", 2, "--window", 6, "--sink", 2, "--seed", 3)
    infer(tmp_path / "first", *words, "--image", write_image(tmp_path / "start.png"), "--num_output_frames", 7)
    [metadata] = (tmp_path / "first").glob("blue square*-1.json")
    stem = metadata.stem
    result = command("--config_path", metadata, "--output_folder", tmp_path / "again", "--save_latents")
    assert result.code == 0, result.err
    assert videos(tmp_path / "again") == [stem]
    for suffix in (".mp4", ".safetensors"):
        assert (tmp_path / "again" / (stem + suffix)).read_bytes() == metadata.with_suffix(suffix).read_bytes()
    assert not torch.equal(latents(tmp_path / "again")[stem][:3], latents(reference)[f"{stem[:-1]}0"][:3])


# ---- Reruns and interruptions ----


def test_a_rerun_keeps_existing_videos_and_overwrite_replaces_them(tmp_path, infer, reference, monkeypatch):
    shutil.copytree(reference, tmp_path, dirs_exist_ok=True)
    before = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    made = count_videos(monkeypatch)
    result = infer(tmp_path)
    assert made == [] and "3 of 3 videos exist already and are kept" in result.out
    assert result.out.splitlines()[-1] == f"wrote 0 videos (3 existed) to {tmp_path}"
    assert {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()} == before

    result = infer(tmp_path, "--seed", "8")
    assert made == [] and result.out.count("made with other settings (runtime.seed)") == 3

    (tmp_path / "a red circle-0.mp4").unlink()
    (tmp_path / "green triangle-0.safetensors").unlink()  # requested, so the video is incomplete
    result = infer(tmp_path)
    assert made == ["a red circle-0", "green triangle-0"]
    last = result.out.splitlines()[-1]
    assert re.fullmatch(rf"wrote 2 videos \(1 existed\) to {tmp_path} in [\d.]+ s: [\d.]+ pixel frames/s", last)
    assert_same(tmp_path, reference)

    made.clear()
    infer(tmp_path, *ONE, "--overwrite")
    assert made == [CIRCLE]
    assert_same(tmp_path, reference)


def after_op(monkeypatch: pytest.MonkeyPatch, number: int, act) -> None:
    """Call `act(op)` after every op from number `number` of this process on."""
    original, seen = TextToVideo.generate_blocks, [0]

    def wrapped(self, prompt, samples, prefix=None, on_op=None, decoder=None, track=()):
        def observing(op):
            if on_op is not None:
                on_op(op)
            seen[0] += 1
            if seen[0] >= number:
                act(op)

        return original(self, prompt, samples, prefix, observing, decoder, track)

    monkeypatch.setattr(TextToVideo, "generate_blocks", wrapped)


OPS = 3 * 4  # of a video of 3 blocks and 4 steps: contexts are written by the passes that denoise the next block


def test_ctrl_c_keeps_finished_videos_and_no_other_file(tmp_path, world, command, infer, reference, monkeypatch):
    seen: list[list[str]] = []

    def interrupt(op) -> None:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob(".*.mp4")) and time.monotonic() < deadline:
            time.sleep(0.01)  # the video encoder is a separate process and creates its file later
        seen.append(names(tmp_path))
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        # In diagonal order the last op but one: two blocks of the second video are written.
        after_op(patch, 2 * OPS - 1, interrupt)
        always = ("--config_path", world.config, "--data_path", world.prompts, "--output_folder", tmp_path)
        result = command(*always, "--save_latents", "--order", "diagonal")
    assert result.code == 130
    assert result.err.splitlines()[-1].startswith("error: interrupted") and "Traceback" not in result.err
    [during] = seen
    hidden = [name for name in during if name.startswith(".")]
    assert sorted(Path(name).suffix for name in hidden) == [".lock", ".mp4", ".safetensors"]
    assert sum(".partial" in name for name in hidden) == 2
    assert videos(tmp_path) == ["a red circle-0"] and len(names(tmp_path)) == 4  # mp4, json, png, safetensors
    infer(tmp_path)
    assert_same(tmp_path, reference)


def test_a_rerun_after_a_kill_makes_the_same_bits_and_removes_partial_files(tmp_path, world, infer, reference):
    words = ["--config_path", world.config, "--data_path", world.prompts, "--output_folder", tmp_path]

    def kill(op: object) -> None:
        while not list(tmp_path.glob(".*.partial.mp4")):  # the first block is decoded in another thread
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)

    def kill_in_the_second_video() -> None:
        after_op(pytest.MonkeyPatch(), 2 * OPS - 1, kill)

    process = fork([*words, "--save_latents", "--order", "diagonal"], kill_in_the_second_video)
    process.join(100)
    assert process.exitcode == -signal.SIGKILL
    left = names(tmp_path)
    assert sum(".partial" in name for name in left) == 2 and videos(tmp_path) == [CIRCLE]
    # VideoWriter uses this name while it rewrites a file.
    [growing] = [name for name in left if name.endswith(".partial.mp4")]
    (tmp_path / f".{growing.removesuffix('.mp4')}.1.partial.mp4").write_bytes(b"half")
    infer(tmp_path)
    assert_same(tmp_path, reference)


def test_partial_files_of_other_videos_are_kept(tmp_path):
    """Another rank may be writing these files."""
    mine = ".a-0.1.partial.mp4", "..a-0.1.partial.1.partial.mp4", ".a-0.1.partial.safetensors", ".a-0.1.partial.json"
    others = ".a-0.5 b-0.1.partial.mp4", ".a-01.1.partial.mp4", "a-0.mp4", ".ba-0.1.partial.mp4", "..a-1.1.partial.mp4"
    for name in (*mine, *others):
        (tmp_path / name).touch()
    output.VideoFiles(tmp_path, "a-0").remove_leftovers()
    assert names(tmp_path) == sorted(others)


def test_a_full_disk_is_one_line_and_keeps_the_finished_video(tmp_path, world, command, monkeypatch):
    write = output.LatentsWriter.write

    def full(self, block):
        if self.path.stem.startswith("blue"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, block)

    monkeypatch.setattr(output.LatentsWriter, "write", full)
    words = ("--config_path", world.config, "--data_path", world.prompts, "--output_folder", tmp_path)
    result = command(*words, "--save_latents")
    assert result.code == 1 and "Traceback" not in result.err
    last = result.err.splitlines()[-1]
    assert last.startswith(f"error: cannot write {tmp_path}/blue square") and last.endswith(": No space left on device")
    assert videos(tmp_path) == [CIRCLE] and len(names(tmp_path)) == 4


# ---- Prefixes ----


def write_image(file: Path) -> Path:
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(file)
    return file


@pytest.fixture(scope="module")
def encode(world):
    """encode(frames [T, H, W, 3]): the latents of a prefix."""
    vae = WanVAE(ModelDirectory.open(world.model).load_vae(torch.float32))

    def run(frames: np.ndarray) -> torch.Tensor:
        pixels = torch.from_numpy(resize_and_crop(frames, 32, 32).copy()).permute(0, 3, 1, 2)[None]
        return vae.encode(pixels / 127.5 - 1)[0]

    return run


def test_an_image_is_the_first_frame(tmp_path, infer, encode, reference):
    image = write_image(tmp_path / "start.PNG")
    for order in ("step_major", "diagonal"):
        infer(tmp_path / order, *ONE, "--image", image, "--num_output_frames", 10, "--order", order)
    assert_same(tmp_path / "diagonal", tmp_path / "step_major")
    result = latents(tmp_path / "diagonal")["a red circle-0"]
    assert len(result) == 10 and torch.equal(result[:1], encode(np.array(Image.open(image))[None]))
    assert len(read_video(tmp_path / "diagonal/a red circle-0.mp4")[0]) == 37
    assert not torch.equal(result[1:4], latents(reference)["a red circle-0"][:3])


def test_a_clip_is_continued(tmp_path, infer, encode):
    """The VAE encodes the last 13 of 15 frames (stride 4): 4 latent frames, a short block of one and a whole block."""
    clip = np.random.default_rng(0).integers(0, 255, (15, 32, 32, 3), dtype=np.uint8)
    with VideoWriter(tmp_path / "clip.mp4") as video:
        video.write(clip)
    infer(tmp_path / "out", *ONE, "--video", tmp_path / "clip.mp4", "--num_output_frames", 10)
    result = latents(tmp_path / "out")[CIRCLE]
    assert len(result) == 10 and torch.equal(result[:4], encode(read_video(tmp_path / "clip.mp4")[0][-13:]))
    assert len(read_video(tmp_path / f"out/{CIRCLE}.mp4")[0]) == 37


def test_saved_latents_are_continued(tmp_path, infer, reference):
    start = reference / "green triangle-0.safetensors"
    infer(tmp_path, *ONE, "--video", start, "--num_output_frames", 12)
    result = latents(tmp_path)[CIRCLE]
    assert len(result) == 12 and torch.equal(result[:9], load_file(start)["latents"])
    assert len(read_video(tmp_path / f"{CIRCLE}.mp4")[0]) == 45


# ---- Flags and configuration ----


def dry_run(command, config: object, *words: object) -> dict:
    result = command("--config_path", config, "--dry-run", *words)
    assert result.code == 0 and result.err == ""
    return yaml.safe_load(result.out)


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        (["--checkpoint_path", 'a b/it\'s "1" #: {é}.pt'], "model.generator", 'a b/it\'s "1" #: {é}.pt'),
        (["--num_output_frames", "81"], "video.num_output_frames", 81),
        (["--height", "720"], "video.height", 720),
        (["--width", "1280"], "video.width", 1280),
        (["--fps", "24"], "video.fps", 24),
        (["--seed", "42"], "runtime.seed", 42),
        (["--device", "cuda:1"], "runtime.device", "cuda:1"),
        (["--order", "diagonal"], "rollout.order", "diagonal"),
        (["--window", "12"], "rollout.window", 12),
        (["--sink", "3"], "rollout.sink", 3),
        (["--use_ema"], "model.use_ema", True),
        (["--num_frame_first_blocks", "2"], "rollout.leading_blocks", 2),
        (["--inference_method", "timestep_first"], "rollout", ("timestep_first", 0)),
        (["--inference_method", "frame_first"], "rollout", ("block_first", 0)),
        (["--inference_method", "hybrid_block0"], "rollout", ("timestep_first", 1)),
        (["--inference_method", "hybrid_block0", "--num_frame_first_blocks", "3"], "rollout", ("timestep_first", 3)),
        (["--window", "12", "rollout.window=15"], "rollout.window", 15),  # overrides win
        (["rollout.denoising_step_list=[1000,500]"], "rollout.denoising_step_list", [1000.0, 500.0]),
    ],
    ids=str,
)
def test_flags_set_the_configuration(command, words, key, value):
    config = dry_run(command, ROOT / "configs/hiar.yaml", *words)
    section, _, name = key.partition(".")
    rollout = config["rollout"]
    found = config[section][name] if name else (rollout["schedule"], rollout["leading_blocks"])
    assert found == value


def test_inference_of_hiar_and_self_forcing_differs_in_the_schedule_only(command):
    hiar, self_forcing = (dry_run(command, ROOT / f"configs/{name}.yaml") for name in ("hiar", "self_forcing"))
    schedules = hiar["rollout"].pop("schedule"), self_forcing["rollout"].pop("schedule")
    assert schedules == ("timestep_first", "block_first")
    for section in ("model", "rollout", "video", "runtime"):
        assert hiar[section] == self_forcing[section]


def test_the_readme_command_of_hiar_resolves(command):
    words = (
        "--checkpoint_path ckpts/hiar.pt --data_path data/prompts.txt --output_folder outputs/ --num_output_frames 81"
    )
    words += " --use_ema --inference_method timestep_first"
    config = dry_run(command, ROOT / "configs/hiar.yaml", *words.split())
    assert config["model"]["generator"] == "ckpts/hiar.pt" and config["video"]["num_output_frames"] == 81


def test_a_generator_checkpoint_and_its_ema(tmp_path, world, command, reference):
    """A checkpoint in HiAR's layout gives the same video as the folder with its weights."""
    ema = export_state(read_checkpoint(world.model / "generator"), "generator")["generator"]
    other = {name: torch.zeros_like(weight) for name, weight in ema.items()}
    torch.save({"generator": other, "generator_ema": ema}, tmp_path / "hiar.pt")
    (tmp_path / "one.txt").write_text("a red circle")
    words = ("--config_path", world.config, "--data_path", tmp_path / "one.txt", "--save_latents")
    result = command(
        *words, "--checkpoint_path", tmp_path / "hiar.pt", "--use_ema", "--output_folder", tmp_path / "out"
    )
    assert result.code == 0, result.err
    assert torch.equal(latents(tmp_path / "out")["a red circle-0"], latents(reference)["a red circle-0"])


# ---- Bad input ----


def bad(name: str, *words: object, message: str, prepare=None, late: bool = False):
    """Return a test case: arguments that spoil a valid command line, and part of the error line.

    Args:
        prepare: called first, with the test's folder and the `world`.
        late: the error appears while weights load, so other lines may come before it.
    """
    return pytest.param(words, message, prepare, late, id=name)


def damage(weights: str):
    def prepare(folder: Path, world) -> None:
        content = (world.model / "generator" / "diffusion_pytorch_model.safetensors").read_bytes()
        (folder / weights).write_bytes(content[: len(content) // 2])

    return prepare


def truncated_torch(folder: Path, world) -> None:
    torch.save({"generator": read_checkpoint(world.model / "generator")}, folder / "whole.pt")
    content = (folder / "whole.pt").read_bytes()
    (folder / "cut.pt").write_bytes(content[: len(content) // 2])


def other_architecture(folder: Path, world) -> None:
    state = read_checkpoint(world.model / "generator")
    torch.save({"generator": {n: w for n, w in state.items() if "blocks.1." not in n}}, folder / "other.pt")


def without_ema(folder: Path, world) -> None:
    torch.save({"generator": read_checkpoint(world.model / "generator")}, folder / "plain.pt")


def text(name: str, content: str | bytes):
    def prepare(folder: Path, world) -> None:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return prepare


def wrong_latents(folder: Path, world) -> None:
    save_file({"latents": torch.zeros(1, 16, 8, 8)}, folder / "large.safetensors")


BAD = [
    bad("no checkpoint", "--checkpoint_path", "{}/none.pt", message="none.pt do not exist", late=True),
    bad("cut", "--checkpoint_path", "{}/cut.pt", message="is cut off", prepare=truncated_torch, late=True),
    bad(
        "cut safetensors",
        *("--checkpoint_path", "{}/cut.safetensors"),
        message="is cut off",
        prepare=damage("cut.safetensors"),
        late=True,
    ),
    bad(
        "another network",
        *("--checkpoint_path", "{}/other.pt"),
        message="it has 1 layers of width 32, the network 2 layers of width 32",
        prepare=other_architecture,
        late=True,
    ),
    bad(
        "no ema",
        *("--checkpoint_path", "{}/plain.pt", "--use_ema"),
        message="has no generator_ema",
        prepare=without_ema,
        late=True,
    ),
    bad("no model", "model.base={}/none", message="none does not exist"),
    bad("frames", "--num_output_frames", "10", message="the nearest valid --num_output_frames: 9 or 12"),
    bad("few frames", "--num_output_frames", "1", message="the nearest valid --num_output_frames: 3 or 6"),
    bad("no frames", "--num_output_frames", "0", message="must be positive"),
    bad("words for frames", "--num_output_frames", "many", message="must be a whole number, not 'many'"),
    bad(
        "height",
        "--height",
        "40",
        message="--height 40 is not a multiple of 16 (VAE and patches); the nearest: 32 or 48",
    ),
    bad("width", "--width", "8", message="--width 8 is not a multiple of 16 (VAE and patches); the nearest: 16"),
    bad("no prompts", "--data_path", "{}/empty.txt", message="holds no prompts", prepare=text("empty.txt", "")),
    bad(
        "blank prompts",
        "--data_path",
        "{}/blank.txt",
        message="holds no prompts",
        prepare=text("blank.txt", " \n\t\n\n"),
    ),
    bad("no prompt file", "--data_path", "{}/none.txt", message="No such file"),
    bad("binary prompts", "--data_path", "{}/b.txt", message="is not UTF-8", prepare=text("b.txt", b"\xff\xfe\x80")),
    bad("unequal prompts", "--extended_prompt_path", "{}/l.txt", message="5 lines", prepare=text("l.txt", "one\n")),
    bad("unknown key", "video.heigth=64", message="heigth"),
    bad("unknown section", "vidoe.height=64", message="vidoe"),
    bad("wrong type", "video.height=tall", message="video.height"),
    bad("bad choice", "rollout.schedule=random", message="rollout.schedule"),
    bad("section for a key", "rollout=5", message="RolloutConfig"),
    bad("broken override", "rollout.denoising_step_list=[1000", message="rollout.denoising_step_list"),
    bad("no override", "timestep_first", message="overrides are section.key=value"),
    bad("small window", "--window", "2", message="rollout.window must be at least a block"),
    bad("no config", "--config_path", "{}/none.yaml", message="no config file"),
    bad("broken config", "--config_path", "{}/b.yaml", message="not valid YAML", prepare=text("b.yaml", "model: [")),
    bad(
        "broken record",
        "--config_path",
        "{}/b.json",
        message="not a valid metadata file",
        prepare=text("b.json", '{"config": '),
    ),
    bad(
        "other json", "--config_path", "{}/b.json", message="not the metadata of a video", prepare=text("b.json", "[1]")
    ),
    bad("file for a folder", "--output_folder", "{}/f", message="cannot write to folder", prepare=text("f", "")),
    bad("file above folder", "--output_folder", "{}/f/out", message="cannot write to folder", prepare=text("f", "")),
    bad("no samples", "--num_samples", "0", message="--num_samples must be at least 1, not 0"),
    bad("no batch", "--batch_size", "0", message="--batch_size must be at least 1, not 0"),
    bad("image and video", "--image", "a.png", "--video", "b.mp4", message="--image or --video, not both"),
    bad("no image", "--image", "{}/none.png", message="none.png: there is no such file"),
    bad("no video", "--video", "{}/none.mp4", message="none.mp4: there is no such file"),
    bad("no latents", "--video", "{}/none.safetensors", message="there is no such file"),
    bad(
        "no video inside", "--video", "{}/b.mp4", message="cannot read video", prepare=text("b.mp4", "text"), late=True
    ),
    bad(
        "no latents inside",
        *("--video", "{}/b.safetensors"),
        message="cannot read latents from",
        prepare=text("b.safetensors", "text"),
        late=True,
    ),
    bad(
        "no image inside",
        *("--image", "{}/b.png", "--num_output_frames", 10),
        message="cannot read image",
        prepare=text("b.png", "text"),
        late=True,
    ),
    bad(
        "latents of another size",
        *("--video", "{}/large.safetensors"),
        message="[16, 8, 8], the video's are [16, 4, 4]",
        prepare=wrong_latents,
        late=True,
    ),
    bad("no such device", "--device", "cuda:7", message="no device 'cuda:7' here"),
    bad("no device name", "--device", "toaster", message="no device 'toaster' here"),
    bad("no attention backend", "model.attention_backend=telepathy", message="telepathy", late=True),
]


@pytest.mark.parametrize(("words", "message", "prepare", "late"), BAD)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, world, command, monkeypatch, words, message, prepare, late):
    if prepare is not None:
        prepare(tmp_path, world)
    if not late:
        monkeypatch.setattr(TextToVideo, "load", None)
    words = [str(word).format(tmp_path) if "{}" in str(word) else str(word) for word in words]
    out = tmp_path / "out"
    result = command("--config_path", world.config, "--data_path", world.prompts, "--output_folder", out, *words)
    assert result.code == 2
    assert message in result.err and "Traceback" not in result.err
    lines = result.err.splitlines()
    assert [line for line in lines if line.startswith("error:")] == [lines[-1]]
    assert late or len(lines) == 1, result.err
    assert not out.exists() or names(out) == []


def test_bad_input_ends_the_process_before_torch_is_loaded(world):
    words = ["--config_path", str(world.config), "video.heigth=64", "--output_folder", "x"]
    code = "import atexit, sys, inference; atexit.register(lambda: print('torch' in sys.modules)); inference.main()"
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert done.stdout == "False\n"


def test_missing_flags_are_named(world, command):
    assert "--output_folder" in command("--config_path", world.config, "--data_path", world.prompts).err
    assert "--data_path" in command("--config_path", world.config, "--output_folder", "x").err


def test_awkward_prompts_become_safe_distinct_files(tmp_path, world, command):
    prompts = ["word " * 2000, "../../etc/passwd", "🎈" * 300, "-rf *", 'a:b|c?"<>', "Same", "same", ".", "a\tb\x07c"]
    (tmp_path / "prompts.txt").write_text("\n\n".join(prompts), encoding="utf-8")
    words = ("--config_path", world.config, "--data_path", tmp_path / "prompts.txt", "--num_output_frames", 3)
    out = tmp_path / "deep/er/out"
    assert command(*words, "--output_folder", out, "rollout.denoising_step_list=[1000]").code == 0
    assert len(videos(out)) == len(prompts) and len(names(out)) == 3 * len(prompts)
    assert names(tmp_path) == ["deep", "prompts.txt"]
    texts = sorted(json.loads(file.read_text())["name"] for file in out.glob("*.json"))
    assert texts == sorted(prompt.strip() for prompt in prompts)


# ---- Long videos ----


def test_the_diagonal_order_streams_frames_before_the_last_block_starts(tmp_path, world, command, monkeypatch):
    num_frames, readable = 30, []

    def look(op) -> None:
        if op.block == num_frames // 3 - 1 and op.cache == 0:
            [growing] = tmp_path.glob(".*.partial.mp4")
            end = time.monotonic() + 30  # the video encoder is a separate process, which writes later
            while not readable and time.monotonic() < end:
                try:
                    readable.append(len(read_video(growing)[0]))
                except ValueError:
                    time.sleep(0.1)

    after_op(monkeypatch, 0, look)
    (tmp_path / "one.txt").write_text("a red circle")
    words = ("--config_path", world.config, "--data_path", tmp_path / "one.txt", "--output_folder", tmp_path)
    result = command(*words, "--order", "diagonal", "--num_output_frames", num_frames, "--fps", 8)
    assert result.code == 0, result.err
    assert readable and readable[0] >= 8
    assert len(read_video(tmp_path / "a red circle-0.mp4")[0]) == 4 * (num_frames - 1) + 1


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_the_diagonal_order_runs_in_constant_memory(tmp_path, world):
    """A video of five times the length needs no more memory; its pixels alone would be 6 MB as floats."""
    config = write_config(tmp_path / "c.yaml", world.model, rollout={"denoising_step_list": [1000, 500], "window": 9})
    pipeline = TextToVideo.load(str(config), device="cpu")

    def peak(num_frames: int) -> int:
        """Return the peak memory of the process in MB while it makes a video."""
        pipeline.config = load_config(str(config), [f"video.num_output_frames={num_frames}", "rollout.order=diagonal"])
        job = output.VideoJob(Prompt(0, "a", "a"), 0, output.VideoFiles(tmp_path, f"{num_frames}-0"))
        Path("/proc/self/clear_refs").write_text("5")
        generate.make_videos(pipeline, [job], None, "", True, tqdm(disable=True)).wait()
        status = Path("/proc/self/status").read_text()
        return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) // 1024

    peak(12)
    short, long = peak(24), peak(120)
    assert long - short <= 3, (short, long)


def test_the_contact_sheet_has_evenly_spaced_frames_of_a_known_length(tmp_path, infer, monkeypatch):
    lengths, sampler = [], output.ContactSheetSampler

    def spy(length: int | None, **options: object) -> object:
        lengths.append(length)
        return sampler(length, **options)

    monkeypatch.setattr(output, "ContactSheetSampler", spy)
    infer(tmp_path, "--prompt", "a red circle", "--num_output_frames", 3)
    assert lengths == [9]
