"""inference.py from outside: the same video whatever the way to it, files whole or absent, and one line per mistake.

Everything but what needs a process of its own runs in this one, with one thread, as do the processes.
"""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_model import ROOT, write_config
from tqdm import tqdm

from model.vae import WanVAE
from model.weight_files import read_checkpoint
from model.weight_names import export_state
from model.weights import ModelDirectory
from pipeline import generate, output
from pipeline.text_to_video import TextToVideo
from utils.config import load_config
from utils.prompts import Prompt
from utils.video import VideoWriter, fit, read_video


def latents(folder: Path) -> dict[str, torch.Tensor]:
    """The saved latents of all videos in a folder, by name."""
    return {file.stem: load_file(file)["latents"] for file in sorted(folder.glob("*.safetensors"))}


def assert_same(folder: Path, reference: Path) -> None:
    """Both folders hold the same videos, bit for bit, and nothing half done."""
    ours, theirs = latents(folder), latents(reference)
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[stem], theirs[stem]) for stem in ours)
    assert {file.name for file in folder.iterdir()} == {file.name for file in reference.iterdir()}
    for stem in ours:
        assert (folder / f"{stem}.mp4").read_bytes() == (reference / f"{stem}.mp4").read_bytes()


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def videos(folder: Path) -> list[str]:
    return sorted(file.stem for file in folder.glob("[!.]*.mp4"))


