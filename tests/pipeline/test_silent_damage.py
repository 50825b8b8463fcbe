"""No damage passes silently: NaN, incomplete files, and two runs in one folder, each with its one-line error."""

import json
import multiprocessing
import os
import re
import shutil
import struct
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmark.host_syncs import host_syncs
from model.text_encoder import TextEncoder
from model.vae import WanVAE
from model.weight_files import TRANSFORMER_FILE
from model.weights import ModelDirectory
from pipeline import decoding, generate
from pipeline.decoding import decode_frames
from pipeline.output import VideoFiles, VideoOutput
from pipeline.parallel import runner
from pipeline.rollout import Rollout
from pipeline.schedule import Denoise
from pipeline.text_to_video import TextToVideo
from utils.config import Config
from utils.errors import UserError
from utils.locks import check_unlocked, lock_file, lock_folder
from utils.mp4 import is_complete_mp4

ONE = ("--prompt", "a red circle")
CIRCLE = "a red circle-0"
NAN, INFINITY = float("nan"), float("inf")


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir()) if folder.exists() else []


@pytest.fixture
def make(world, command):
    """make(folder, word, ...): run inference.py for one prompt; return its result."""

    def run(folder: Path, *words: object):
        return command("--config_path", world.config, *ONE, "--output_folder", folder, *words)

    return run


def assert_one_line(result, *fragments: str) -> None:
    last = result.err.splitlines()[-1]
    assert result.code == 2 and last.startswith("error: ") and "Traceback" not in result.err, result.err
    assert [fragment for fragment in fragments if fragment not in last] == [], last


# ---- NaN in videos ----


@pytest.fixture
def nan_in_block(monkeypatch):
    """nan_in_block(number, value): the last step of that block predicts the value in one element."""

    def patch(number: int, value: float = NAN) -> None:
        finish_step = Rollout._finish_step

        def damaged(self, op: Denoise, result: Tensor) -> None:
            if op.block == number and op.step == self.final_step:
                result = result.clone()
                result.view(-1)[-1] = value
            finish_step(self, op, result)

        monkeypatch.setattr(Rollout, "_finish_step", damaged)

    return patch


@pytest.mark.parametrize("value", [NAN, INFINITY, -INFINITY])
@pytest.mark.parametrize("block", [0, 2])
def test_nan_in_latents_names_the_block_and_leaves_no_video(tmp_path, make, nan_in_block, value, block):
    nan_in_block(block, value)
    result = make(tmp_path, "--save_latents")
    frames = f"latent frames {3 * block} to {3 * block + 2}"
    assert_one_line(result, f"NaN or infinity in block {block} ({frames}) of {CIRCLE}.mp4")
    assert names(tmp_path) == []


def test_a_rerun_makes_a_video_with_nan_again(tmp_path, make, nan_in_block, monkeypatch, reference):
    nan_in_block(2)
    assert make(tmp_path, "--save_latents").code == 2
    monkeypatch.undo()
    result = make(tmp_path, "--save_latents")
    assert result.code == 0 and "wrote 1 video to" in result.out
    assert (tmp_path / f"{CIRCLE}.mp4").read_bytes() == (reference / f"{CIRCLE}.mp4").read_bytes()


def test_nan_of_the_vae_names_the_block(tmp_path, make, monkeypatch):
    monkeypatch.setattr(WanVAE, "_cast", lambda self, x: torch.full_like(x, NAN))
    assert_one_line(make(tmp_path), "the VAE decodes block 0 (latent frames 0 to 2)", "to NaN or infinity")
    assert names(tmp_path) == []


def test_nan_in_one_video_of_a_batch_names_that_video(tmp_path, world, command, nan_in_block):
    nan_in_block(1)  # its last element belongs to the last video
    words = ("--config_path", world.config, "--data_path", world.prompts, "--output_folder", tmp_path)
    assert_one_line(command(*words, "--batch_size", 3), "block 1 (latent frames 3 to 5) of green triangle-0.mp4")
    assert names(tmp_path) == []


def test_nan_in_a_video_of_the_python_api_is_an_error(world, nan_in_block):
    pipe = TextToVideo.load(str(world.config))
    nan_in_block(1)
    message = r"NaN or infinity in block 1 \(latent frames 3 to 5\)"
    with pytest.raises(UserError, match=message):
        pipe.generate("a red circle")
    with pytest.raises(UserError, match=message):
        list(pipe.stream("a red circle"))


