"""utils/video.py: videos keep their frames, files appear only when complete, and errors are one line with the path."""

import contextlib
import errno
import os
import signal
import threading
import time
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from video_files import moving_square

from utils import video as video_module
from utils.clips import read_video
from utils.errors import UserError
from utils.video import VideoWriter, to_uint8

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 40), "blue": (30, 60, 220), "white": (255, 255, 255)}


def wait_for(condition, seconds: float = 30) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


# ---- Writing ----


def test_round_trip_keeps_frame_count_rate_motion_and_colours(out):
    frames = moving_square(37)
    with VideoWriter(out / "a.mp4", fps=16) as video:
        for start in range(0, 37, 12):
            video.write(frames[start : start + 12])
    assert video.num_frames == 37
    decoded, fps = read_video(out / "a.mp4")
    assert fps == 16 and decoded.shape == frames.shape
    error = np.abs(decoded.astype(int) - frames)
    assert error.mean() < 3  # chroma is halved, so edges are off
    assert np.abs(decoded[:, 40:, :].astype(int) - frames[:, 40:, :]).max() <= 6  # away from edges it is not
    shifted = np.abs(np.roll(decoded, 1, axis=0).astype(int) - frames)[1:]
    assert error[1:].mean() < shifted.mean() / 2  # each frame at its own time


def test_colours_survive_and_are_tagged_bt709(out):
    for name, colour in COLOURS.items():
        with VideoWriter(out / f"{name}.mp4") as video:
            video.write(np.full((4, 32, 48, 3), colour, np.uint8))
        decoded, _ = read_video(out / f"{name}.mp4")
        assert np.abs(decoded.astype(int) - colour).max() <= 4
    with av.open(str(out / "red.mp4")) as container:
        codec = container.streams.video[0].codec_context
        assert (codec.name, codec.pix_fmt, codec.has_b_frames) == ("h264", "yuv420p", True)
        assert next(container.demux(video=0)).pts == 0
        # 1 is BT.709 for matrix, primaries and transfer, and limited range.
        assert (codec.colorspace, codec.color_primaries, codec.color_trc, codec.color_range) == (1, 1, 1, 1)


def test_float_tensors_are_clamped_and_scaled(out):
    levels = torch.tensor([-3.0, -1.0, 0.0, 1.0, 2.0, float("nan")])
    frames = levels[:, None, None, None].expand(6, 3, 16, 32)
    assert to_uint8(frames)[:, 0, 0, 0].tolist() == [0, 0, 128, 255, 255, 0]
    assert to_uint8(frames.bfloat16()).shape == (6, 16, 32, 3)
    with VideoWriter(out / "a.mp4") as video:
        video.write(frames)
    assert read_video(out / "a.mp4")[0].shape == (6, 16, 32, 3)


@pytest.mark.parametrize("shape", [(1, 3, 4), (2, 4, 4, 4), (2, 8, 8, 3)])
def test_other_types_and_shapes_are_rejected(shape):
    with pytest.raises(ValueError, match="must be"):
        to_uint8(torch.zeros(shape))
    with pytest.raises(ValueError, match="must be uint8"):
        to_uint8(np.zeros(shape, np.float32))


@pytest.mark.parametrize(("height", "width"), [(2, 2), (18, 34), (130, 6), (480, 832)])
def test_unusual_even_sizes_are_kept(out, height, width):
    with VideoWriter(out / "a.mp4") as video:
        video.write(moving_square(2, height, width))
    assert read_video(out / "a.mp4")[0].shape == (2, height, width, 3)


def test_odd_sizes_are_rejected_and_leave_no_file(out):
    with pytest.raises(UserError, match="even sides, not 65x64"), VideoWriter(out / "a.mp4") as video:
        video.write(moving_square(1, 64, 65))
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("fps", [8, 23.976, 60])
def test_frame_rates(out, fps):
    with VideoWriter(out / "a.mp4", fps) as video:
        video.write(moving_square(5))
    frames, read = read_video(out / "a.mp4")
    assert len(frames) == 5 and read == pytest.approx(fps, abs=0.01)
    with pytest.raises(UserError, match="choose fps"):
        VideoWriter(out / "b.mp4", 0)


def test_the_growing_file_is_playable_and_gets_its_name_at_the_end(out):
    path = out / "a.mp4"
    frames = moving_square(12 * 8)
    with VideoWriter(path, fps=16) as video:
        for start in range(0, len(frames), 12):
            video.write(frames[start : start + 12])
        assert video.partial is not None and video.partial.parent == out
        assert wait_for(lambda: video.partial.stat().st_size > 1000 and len(read_video(video.partial)[0]) >= 48)
        decoded, _ = read_video(video.partial)
        assert np.abs(decoded.astype(int) - frames[: len(decoded)]).mean() < 3
        assert not path.exists()
    assert [p.name for p in out.iterdir()] == ["a.mp4"]
    assert len(read_video(path)[0]) == len(frames)


def test_the_bytes_depend_only_on_the_frames(out):
    frames = moving_square(20)
    for name, step in (("a", 20), ("b", 3)):
        with VideoWriter(out / f"{name}.mp4") as video:
            for start in range(0, 20, step):
                video.write(frames[start : start + step])
    assert (out / "a.mp4").read_bytes() == (out / "b.mp4").read_bytes()