def count_videos(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The stems of the videos that are made from now on."""
    made: list[str] = []
    make_videos = generate.make_videos

    def counting(pipeline, batch, *rest):
        made.extend(job.files.stem for job in batch)
        make_videos(pipeline, batch, *rest)

    monkeypatch.setattr(generate, "make_videos", counting)
    return made


# ---- What is written ----


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
    longer.write_text("one, at length\ntwo, at length\na triangle\n")
    words = ("--extended_prompt_path", longer, "--save_with_index", "--num_output_frames", 3)
    infer(tmp_path / "out", *words, "--height", 16, "--width", 48, "--fps", 8, "--seed", 1)
    assert videos(tmp_path / "out") == ["0-0", "1-0", "2-0"]
    frames, fps = read_video(tmp_path / "out/1-0.mp4")
    assert frames.shape == (9, 16, 48, 3) and fps == 8
    record = json.loads((tmp_path / "out/1-0.json").read_text())
    assert record["prompt"] == "two, at length" and record["name"].startswith("blue square 🎈")
    assert not torch.equal(latents(tmp_path / "out")["2-0"][:, :, :2, :4], latents(reference)["green triangle-0"][:3])


# ---- The same video, whatever the way ----


def test_diagonal_order_gives_the_same_bits(tmp_path, infer, reference):
    infer(tmp_path, "--order", "diagonal")
    assert_same(tmp_path, reference)


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
def test_every_method_is_the_same_in_both_orders_and_another_video(tmp_path, world, command, reference, words):
    (tmp_path / "one.txt").write_text("a red circle\n")
    always = ("--config_path", world.config, "--data_path", tmp_path / "one.txt", "--save_latents", *words)
    for order in ("step_major", "diagonal"):
        result = command(*always, "--order", order, "--output_folder", tmp_path / order)
        assert result.code == 0, result.err
    assert_same(tmp_path / "step_major", tmp_path / "diagonal")
    assert not torch.equal(latents(tmp_path / "diagonal")["a red circle-0"], latents(reference)["a red circle-0"])


def test_two_ranks_share_the_videos_and_make_the_same(tmp_path, infer, reference, monkeypatch):
    made = count_videos(monkeypatch)
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        infer(tmp_path)
    assert_same(tmp_path, reference)
    assert sorted(made) == videos(tmp_path)  # every one once


@pytest.mark.slow
def test_torchrun_with_two_ranks_makes_the_same(tmp_path, world, reference):
    words = ["--config_path", world.config, "--data_path", world.prompts, "--output_folder", tmp_path / "out"]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "inference.py"]
    done = subprocess.run(
        [sys.executable, *launch, *map(str, words), "--save_latents"], cwd=ROOT, capture_output=True, timeout=300
    )
    assert done.returncode == 0, done.stderr.decode()
    assert_same(tmp_path / "out", reference)


def test_more_samples_do_not_change_the_first(tmp_path, world, command, reference):
    (tmp_path / "one.txt").write_text("a red circle\n")
    words = ("--config_path", world.config, "--data_path", tmp_path / "one.txt", "--output_folder", tmp_path / "out")
    assert command(*words, "--save_latents", "--num_samples", 4).code == 0
    samples = list(latents(tmp_path / "out").values())
    assert len(samples) == 4 and torch.equal(samples[0], latents(reference)["a red circle-0"])
    assert not any(torch.equal(samples[0], other) for other in samples[1:])


@pytest.mark.parametrize("conditioned", [False, True])
def test_videos_made_together_are_those_made_one_by_one(tmp_path, infer, conditioned):
    words = ["--num_samples", 2, "--seed", 3]
    if conditioned:
        words += ["--image", write_image(tmp_path / "start.png"), "--num_output_frames", 7]
    infer(tmp_path / "one", *words)
    infer(tmp_path / "three", *words, "--batch_size", 3)  # the last batch is not full
    one, three = latents(tmp_path / "one"), latents(tmp_path / "three")
    assert one.keys() == three.keys() and len(one) >= 4
    for stem, expected in one.items():
        torch.testing.assert_close(three[stem], expected, atol=1e-4, rtol=0)
    assert videos(tmp_path / "one") == videos(tmp_path / "three")


def test_contexts_written_by_passes_of_their_own_make_the_same_videos(tmp_path, infer, reference):
    infer(tmp_path, "rollout.fuse_context=false")
    for stem, expected in latents(reference).items():
        torch.testing.assert_close(latents(tmp_path)[stem], expected, atol=2e-4, rtol=0)


def test_the_record_makes_the_video_again(tmp_path, infer, command, reference):
    words = ("--num_samples", 2, "--window", 6, "--sink", 2, "--seed", 3)
    infer(tmp_path / "first", *words, "--image", write_image(tmp_path / "start.png"), "--num_output_frames", 7)
    [record] = (tmp_path / "first").glob("blue square*-1.json")
    result = command("--config_path", record, "--output_folder", tmp_path / "again", "--save_latents")
    assert result.code == 0, result.err
    assert videos(tmp_path / "again") == [record.stem]
    for suffix in (".mp4", ".safetensors"):
        assert (tmp_path / "again" / (record.stem + suffix)).read_bytes() == record.with_suffix(suffix).read_bytes()
    assert not torch.equal(latents(tmp_path / "again")[record.stem][:3], latents(reference)[record.stem[:-1] + "0"][:3])


# ---- Reruns and interruptions ----


def test_a_rerun_keeps_what_exists_and_overwrite_does_not(tmp_path, infer, reference, monkeypatch):
    infer(tmp_path)
    before = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    made = count_videos(monkeypatch)
    result = infer(tmp_path)
    assert made == [] and "3 of 3 videos exist already and are kept" in result.out
    assert {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()} == before

    result = infer(tmp_path, "--seed", "8")  # kept all the same, but not silently
    assert made == [] and result.out.count("made with other settings (runtime.seed)") == 3

    (tmp_path / "a red circle-0.mp4").unlink()
    (tmp_path / "green triangle-0.safetensors").unlink()  # asked for, so not complete without
    infer(tmp_path)
    assert made == ["a red circle-0", "green triangle-0"]
    assert_same(tmp_path, reference)

    made.clear()
    infer(tmp_path, "--overwrite")
    assert len(made) == 3
    assert_same(tmp_path, reference)


def after_op(monkeypatch: pytest.MonkeyPatch, number: int, act) -> None:
    """Call `act(op)` after every op from number `number` of this process on."""
    original, seen = TextToVideo.generate_blocks, [0]

    def wrapped(self, prompt, samples, prefix=None, on_op=None):
        def observing(op):
            if on_op is not None:
                on_op(op)
            seen[0] += 1
            if seen[0] >= number:
                act(op)

        return original(self, prompt, samples, prefix, observing)

    monkeypatch.setattr(TextToVideo, "generate_blocks", wrapped)


OPS = 3 * 4  # of a video of 3 blocks and 4 steps: contexts are written by the passes that denoise the next block


def test_ctrl_c_keeps_finished_videos_and_leaves_nothing_else(tmp_path, world, command, infer, reference, monkeypatch):
    seen: list[list[str]] = []

    def interrupt(op) -> None:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob(".*.mp4")) and time.monotonic() < deadline:
            time.sleep(0.01)  # the encoder is a process of its own and creates its file when it gets to it
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
    partial = [name for name in during if name.startswith(".")]
    assert sorted(Path(name).suffix for name in partial) == [".mp4", ".safetensors"]
    assert all(".partial" in name for name in partial)
    assert videos(tmp_path) == ["a red circle-0"] and len(names(tmp_path)) == 4  # mp4, json, png, safetensors
    infer(tmp_path)
    assert_same(tmp_path, reference)


KILLED = """
import os, signal, sys
import inference
from pipeline.text_to_video import TextToVideo
generate, ops, last = TextToVideo.generate_blocks, [0], int(sys.argv.pop(1))
def deadly(self, prompt, samples, prefix=None, on_op=None):
    def observing(op):
        ops[0] += 1
        if ops[0] == last:
            os.kill(os.getpid(), signal.SIGKILL)
    return generate(self, prompt, samples, prefix, observing)
TextToVideo.generate_blocks = deadly
inference.main()
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_same_bits_and_its_leftovers_go(tmp_path, world, infer, reference):
    words = ["--config_path", world.config, "--data_path", world.prompts, "--output_folder", tmp_path]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(2 * OPS - 1), *map(str, words), "--save_latents", "--order", "diagonal"],
        cwd=ROOT,
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    left = names(tmp_path)
    assert sum(".partial" in name for name in left) == 2 and videos(tmp_path) == ["a red circle-0"]
    # ffmpeg was killed while it rewrote the file: the name that VideoWriter uses then.
    [growing] = [name for name in left if name.endswith(".partial.mp4")]
    (tmp_path / f".{growing.removesuffix('.mp4')}.1.partial.mp4").write_bytes(b"half")
    infer(tmp_path)
    assert_same(tmp_path, reference)


