"""Own videos: scripts/process_videos.py, encode_clips.py and create_lmdb.py, on files that the tests write."""

import csv
import errno
import json
import os
import signal
import time
import unicodedata
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import run_main
from tiny_model import all_clips, write_model
from video_files import cut_off, grey_levels, moving_square, rotate_file, write_video

from model.vae import WanVAE
from model.weights import ModelDirectory
from scripts import create_lmdb, encode_clips, process_videos
from trainer.datasets import encode
from trainer.datasets.clips import open_clips
from trainer.datasets.process_videos import ClipFormat, process_video
from trainer.datasets.video_folder import find_video_names, read_captions
from utils.clips import read_video
from utils.errors import UserError
from utils.locks import lock_file
from utils.video import VideoWriter

SMALL = ("--num_frames", 5, "--height", 32, "--width", 48, "--fps", 8)


def process(source: Path, output: Path, *words: object):
    return run_main(process_videos.main, "--input_dir", source, "--output_dir", output, *SMALL, *words)


def clips_in(folder: Path) -> list[str]:
    """Return the finished clips; a killed process leaves hidden files."""
    paths = [path for path in folder.rglob("*.mp4") if not path.name.startswith(".")]
    return sorted(path.relative_to(folder).as_posix() for path in paths)


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    """A folder of good, unsuitable and broken videos."""
    folder = tmp_path_factory.mktemp("videos")
    (folder / "sub").mkdir()
    (folder / "two/deep").mkdir(parents=True)
    write_video(folder / "deep.mp4", moving_square(20, 64, 96), 16, codec="libx264", pix_fmt="yuv420p10le")
    write_video(folder / "odd.mkv", moving_square(12, 33, 51), 16, codec="ffv1", pix_fmt="bgr0")
    times = [0, 0.1, 0.3, 0.32, 0.5, 0.8]
    write_video(folder / "two/deep/phone.mp4", grey_levels([20, 60, 100, 140, 180, 220], 32, 48), times=times)
    write_video(folder / "sub/Größe 1.webm", moving_square(30, 32, 48), 30, codec="libvpx-vp9")
    write_video(folder / "sound.mp4", moving_square(20, 32, 48), audio=True)
    rotate_file(write_video(folder / "turned.mp4", moving_square(20, 48, 32)), 90)
    write_video(folder / "short.mp4", moving_square(1, 32, 48))
    write_video(folder / "tall.mp4", moving_square(20, 48, 32))
    cut_off(write_video(folder / "cut.mp4", moving_square(40, 32, 48), 64, index_first=True), 0.9)
    cut_off(write_video(folder / "no_index.mp4", moving_square(20, 32, 48)), 0.8)
    write_video(folder / "song.mp4", moving_square(1), video=False)
    (folder / "notes.mp4").write_text("no video")
    (folder / "empty.mov").touch()
    (folder / ".hidden.mp4").write_text("no video")
    return folder


GOOD = ["deep.mp4", "odd.mkv.mp4", "sound.mp4", "sub/Größe 1.webm.mp4", "turned.mp4", "two/deep/phone.mp4"]
BROKEN = ["cut.mp4", "empty.mov", "no_index.mp4", "notes.mp4", "song.mp4"]


@pytest.fixture(scope="module")
def processed(videos, tmp_path_factory):
    """The clips of `videos`, and the result of the command."""
    output = tmp_path_factory.mktemp("processed")
    return output, process(videos, output)


# ---- process_videos ----


def test_any_video_becomes_clips_of_one_format(processed):
    output, result = processed
    assert result.code == 0 and clips_in(output) == GOOD
    for name in GOOD:
        frames, fps = read_video(output / name)
        assert frames.shape == (5, 32, 48, 3) and fps == 8
    assert not any(path.name.startswith(".") for path in output.rglob("*"))