def test_finished_latents_of_all_kinds_are_checked_without_a_host_sync(world, monkeypatch):
    """The flags are read after the pixels, whose copy waits for the device anyway."""
    vae = WanVAE(ModelDirectory.open(world.model).load_vae(torch.float32))
    calls: list[str] = []
    quantize = decoding.quantize
    monkeypatch.setattr(decoding, "quantize", lambda frames: calls.append("pixels") or quantize(frames))
    with host_syncs(torch.device("cpu")) as syncs:
        decode_frames(vae.stream(), torch.zeros(2, 1, 16, 4, 4), "a block")
    reads = [call for call in syncs if call not in ("cpu", "numpy")]
    assert calls == ["pixels"] and syncs[-1] == "tolist" and reads == ["tolist"]
    for shape, where in (((1, 2, 16, 4, 4), 0), ((1, 1, 16, 2, 2), -1)):
        latents = torch.zeros(shape)
        latents.view(-1)[where] = NAN
        with pytest.raises(UserError, match="NaN or infinity in a block"):
            decode_frames(vae.stream(), latents, "a block")


@pytest.fixture
def overflowing(world, tmp_path) -> Path:
    """Finite weights that are so large that every video overflows."""
    state = load_file(world.model / "generator" / TRANSFORMER_FILE)
    state = {name: tensor.float() for name, tensor in state.items()}
    state["proj_out.weight"].fill_(3e38)
    (tmp_path / "weights").mkdir()
    save_file(state, tmp_path / "weights/large.safetensors")
    return tmp_path / "weights/large.safetensors"


def test_weights_that_overflow_make_no_video(tmp_path, make, overflowing):
    result = make(tmp_path / "out", "--checkpoint_path", overflowing)
    assert_one_line(result, "NaN or infinity in block 0 (latent frames 0 to 2)")
    assert names(tmp_path / "out") == []


# ---- NaN in conditioning ----


@pytest.mark.parametrize("value", [NAN, INFINITY])
def test_saved_latents_with_nan_are_refused_as_a_prefix(tmp_path, make, value):
    latents = torch.zeros(3, 16, 4, 4)
    latents[1, 2, 3, 0] = value
    save_file({"latents": latents}, tmp_path / "start.safetensors")
    result = make(tmp_path / "out", "--video", tmp_path / "start.safetensors")
    assert_one_line(result, "start.safetensors", "NaN or infinity")
    assert names(tmp_path / "out") == []


def test_an_image_that_is_encoded_to_nan_is_refused(tmp_path, make, monkeypatch):
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(tmp_path / "start.png")
    monkeypatch.setattr(WanVAE, "encode", lambda self, pixels: torch.full((1, 1, 16, 4, 4), NAN))
    result = make(tmp_path / "out", "--image", tmp_path / "start.png", "--num_output_frames", 10)
    assert_one_line(result, "start.png is encoded to NaN or infinity")