def test_leftovers_of_other_videos_are_left_alone(tmp_path):
    """They may be another rank's, which writes them now."""
    mine = ".a-0.1.partial.mp4", "..a-0.1.partial.1.partial.mp4", ".a-0.1.partial.safetensors", ".a-0.1.partial.json"
    others = ".a-0.5 b-0.1.partial.mp4", ".a-01.1.partial.mp4", "a-0.mp4", ".ba-0.1.partial.mp4", "..a-1.1.partial.mp4"
    for name in (*mine, *others):
        (tmp_path / name).touch()
    output.VideoFiles(tmp_path, "a-0").remove_leftovers()
    assert names(tmp_path) == sorted(others)


def test_a_full_disk_is_one_line_and_keeps_finished_videos(tmp_path, world, command, monkeypatch):
    write = output.LatentsWriter.write

    def full(self, block):
        if self.path.stem.startswith("green"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, block)

    monkeypatch.setattr(output.LatentsWriter, "write", full)
    words = ("--config_path", world.config, "--data_path", world.prompts, "--output_folder", tmp_path)
    result = command(*words, "--save_latents")
    assert result.code == 1 and "Traceback" not in result.err
    assert result.err.splitlines()[-1] == "error: cannot write output: No space left on device"
    assert len(videos(tmp_path)) == 2 and len(names(tmp_path)) == 2 * 4