def test_unsuitable_and_broken_videos_are_listed_and_stop_nothing(processed):
    _, result = processed
    assert "6 clips written; videos: 0 finished before, 2 skipped, 5 failed" in result.out
    lines = result.out.splitlines()
    assert [line.split(": ")[1] for line in lines if line.startswith("failed")] == BROKEN
    assert any(line.startswith("skipped: short.mp4: 1 frames at 8 fps") for line in lines)
    assert any(
        line.startswith("skipped: tall.mp4: 32x48 pixels have the aspect ratio 0.667, not 1.5") for line in lines
    )
    assert "song.mp4: it has no video stream" in result.out and "cut.mp4: it is cut off after" in result.out


def test_frames_are_those_at_their_times(processed):
    """0, 1/8, 2/8, ... s: the frame of the nearest timestamp is shown until the next one."""
    frames, _ = read_video(processed[0] / "two/deep/phone.mp4")
    np.testing.assert_allclose(frames[:, 16, 24, 0], [20, 60, 100, 140, 180], atol=5)


def test_a_second_run_keeps_finished_clips_and_writes_missing_ones(videos, processed, tmp_path):
    output, _ = processed
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*.mp4")}
    (output / "deep.mp4").unlink()
    cut_off(output / "sound.mp4", 0.9)  # as a machine that lost power
    result = process(videos, output)
    assert result.code == 0 and "2 clips written; videos: 4 finished before" in result.out
    after = {path: path.stat().st_mtime_ns for path in output.rglob("*.mp4")}
    assert {path.name for path in before if after[path] != before[path]} == {"deep.mp4", "sound.mp4"}
    result = run_main(process_videos.main, "--input_dir", videos, "--output_dir", output, "--num_frames", 9)
    assert result.code == 2 and "clips of other settings (num_frames, height, width, fps)" in result.err


def test_segments_shards_and_processes_in_one_folder(videos, tmp_path):
    words = ("--all_segments", "--aspect_tolerance", "inf", "--num_shards", 2, "--shard")
    first = process(videos, tmp_path, *words, 0)
    with lock_file(tmp_path / ".deep.mp4.lock", "writing deep.mp4"):  # another process
        second = process(videos, tmp_path, *words, 1)
    assert first.code == second.code == 0
    both = first.out + second.out
    assert all(f"failed: {name}" in both for name in BROKEN) and "1 in work by other processes" in both
    whole = process(videos, tmp_path, "--all_segments", "--aspect_tolerance", "inf")
    assert "2 clips written; videos: 6 finished before, 1 skipped" in whole.out  # deep.mp4
    assert clips_in(tmp_path / "deep.mp4") == ["000.mp4", "001.mp4"]  # 20 frames at 16 fps are 10 at 8 fps
    joined = np.concatenate([read_video(tmp_path / f"deep.mp4/00{i}.mp4")[0] for i in range(2)])
    expected, _ = read_video(videos / "deep.mp4", fps=8, size=(32, 48))
    error, shifted = (np.abs(joined[1:].astype(int) - other).mean() for other in (expected[1:], expected[:-1]))
    assert error < 3 < shifted  # each frame at its own time


def test_worker_processes_write_the_same_clips(videos, processed, tmp_path):
    result = process(videos, tmp_path, "--num_workers", 2)
    assert result.code == 0 and clips_in(tmp_path) == GOOD
    for name in GOOD:
        assert (tmp_path / name).read_bytes() == (processed[0] / name).read_bytes()