def test_nan_of_the_text_encoder_is_refused_and_not_kept(tmp_path, make, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(TextEncoder, "_encode", lambda self, prompt: torch.full((24, 16), NAN))
        result = make(tmp_path / "out", f"model.text_cache={tmp_path / 'cache'}")
    assert_one_line(result, "the text encoder returns NaN or infinity for 'a red circle'")
    assert names(tmp_path / "cache") == [] and names(tmp_path / "out") == []


@pytest.mark.parametrize("value", [NAN, INFINITY])
def test_a_cached_embedding_with_nan_is_refused(tmp_path, make, value):
    cache = f"model.text_cache={tmp_path / 'cache'}"
    assert make(tmp_path / "out", cache).code == 0
    [file] = (tmp_path / "cache").iterdir()
    embedding = load_file(file)["embedding"]
    embedding[0, 0] = value
    save_file({"embedding": embedding}, file)
    assert_one_line(make(tmp_path / "again", cache), "'a red circle'", file.name, "holds NaN or infinity")
    assert names(tmp_path / "again") == []


# ---- incomplete videos ----


def header_only(content: bytes) -> bytes:
    """Return the boxes of an mp4 before its frames."""
    return content[: content.index(b"mdat") - 4]


DAMAGED = {
    "no bytes": lambda content: b"",
    "a few bytes": lambda content: content[:5],
    "only the header": header_only,
    "no frames": lambda content: header_only(content) + struct.pack(">I4s", 8, b"mdat"),
    "no index": lambda content: content[:32] + content[content.index(b"mdat") - 4 :],
    "cut off": lambda content: content[:-1],
    "half": lambda content: content[: len(content) // 2],
    "text": lambda content: b"not a video",
    "zeros": lambda content: bytes(1000),
    "a broken 64-bit size": lambda content: content + struct.pack(">I4sQ", 1, b"free", 2**63),
    "a size below the header's": lambda content: content + struct.pack(">I4s", 4, b"free"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_mp4_files_are_incomplete(tmp_path, reference, damage):
    content = (reference / f"{CIRCLE}.mp4").read_bytes()
    (tmp_path / "x.mp4").write_bytes(DAMAGED[damage](content))
    assert not is_complete_mp4(tmp_path / "x.mp4")


def test_mp4_files_of_all_layouts_are_complete(tmp_path, reference):
    content = (reference / f"{CIRCLE}.mp4").read_bytes()
    start = content.index(b"mdat") - 4
    assert start + struct.unpack(">I", content[start : start + 4])[0] == len(content)  # frames come last
    to_the_end = content[:start] + struct.pack(">I", 0) + content[start + 4 :]
    size = len(content) - start + 8
    long = content[:start] + struct.pack(">I4sQ", 1, b"mdat", size) + content[start + 8 :]
    for name, data in {"usual": content, "to the end": to_the_end, "64-bit": long}.items():
        (tmp_path / "x.mp4").write_bytes(data)
        assert is_complete_mp4(tmp_path / "x.mp4"), name
    assert not is_complete_mp4(tmp_path / "absent.mp4") and not is_complete_mp4(tmp_path)


@pytest.mark.parametrize("damage", ["no bytes", "only the header", "cut off"])
def test_an_incomplete_video_is_made_again(tmp_path, make, reference, damage):
    shutil.copytree(reference, tmp_path / "out")
    content = (reference / f"{CIRCLE}.mp4").read_bytes()
    (tmp_path / f"out/{CIRCLE}.mp4").write_bytes(DAMAGED[damage](content))
    result = make(tmp_path / "out")
    assert result.code == 0 and "wrote 1 video to" in result.out
    assert (tmp_path / f"out/{CIRCLE}.mp4").read_bytes() == content


def test_empty_latents_are_made_again(tmp_path, make, reference):
    shutil.copytree(reference, tmp_path / "out")
    (tmp_path / f"out/{CIRCLE}.safetensors").write_bytes(b"")
    assert "wrote 0 videos (1 existed)" in make(tmp_path / "out").out
    assert "wrote 1 video to" in make(tmp_path / "out", "--save_latents").out
    assert load_file(tmp_path / f"out/{CIRCLE}.safetensors").keys() == {"latents"}


# ---- two runs in one folder ----


@pytest.fixture
def holder() -> Iterator:
    """holder(path): hold a lock in another process until the test ends; returns the process."""
    held = []

    def start(path: Path) -> multiprocessing.context.ForkProcess:
        context = multiprocessing.get_context("fork")
        ours, theirs = context.Pipe()

        def hold() -> None:
            with lock_file(path, "holding"):
                theirs.send(True)
                time.sleep(60)

        process = context.Process(target=hold, daemon=True)
        process.start()
        assert ours.poll(20)
        held.append(process)
        return process

    yield start
    for process in held:
        process.kill()
        process.join(20)


@pytest.mark.parametrize("words", [(), ("--overwrite",)])
def test_a_second_run_stops_and_names_the_first(tmp_path, make, holder, words):
    """It deletes no file of the first run, and loads no weights."""
    files = VideoFiles(tmp_path, CIRCLE)
    process = holder(files.lock)
    (tmp_path / f".{CIRCLE}.1.partial.mp4").write_bytes(b"half")
    result = make(tmp_path, *words, "model.base=data/shapes-wan", "model.generator=nowhere.pt")
    since = r"since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
    assert_one_line(result, f"another process is making {files.video}", f"(process {process.pid} on ")
    assert re.search(since, result.err)
    assert names(tmp_path) == sorted([files.lock.name, f".{CIRCLE}.1.partial.mp4"])


def test_the_lock_is_held_while_a_video_is_made(tmp_path, world, make, monkeypatch):
    """The second run started when the first one had made nothing yet: it learns of the first at the video itself."""
    seen = []
    blocks = TextToVideo.generate_blocks

    def second_run(self, *arguments):
        vae = self.vae
        with pytest.raises(UserError, match=rf"another process is making .*{CIRCLE}.mp4 \(process {os.getpid()} on "):
            VideoOutput(vae, [VideoFiles(tmp_path, CIRCLE)], 16, 9).__enter__()
        seen.append(names(tmp_path))
        return blocks(self, *arguments)

    monkeypatch.setattr(TextToVideo, "generate_blocks", second_run)
    assert make(tmp_path).code == 0
    assert seen == [[f".{CIRCLE}.lock"]]
    assert names(tmp_path) == [f"{CIRCLE}.{suffix}" for suffix in ("json", "mp4", "png")]


def test_runs_of_different_prompts_share_a_folder(tmp_path, make, holder):
    holder(VideoFiles(tmp_path, "another prompt-0").lock)
    assert make(tmp_path).code == 0


def test_a_video_that_another_run_has_made_meanwhile_is_kept(tmp_path, make, reference, monkeypatch):
    load = TextToVideo.load

    def slow(*arguments, **options):
        shutil.copy(reference / f"{CIRCLE}.mp4", tmp_path)
        return load(*arguments, **options)

    monkeypatch.setattr(TextToVideo, "load", slow)
    monkeypatch.setattr(generate, "make_videos", None)
    assert make(tmp_path).code == 0


def test_a_lock_ends_with_its_process(tmp_path, make, holder):
    process = holder(VideoFiles(tmp_path, CIRCLE).lock)
    process.kill()
    process.join()
    assert make(tmp_path).code == 0
    assert names(tmp_path) == [f"{CIRCLE}.{suffix}" for suffix in ("json", "mp4", "png")]


def test_a_pipeline_stops_at_a_video_of_another_run(tmp_path, world, holder):
    process = holder(VideoFiles(tmp_path, CIRCLE).lock)
    items = [(generate.Prompt(0, "a red circle", "a red circle"), 0, CIRCLE)]
    config = TextToVideo.load(str(world.config)).config
    request = runner.PipelineRequest(config, str(tmp_path), items)
    with pytest.raises(UserError, match=rf"another process is making .*\(process {process.pid} on "):
        runner.run_pipelines(request)


def test_a_folder_lock_names_its_holder(tmp_path, holder):
    process = holder(tmp_path / ".lock")
    message = rf"another process is training in {tmp_path} \(process {process.pid} on .+ since .+\); wait for it"
    with pytest.raises(UserError, match=message), lock_folder(tmp_path, "training in"):
        pass


def test_a_folder_can_be_locked_once_at_a_time(tmp_path):
    again = lock_folder(tmp_path, "training in")
    with lock_folder(tmp_path, "training in"), pytest.raises(UserError, match="another process is training in"), again:
        pass
    with lock_folder(tmp_path, "training in"):
        assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")
    assert (tmp_path / ".lock").read_text() == ""


def test_a_test_of_a_lock_leaves_no_file(tmp_path):
    check_unlocked(tmp_path / ".x.lock", "testing")
    (tmp_path / ".x.lock").write_text("process 1 on a machine that is gone")
    check_unlocked(tmp_path / ".x.lock", "testing")
    assert names(tmp_path) == []
    with lock_file(tmp_path / ".x.lock", "testing", keep=False):
        (tmp_path / ".x.lock").write_bytes(b"\x1b[31m\xff")  # a foreign file cannot write to the terminal
        with pytest.raises(UserError) as caught:
            check_unlocked(tmp_path / ".x.lock", "testing")
    assert "\x1b" not in str(caught.value)


def test_locks_are_never_held_twice_while_they_are_deleted_and_made_again(tmp_path):
    """Several processes lock and delete the same file; a counter that only the holder changes loses no step."""
    counter, lock = tmp_path / "counter", tmp_path / ".lock"
    counter.write_text("0")
    context = multiprocessing.get_context("fork")

    def count() -> None:
        for _ in range(30):
            while True:
                try:
                    with lock_file(lock, "counting", keep=False):
                        counter.write_text(str(int(counter.read_text()) + 1))
                        break
                except UserError:
                    continue

    processes = [context.Process(target=count) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert int(counter.read_text()) == 90


# ---- metadata of existing videos ----


@pytest.mark.parametrize(
    ("older", "note"),
    [
        ({"prefix": "x.png"}, ""),
        ({"condition": "x.png"}, ""),  # the key in older files
        ({"condition": "y.png"}, "made with other settings (prefix); --overwrite replaces it"),
        ({"prefix": "x.png", "prompt": "b"}, "made with other settings (prompt); --overwrite replaces it"),
    ],
)
def test_settings_are_compared_with_older_metadata(tmp_path, capsys, older, note):
    common, files = {"config": asdict(Config()), "prompt": "a"}, VideoFiles(tmp_path, "a-0")
    files.metadata.write_text(json.dumps(common | older))
    generate.print_changed_settings(files, common | {"prefix": "x.png"})
    assert capsys.readouterr().out == (f"kept {files.video}, {note}\n" if note else "")