# ---- Conditioning ----


def write_image(file: Path) -> Path:
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(file)
    return file


@pytest.fixture(scope="module")
def encode(world):
    """encode(frames [T, H, W, 3]): the latents that conditioning by them should keep."""
    vae = WanVAE(ModelDirectory.open(world.model).load_vae(torch.float32))

    def run(frames: np.ndarray) -> torch.Tensor:
        pixels = torch.from_numpy(fit(frames, 32, 32).copy()).permute(0, 3, 1, 2)[None]
        return vae.encode(pixels / 127.5 - 1)[0]

    return run


def test_an_image_is_the_first_frame(tmp_path, infer, encode, reference):
    image = write_image(tmp_path / "start.PNG")
    for order in ("step_major", "diagonal"):
        infer(tmp_path / order, "--image", image, "--num_output_frames", 10, "--order", order)
    assert_same(tmp_path / "diagonal", tmp_path / "step_major")
    result = latents(tmp_path / "diagonal")["a red circle-0"]
    assert len(result) == 10 and torch.equal(result[:1], encode(np.array(Image.open(image))[None]))
    assert len(read_video(tmp_path / "diagonal/a red circle-0.mp4")[0]) == 37
    assert not torch.equal(result[1:4], latents(reference)["a red circle-0"][:3])


def test_a_clip_is_continued(tmp_path, infer, encode):
    """15 frames, of which a VAE of stride 4 takes 13: 4 latent frames, a short block of one and a whole one."""
    clip = np.random.default_rng(0).integers(0, 255, (15, 32, 32, 3), dtype=np.uint8)
    with VideoWriter(tmp_path / "clip.mp4") as video:
        video.write(clip)
    infer(tmp_path / "out", "--video", tmp_path / "clip.mp4", "--num_output_frames", 10)
    result = latents(tmp_path / "out")["green triangle-0"]
    assert len(result) == 10 and torch.equal(result[:4], encode(read_video(tmp_path / "clip.mp4")[0][:13]))
    assert len(read_video(tmp_path / "out/green triangle-0.mp4")[0]) == 37


def test_saved_latents_are_continued(tmp_path, infer, reference):
    start = reference / "green triangle-0.safetensors"
    infer(tmp_path, "--video", start, "--num_output_frames", 12)
    result = latents(tmp_path)["green triangle-0"]
    assert len(result) == 12 and torch.equal(result[:9], load_file(start)["latents"])
    assert len(read_video(tmp_path / "green triangle-0.mp4")[0]) == 45


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


def test_hiar_and_self_forcing_differ_in_the_schedule_and_the_forward_kl_only(command):
    hiar, self_forcing = (dry_run(command, ROOT / f"configs/{name}.yaml") for name in ("hiar", "self_forcing"))
    assert (hiar["distill"].pop("forward_kl_weight"), self_forcing["distill"].pop("forward_kl_weight")) == (0.1, 0.0)
    assert (hiar["rollout"].pop("schedule"), self_forcing["rollout"].pop("schedule")) == (
        "timestep_first",
        "block_first",
    )
    assert hiar == self_forcing


def test_the_readme_command_of_hiar_resolves(command):
    words = (
        "--checkpoint_path ckpts/hiar.pt --data_path data/prompts.txt --output_folder outputs/ --num_output_frames 81"
    )
    words += " --use_ema --inference_method timestep_first"
    config = dry_run(command, ROOT / "configs/hiar.yaml", *words.split())
    assert config["model"]["generator"] == "ckpts/hiar.pt" and config["video"]["num_output_frames"] == 81


def test_a_generator_checkpoint_and_its_ema(tmp_path, world, command, reference):
    """HiAR's own layout gives the same video as the folder that it was made of."""

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


def bad(name: str, *words: object, says: str, prepare=None, late: bool = False):
    """A case: words that are added to a good command line, and what the one line says.

    Args:
        prepare: called with the test's folder first.
        late: found once weights are being loaded or videos made, so that other lines may come before it.
    """
    return pytest.param(words, says, prepare, late, id=name)


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