def test_an_interrupted_clip_leaves_no_file(videos, tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.datasets.process_videos.resize_and_crop", lambda *_: os.kill(os.getpid(), 2))
    result = process(videos, tmp_path)
    assert result.code == 130 and [path.name for path in tmp_path.iterdir()] == ["clips.json"]


def start(videos: Path, output: Path, slow: bool = False) -> int:
    """Start the command in a process of its own and return the process ID."""
    child = os.fork()
    if child == 0:
        if slow:
            write = VideoWriter.write
            VideoWriter.write = lambda self, frames: (write(self, frames), time.sleep(0.1))
        os._exit(process(videos, output).code)
    return child


def test_a_killed_process_is_continued_by_two_processes_in_one_folder(videos, processed, tmp_path):
    killed = start(videos, tmp_path, slow=True)
    end = time.monotonic() + 30
    while not clips_in(tmp_path) and time.monotonic() < end:
        time.sleep(0.02)
    os.kill(killed, signal.SIGKILL)
    os.waitpid(killed, 0)
    kept = {name: (tmp_path / name).stat().st_mtime_ns for name in clips_in(tmp_path)}
    assert 0 < len(kept) < len(GOOD)
    assert [os.waitpid(child, 0)[1] for child in (start(videos, tmp_path), start(videos, tmp_path))] == [0, 0]
    assert clips_in(tmp_path) == GOOD
    for name in GOOD:
        assert (tmp_path / name).read_bytes() == (processed[0] / name).read_bytes()
    assert all((tmp_path / name).stat().st_mtime_ns == written for name, written in kept.items())


def fail_on_a_full_disk(source: Path, output: Path, form: ClipFormat, name: str) -> None:
    with (output / "started").open("a") as file:
        file.write(f"{name}\n")
    time.sleep(0.05)
    raise OSError(errno.ENOSPC, "No space left on device", "a.mp4")


def test_an_error_of_the_disk_ends_all_workers(videos, tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.datasets.process_videos.process_video", fail_on_a_full_disk)
    result = process(videos, tmp_path, "--num_workers", 2)
    assert result.code != 0 and "No space left on device" in result.err
    assert len((tmp_path / "started").read_text().splitlines()) < 10  # of 13 videos


def test_no_clip_at_all_is_an_error(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    assert "holds no videos" in process(source, tmp_path / "out").err
    (source / "a.mp4").write_text("no video")
    result = process(source, tmp_path / "out")
    assert result.code == 2 and "failed: a.mp4" in result.out and "none of the 1 videos" in result.err
    assert "lies in" in process(source, source / "out").err


def test_names_that_collide_or_cannot_be_written_are_listed(tmp_path):
    form = ClipFormat(num_frames=1, height=32, width=48)
    (tmp_path / "b").touch()
    for name in ("a.mov", "a.mov.mp4", "b.mp4", "x" * 240 + ".mp4"):
        write_video(tmp_path / name, moving_square(2, 32, 48))
    outcomes = [process_video(tmp_path, tmp_path / "out", form, name) for name in find_video_names(tmp_path)]
    assert [(outcome.kind, outcome.reason.partition(":")[0][:14]) for outcome in outcomes] == [
        ("written", ""),
        ("failed", "its clip has t"),
        ("written", ""),
        ("failed", "cannot write /"),
    ]


# ---- Captions ----


def folder_of(tmp_path: Path, *names: str) -> list[str]:
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return find_video_names(tmp_path)


def test_captions_in_three_forms(tmp_path):
    names = folder_of(tmp_path, "a b.mp4", "Über/ä.mov.mp4", "b.mkv/000.mp4", "b.mkv/001.mp4")
    expected = {"a b.mp4": "a cat", "Über/ä.mov.mp4": "größer, weiter", "b.mkv/000.mp4": "hi", "b.mkv/001.mp4": "hi"}
    texts = {"a b.mp4": " a\ncat ", "Über/ä.mov": "größer, weiter", "b.mkv": "hi\u2028", "other.mp4": "x"}
    decomposed = {unicodedata.normalize("NFD", path): text for path, text in texts.items()}
    assert list(decomposed) != list(texts)
    object_file, list_file, table = tmp_path / "o.json", tmp_path / "l.json", tmp_path / "t.csv"
    object_file.write_text(json.dumps(decomposed))
    list_file.write_text(json.dumps([{"path": path, "cap": [text]} for path, text in texts.items()]))
    with table.open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([("id", "caption", "path"), *((1, text, path) for path, text in texts.items())])
    for file in (object_file, list_file, table):
        assert read_captions(tmp_path, names, file) == expected
    table.write_text("\n".join(f'{path},"{text}"' for path, text in texts.items()))
    assert read_captions(tmp_path, names, table) == expected
    for path, text in texts.items():
        (tmp_path / f"{path.removesuffix('.mp4')}.txt").write_text(text, encoding="utf-8")
    assert read_captions(tmp_path, names) == expected
    (tmp_path / "captions.json").write_text('{"a b.mp4": "a dog", "Über/ä.mov.mp4": " "}')
    assert read_captions(tmp_path, names) == {"a b.mp4": "a dog"}  # captions.json replaces the texts; blank is missing


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.json", "{", "not a valid file of captions"),
        ("c.json", '{"a.mp4": 1}', "entry 0 needs a path and a caption"),
        ("c.json", "3", "entry 0 needs a path and a caption"),
        ("c.json", '{"b.mp4": "x"}', "captions of none of the 1 videos.*it names 'b.mp4'.*such as 'a.mp4'"),
        ("c.csv", "a.mp4", "row 0 has no path and caption"),
        ("c.csv", b"a.mp4,\xff", "save it as UTF-8"),
        ("c.csv", "", "captions of none"),
        ("c.txt", "a.mp4 x", "must be a JSON file"),
    ],
)
def test_malformed_captions_are_one_line(tmp_path, name, content, message):
    names = folder_of(tmp_path, "a.mp4")
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as caught:
        read_captions(tmp_path, names, tmp_path / name)
    assert "\n" not in str(caught.value)


# ---- From videos to an LMDB ----


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def encode_folder(model: Path, source: Path, output: Path, *words: object):
    base = ("--base", model, "--num_frames", 2, "--device", "cpu", "--fps", 8)
    return run_main(encode_clips.main, *base, "--videos", source, "--output", output, *words)


def latents_of(model: Path, path: Path) -> torch.Tensor:
    """Return the VAE's latents [F, C, h, w] of the first five frames of a video."""
    pixels = torch.from_numpy(read_video(path)[0][:5]).permute(0, 3, 1, 2)[None].float() / 127.5 - 1
    return WanVAE(ModelDirectory.open(model).load_vae(torch.float32)).encode(pixels)[0]


def test_from_videos_to_an_lmdb(videos, model, tmp_path, monkeypatch):
    """Captions follow the clips, and the LMDB holds the latents of the VAE itself."""
    monkeypatch.setattr(encode, "CLIPS_PER_SHARD", 2)
    clips, latents, lmdb = (tmp_path / name for name in ("clips", "latents", "lmdb"))
    captions = tmp_path / "captions.json"
    texts = {"deep.mp4": "deep", "odd.mkv": "odd", "sound.mp4": "sound", "sub/Größe 1.webm": "größer"}
    captions.write_text(json.dumps({unicodedata.normalize("NFD", path): text for path, text in texts.items()}))
    assert process(videos, clips, "--captions", captions).code == 0
    (clips / "deep.mp4").write_bytes((clips / "deep.mp4").read_bytes()[:-50])
    result = encode_folder(model, clips, latents)
    assert result.code == 0 and "6 videos, 3 left out" in result.out
    assert "left out: turned.mp4: it has no caption" in result.out and "left out: deep.mp4: " in result.out
    run = partial(run_main, create_lmdb.main, "--data_path", latents)
    assert run("--lmdb_path", lmdb, "--num_shards", 2).code == 0
    expected = [latents_of(model, clips / name) for name in ("odd.mkv.mp4", "sound.mp4", "sub/Größe 1.webm.mp4")]
    for folder in (latents, lmdb):
        stored, prompts = all_clips(str(folder))
        assert prompts == ["odd", "sound", "größer"]
        torch.testing.assert_close(stored.float(), torch.stack(expected), atol=2e-3, rtol=2e-3)


def test_encoding_resumes_and_follows_changed_videos(videos, model, processed, tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "CLIPS_PER_SHARD", 2)
    clips, latents = tmp_path / "clips", tmp_path / "latents"
    clips.mkdir()
    for name in ("deep.mp4", "sound.mp4", "turned.mp4"):
        (clips / name).write_bytes((processed[0] / name).read_bytes())
        (clips / name).with_suffix(".txt").write_text(f"a {name}")
    write_video(clips / "big.mp4", moving_square(5, 64, 64), 8)
    (clips / "big.txt").write_text("big")
    (clips / "a broken.mp4").write_text("no video")
    (clips / "a broken.txt").write_text("broken")
    first = encode_folder(model, clips, latents)
    assert first.code == 0 and "left out: a broken.mp4: cannot read video" in first.out
    assert "left out: deep.mp4" in first.out  # big.mp4 sets the size
    (clips / "big.mp4").unlink()
    for shard in latents.iterdir():
        shard.unlink()
    assert encode_folder(model, clips, latents).code == 0
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in latents.iterdir()}
    assert sorted(before) == ["000000.safetensors", "000002.safetensors"]
    (latents / "000000.safetensors").unlink()
    again = encode_folder(model, clips, latents)
    assert "left out: a broken.mp4" in again.out
    assert {path.name: path.read_bytes() for path in latents.iterdir()} == {n: old[1] for n, old in before.items()}
    assert (latents / "000002.safetensors").stat().st_mtime_ns == before["000002.safetensors"][0]
    at_8_fps = all_clips(str(latents))[0]
    assert encode_folder(model, clips, latents, "--fps", 16).code == 0
    assert not torch.equal(all_clips(str(latents))[0], at_8_fps)
    (clips / "turned.txt").write_text("another caption")
    assert encode_folder(model, clips, latents).code == 0
    assert all_clips(str(latents))[1] == ["a deep.mp4", "a sound.mp4", "another caption"]


def test_ranks_share_the_shards(videos, model, processed, tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "CLIPS_PER_SHARD", 2)
    captions = tmp_path / "captions.csv"
    captions.write_text("\n".join(f"{name},{name}" for name in GOOD))
    words = (model, processed[0], tmp_path / "ranks", "--captions", captions)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for number in "10":
        monkeypatch.setenv("RANK", number)
        assert encode_folder(*words).code == 0
    monkeypatch.delenv("WORLD_SIZE"), monkeypatch.delenv("RANK")
    assert encode_folder(model, processed[0], tmp_path / "alone", "--captions", captions).code == 0
    for shard in (tmp_path / "alone").iterdir():
        assert shard.read_bytes() == (tmp_path / "ranks" / shard.name).read_bytes()
    assert all_clips(str(tmp_path / "ranks"))[1] == GOOD


def test_large_clips_are_encoded_in_pieces_with_the_same_latents(model, processed, monkeypatch):
    pixels = torch.randn(1, 3, 9, 32, 48).clamp(-1, 1)
    vae = ModelDirectory.open(model).load_vae(torch.float32)
    whole = encode._encode(vae, pixels, torch.device("cpu"))
    monkeypatch.setattr(encode, "_VALUES_PER_PASS", 1)
    torch.testing.assert_close(encode._encode(vae, pixels, torch.device("cpu")), whole, atol=1e-4, rtol=1e-4)


def test_videos_without_captions_or_readable_files_are_errors(videos, model, tmp_path):
    assert "has no captions" in encode_folder(model, videos, tmp_path / "out").err
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.mp4").write_text("no video")
    (tmp_path / "in/a.txt").write_text("a cat")
    result = encode_folder(model, tmp_path / "in", tmp_path / "out")
    assert result.code == 2 and "none of the 1 videos" in result.err and "a.mp4" in result.err


def test_causvids_latents_are_clips(tmp_path):
    """CausVid's scripts write {prompt: latents [1, F, C, h, w]}, one .pt file per clip."""
    latents = torch.randn(3, 2, 4, 3, 5).half()
    for index, clip in enumerate(latents):
        (tmp_path / "pt").mkdir(exist_ok=True)
        torch.save({f"clip {index}": clip[None].clone()}, tmp_path / f"pt/{index:08d}.pt")
    run = run_main(create_lmdb.main, "--data_path", tmp_path / "pt", "--lmdb_path", tmp_path / "lmdb")
    assert run.code == 0 and "3 clips" in run.out
    for folder in ("pt", "lmdb"):
        clips = open_clips(str(tmp_path / folder))
        assert clips.captions == ["clip 0", "clip 1", "clip 2"] and clips.shape == (2, 4, 3, 5)
        assert torch.equal(clips.read(range(3)), latents)