def test_the_finished_file_has_its_index_first_and_no_fragments(out):
    with VideoWriter(out / "a.mp4") as video:
        video.write(moving_square(40))
    content = (out / "a.mp4").read_bytes()
    assert 0 < content.index(b"moov") < content.index(b"mdat") and b"moof" not in content


@pytest.mark.parametrize("name", ["a: b.mp4", "100%d.mp4", "猫 🐱.mp4", "it's [x] 'y'.mp4", "猫" * 66 + ".mp4"])
def test_unusual_file_names(out, name):
    with VideoWriter(out / name) as video:
        video.write(moving_square(2))
    assert [p.name for p in out.iterdir()] == [name]
    assert len(read_video(out / name)[0]) == 2


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_deletes_the_file_and_stops_the_encoder(out, error):
    path = out / "a.mp4"
    path.write_bytes(b"older video")
    threads = threading.active_count()
    with pytest.raises(error), VideoWriter(path) as video:
        video.write(moving_square(20))
        if error is KeyboardInterrupt:
            os.kill(os.getpid(), signal.SIGINT)  # as Ctrl-C
            time.sleep(10)
        raise error
    assert threading.active_count() == threads
    assert [p.name for p in out.iterdir()] == ["a.mp4"] and path.read_bytes() == b"older video"


def test_no_frames_and_changing_sizes_are_errors(out):
    with pytest.raises(ValueError, match="no frames"), VideoWriter(out / "a.mp4") as video:
        video.write(np.empty((0, 64, 64, 3), np.uint8))
    with pytest.raises(ValueError, match="after frames of"), VideoWriter(out / "a.mp4") as video:
        video.write(moving_square(2))
        video.write(moving_square(2, 32, 32))
    assert list(out.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's device that is always full")
@pytest.mark.parametrize("frames", [1, 400], ids=["noticed at the end", "noticed while writing"])
def test_a_full_disk_is_one_oserror_that_names_the_video(out, frames):
    with pytest.raises(OSError, match="No space left") as caught, VideoWriter(out / "a.mp4") as video:
        video.partial.symlink_to("/dev/full")
        for _ in range(frames):
            video.write(moving_square(4))
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(out / "a.mp4")
    assert list(out.iterdir()) == []


def test_a_failing_encoder_is_one_line_that_names_the_video(out, monkeypatch):
    def fail(*_):
        raise av.error.ExternalError(542398533, "Generic error in an external library")

    monkeypatch.setattr(video_module._Encoder, "_encode", fail)
    failure = pytest.raises(UserError, match=r"a\.mp4: the encoder failed \(Generic error")
    with failure as caught, VideoWriter(out / "a.mp4") as video:
        video.write(moving_square(4))
    assert "\n" not in str(caught.value) and list(out.iterdir()) == []


def test_lost_frames_are_an_error(out, monkeypatch):
    """An encoder that silently loses frames must not leave a video that is too short."""
    encode = video_module._Encoder._encode
    monkeypatch.setattr(video_module._Encoder, "_encode", lambda self, frame: frame.pts < 3 and encode(self, frame))
    with pytest.raises(UserError, match="3 of its 9 frames"), VideoWriter(out / "a.mp4") as video:
        video.write(moving_square(9))
    assert list(out.iterdir()) == []


def test_a_missing_folder_is_a_clear_error(out):
    path = out / "no" / "a.mp4"
    with pytest.raises(UserError, match=r"no/a\.mp4.*No such file or directory"), VideoWriter(path) as video:
        video.write(moving_square(2))


def test_a_killed_process_leaves_a_playable_partial_file(out):
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException), VideoWriter(out / "a.mp4") as video:
            while True:
                video.write(np.zeros((16, 32, 32, 3), np.uint8))
                time.sleep(0.001)
        os._exit(1)
    try:
        assert wait_for(lambda: any(file.stat().st_size > 20_000 for file in out.iterdir()))
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    [left] = out.iterdir()
    assert left.name.startswith(".") and len(read_video(left)[0]) >= 16


def test_a_truncated_file_is_read_up_to_the_cut(out):
    noise = np.random.default_rng(0).integers(0, 256, (64, 32, 32, 3), np.uint8)
    with VideoWriter(out / "a.mp4") as video:
        video.write(noise)
        assert wait_for(lambda: video.partial.stat().st_size > 20_000)
        content = video.partial.read_bytes()
    (out / "cut.mp4").write_bytes(content[:-100])
    frames, _ = read_video(out / "cut.mp4")
    assert 16 <= len(frames) <= 64
    np.testing.assert_array_equal(frames[:16], read_video(out / "a.mp4")[0][:16])


def test_an_unfinished_video_can_be_kept_and_plays(tmp_path):
    frames = np.arange(20 * 16 * 16 * 3, dtype=np.uint32).astype(np.uint8).reshape(20, 16, 16, 3)
    writer = VideoWriter(tmp_path / "a.mp4")
    with contextlib.suppress(RuntimeError), writer as video:
        assert video.keep_unfinished(tmp_path / "none.mp4") is None  # no frame yet
        video.write(frames)
        assert video.keep_unfinished(tmp_path / "kept.mp4") == tmp_path / "kept.mp4"
        raise RuntimeError("the run has failed")
    assert [path.name for path in tmp_path.iterdir()] == ["kept.mp4"]
    assert len(read_video(tmp_path / "kept.mp4")[0]) == 20