def long_clip(folder: Path, world) -> None:
    with VideoWriter(folder / "long.mp4") as video:
        video.write(np.zeros((40, 32, 32, 3), np.uint8))


BAD = [
    bad("no checkpoint", "--checkpoint_path", "{}/none.pt", says="none.pt do not exist", late=True),
    bad("cut", "--checkpoint_path", "{}/cut.pt", says="is cut off", prepare=truncated_torch, late=True),
    bad(
        "cut safetensors",
        *("--checkpoint_path", "{}/cut.safetensors"),
        says="is cut off",
        prepare=damage("cut.safetensors"),
        late=True,
    ),
    bad(
        "another network",
        *("--checkpoint_path", "{}/other.pt"),
        says="it has 1 layers of width 32, the network 2 layers of width 32",
        prepare=other_architecture,
        late=True,
    ),
    bad(
        "no ema",
        *("--checkpoint_path", "{}/plain.pt", "--use_ema"),
        says="has no generator_ema",
        prepare=without_ema,
        late=True,
    ),
    bad("no model", "model.base={}/none", says="none does not exist"),
    bad("frames", "--num_output_frames", "10", says="the nearest valid --num_output_frames: 9 or 12"),
    bad("few frames", "--num_output_frames", "1", says="the nearest valid --num_output_frames: 3 or 6"),
    bad("no frames", "--num_output_frames", "0", says="must be positive"),
    bad("words for frames", "--num_output_frames", "many", says="takes a whole number, not 'many'"),
    bad(
        "height", "--height", "40", says="--height 40 is not a multiple of 16 (VAE and patches); the nearest: 32 or 48"
    ),
    bad("width", "--width", "8", says="--width 8 is not a multiple of 16 (VAE and patches); the nearest: 16"),
    bad("no prompts", "--data_path", "{}/empty.txt", says="holds no prompts", prepare=text("empty.txt", "")),
    bad(
        "blank prompts", "--data_path", "{}/blank.txt", says="holds no prompts", prepare=text("blank.txt", " \n\t\n\n")
    ),
    bad("no prompt file", "--data_path", "{}/none.txt", says="No such file"),
    bad("binary prompts", "--data_path", "{}/b.txt", says="is not UTF-8", prepare=text("b.txt", b"\xff\xfe\x80")),
    bad("unequal prompts", "--extended_prompt_path", "{}/l.txt", says="3 prompts", prepare=text("l.txt", "one\n")),
    bad("unknown key", "video.heigth=64", says="heigth"),
    bad("unknown section", "vidoe.height=64", says="vidoe"),
    bad("wrong type", "video.height=tall", says="video.height"),
    bad("bad choice", "rollout.schedule=random", says="rollout.schedule"),
    bad("section for a key", "rollout=5", says="RolloutConfig"),
    bad("broken override", "rollout.denoising_step_list=[1000", says="rollout.denoising_step_list"),
    bad("no override", "timestep_first", says="overrides are section.key=value"),
    bad("small window", "--window", "2", says="rollout.window 2 must hold a block"),
    bad("no config", "--config_path", "{}/none.yaml", says="no config file"),
    bad("broken config", "--config_path", "{}/b.yaml", says="not valid YAML", prepare=text("b.yaml", "model: [")),
    bad(
        "broken record",
        "--config_path",
        "{}/b.json",
        says="not a valid metadata file",
        prepare=text("b.json", '{"config": '),
    ),
    bad("other json", "--config_path", "{}/b.json", says="not the metadata of a video", prepare=text("b.json", "[1]")),
    bad("file for a folder", "--output_folder", "{}/f", says="cannot write to folder", prepare=text("f", "")),
    bad("file above folder", "--output_folder", "{}/f/out", says="cannot write to folder", prepare=text("f", "")),
    bad("no samples", "--num_samples", "0", says="--num_samples must be at least 1, not 0"),
    bad("no batch", "--batch_size", "0", says="--batch_size must be at least 1, not 0"),
    bad("image and video", "--image", "a.png", "--video", "b.mp4", says="--image or --video, not both"),
    bad("no image", "--image", "{}/none.png", says="none.png: there is no such file"),
    bad("no video", "--video", "{}/none.mp4", says="none.mp4: there is no such file"),
    bad("no latents", "--video", "{}/none.safetensors", says="there is no such file"),
    bad("no video inside", "--video", "{}/b.mp4", says="cannot read video", prepare=text("b.mp4", "text"), late=True),
    bad(
        "no latents inside",
        *("--video", "{}/b.safetensors"),
        says="cannot read latents from",
        prepare=text("b.safetensors", "text"),
        late=True,
    ),
    bad(
        "no image inside",
        *("--image", "{}/b.png", "--num_output_frames", 10),
        says="cannot read image",
        prepare=text("b.png", "text"),
        late=True,
    ),
    bad(
        "frames after an image",
        *("--image", "{}/start.png"),
        says="9 latent frames after a prefix of 1 cannot be divided into blocks of 3; "
        "the nearest valid --num_output_frames: 7 or 10",
        prepare=lambda folder, world: write_image(folder / "start.png"),
        late=True,
    ),
    bad("long clip", "--video", "{}/long.mp4", says="fills all 9 latent frames", prepare=long_clip, late=True),
    bad(
        "latents of another size",
        *("--video", "{}/large.safetensors"),
        says="[16, 8, 8], the video's are [16, 4, 4]",
        prepare=wrong_latents,
        late=True,
    ),
    bad("no such device", "--device", "cuda:7", says="no device 'cuda:7' here"),
    bad("no device name", "--device", "toaster", says="no device 'toaster' here"),
    bad("no attention backend", "model.attention_backend=telepathy", says="telepathy", late=True),
]


@pytest.mark.parametrize(("words", "says", "prepare", "late"), BAD)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, world, command, monkeypatch, words, says, prepare, late):
    if prepare is not None:
        prepare(tmp_path, world)
    if not late:
        monkeypatch.setattr(TextToVideo, "load", None)
    words = [str(word).format(tmp_path) if "{}" in str(word) else str(word) for word in words]
    out = tmp_path / "out"
    result = command("--config_path", world.config, "--data_path", world.prompts, "--output_folder", out, *words)
    assert result.code == 2
    assert says in result.err and "Traceback" not in result.err
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


def test_what_a_command_needs(world, command):
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
    num_frames, readable = 45, []

    def look(op) -> None:
        if op.block == num_frames // 3 - 1 and op.cache == 0:
            [growing] = tmp_path.glob(".*.partial.mp4")
            end = time.monotonic() + 30  # ffmpeg works beside us
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


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures memory as Linux does")
def test_the_diagonal_order_runs_in_constant_memory(tmp_path, world):
    """Five times the length must not take more: 600 pixel frames alone would be 7 MB as floats."""
    config = write_config(tmp_path / "c.yaml", world.model, rollout={"denoising_step_list": [1000, 500], "window": 9})
    pipeline = TextToVideo.load(str(config), device="cpu")

    def peak(num_frames: int) -> int:
        """MB of the process while it makes a video, at most."""
        pipeline.config = load_config(str(config), [f"video.num_output_frames={num_frames}", "rollout.order=diagonal"])
        job = output.VideoJob(Prompt(0, "a", "a"), 0, output.VideoFiles(tmp_path, f"{num_frames}-0"))
        Path("/proc/self/clear_refs").write_text("5")
        generate.make_videos(pipeline, [job], None, "", True, tqdm(disable=True))
        status = Path("/proc/self/status").read_text()
        return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) // 1024

    peak(12)
    short, long = peak(30), peak(180)
    assert long - short <= 3, (short, long)
