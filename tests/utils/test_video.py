"""utils/video.py: videos keep their frames, files appear only when complete, and errors are one line with the path."""

import contextlib
import errno
import os
import signal
import struct
import threading
import time
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from utils import video as video_module
from utils.errors import UserError
from utils.video import VideoReader, VideoWriter, fit, read_image, read_video, to_uint8

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 40), "blue": (30, 60, 220), "white": (255, 255, 255)}


def clip(
    num_frames: int, height: int = 64, width: int = 64, colour: tuple[int, int, int] = (30, 60, 220)
) -> np.ndarray:
    """Return frames of a red square that moves right by two pixels per frame."""
    frames = np.empty((num_frames, height, width, 3), np.uint8)
    frames[:] = colour
    for t in range(num_frames):
        left = 2 * t % (width // 2)
        frames[t, height // 4 : height // 2, left : left + width // 4] = (220, 30, 30)
    return frames


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
    frames = clip(37)
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
        video.write(clip(2, height, width))
    assert read_video(out / "a.mp4")[0].shape == (2, height, width, 3)


def test_odd_sizes_are_rejected_and_leave_no_file(out):
    with pytest.raises(UserError, match="even sides, not 65x64"), VideoWriter(out / "a.mp4") as video:
        video.write(clip(1, 64, 65))
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("fps", [8, 23.976, 60])
def test_frame_rates(out, fps):
    with VideoWriter(out / "a.mp4", fps) as video:
        video.write(clip(5))
    frames, read = read_video(out / "a.mp4")
    assert len(frames) == 5 and read == pytest.approx(fps, abs=0.01)
    with pytest.raises(UserError, match="choose fps"):
        VideoWriter(out / "b.mp4", 0)


def test_the_growing_file_is_playable_and_gets_its_name_at_the_end(out):
    path = out / "a.mp4"
    frames = clip(12 * 8)
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
    frames = clip(20)
    for name, step in (("a", 20), ("b", 3)):
        with VideoWriter(out / f"{name}.mp4") as video:
            for start in range(0, 20, step):
                video.write(frames[start : start + step])
    assert (out / "a.mp4").read_bytes() == (out / "b.mp4").read_bytes()


def test_the_finished_file_has_its_index_first_and_no_fragments(out):
    with VideoWriter(out / "a.mp4") as video:
        video.write(clip(40))
    content = (out / "a.mp4").read_bytes()
    assert 0 < content.index(b"moov") < content.index(b"mdat") and b"moof" not in content


@pytest.mark.parametrize("name", ["a: b.mp4", "100%d.mp4", "猫 🐱.mp4", "it's [x] 'y'.mp4", "猫" * 66 + ".mp4"])
def test_unusual_file_names(out, name):
    with VideoWriter(out / name) as video:
        video.write(clip(2))
    assert [p.name for p in out.iterdir()] == [name]
    assert len(read_video(out / name)[0]) == 2


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_deletes_the_file_and_stops_the_encoder(out, error):
    path = out / "a.mp4"
    path.write_bytes(b"older video")
    threads = threading.active_count()
    with pytest.raises(error), VideoWriter(path) as video:
        video.write(clip(20))
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
        video.write(clip(2))
        video.write(clip(2, 32, 32))
    assert list(out.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's device that is always full")
@pytest.mark.parametrize("frames", [1, 400], ids=["noticed at the end", "noticed while writing"])
def test_a_full_disk_is_one_oserror_that_names_the_video(out, frames):
    with pytest.raises(OSError, match="No space left") as caught, VideoWriter(out / "a.mp4") as video:
        video.partial.symlink_to("/dev/full")
        for _ in range(frames):
            video.write(clip(4))
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(out / "a.mp4")
    assert list(out.iterdir()) == []


def test_a_failing_encoder_is_one_line_that_names_the_video(out, monkeypatch):
    def fail(*_):
        raise av.error.ExternalError(542398533, "Generic error in an external library")

    monkeypatch.setattr(video_module._Encoder, "_encode", fail)
    failure = pytest.raises(UserError, match=r"a\.mp4: the encoder failed \(Generic error")
    with failure as caught, VideoWriter(out / "a.mp4") as video:
        video.write(clip(4))
    assert "\n" not in str(caught.value) and list(out.iterdir()) == []


def test_lost_frames_are_an_error(out, monkeypatch):
    """An encoder that silently loses frames must not leave a video that is too short."""
    encode = video_module._Encoder._encode
    monkeypatch.setattr(video_module._Encoder, "_encode", lambda self, frame: frame.pts < 3 and encode(self, frame))
    with pytest.raises(UserError, match="3 of its 9 frames"), VideoWriter(out / "a.mp4") as video:
        video.write(clip(9))
    assert list(out.iterdir()) == []


def test_a_missing_folder_is_a_clear_error(out):
    path = out / "no" / "a.mp4"
    with pytest.raises(UserError, match=r"no/a\.mp4.*No such file or directory"), VideoWriter(path) as video:
        video.write(clip(2))


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


# ---- Reading ----


def test_reading_can_stop_early_and_change_the_rate(out):
    with VideoWriter(out / "a.mp4", fps=16) as video:
        video.write(clip(32))
    frames, fps = read_video(out / "a.mp4", max_frames=5)
    assert fps == 16 and len(frames) == 5
    frames, fps = read_video(out / "a.mp4", fps=8)
    assert fps == 8 and len(frames) == 16


def test_frames_are_decoded_on_demand(out, monkeypatch):
    with VideoWriter(out / "a.mp4", fps=24) as video:
        video.write(clip(40))
    whole, _ = read_video(out / "a.mp4")
    decode, decoded = video_module._decode_frames, []

    def counting(*arguments):
        for frame in decode(*arguments):
            decoded.append(frame)
            yield frame

    monkeypatch.setattr(video_module, "_decode_frames", counting)
    with VideoReader(out / "a.mp4") as reader:
        assert (reader.fps, reader.height, reader.width) == (24, 64, 64)
        stream = iter(reader)
        first = [next(stream) for _ in range(3)]
    assert (np.stack(first) == whole[:3]).all() and len(decoded) < 10
    with VideoReader(out / "a.mp4", max_frames=2, fps=12) as reader:
        assert reader.fps == 12 and [frame.shape for frame in reader] == [(64, 64, 3)] * 2


def test_rotated_videos_are_read_upright(out):
    """Phones store the rotation in the track's header (tkhd)."""
    frames = clip(3, 32, 48)
    with VideoWriter(out / "a.mp4") as video:
        video.write(frames)
    plain, _ = read_video(out / "a.mp4")
    content = bytearray((out / "a.mp4").read_bytes())
    matrix = content.index(b"tkhd") + 44
    assert content[matrix : matrix + 4] == struct.pack(">i", 1 << 16)
    for degrees, (a, b, c, d) in {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}.items():
        turn = [value << 16 for value in (a, b, 0, c, d, 0, 0, 0)] + [1 << 30]
        content[matrix : matrix + 36] = struct.pack(">9i", *turn)
        (out / "turned.mp4").write_bytes(content)
        turned, _ = read_video(out / "turned.mp4")
        expected = np.rot90(plain, -degrees // 90, axes=(1, 2))  # clockwise
        assert turned.shape == expected.shape and np.abs(turned.astype(int) - expected).mean() < 2


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


def test_broken_videos_and_images_are_one_line(out):
    (out / "text.mp4").write_text("no video")
    (out / "empty.png").touch()
    (out / "text.png").write_text("no image")
    Image.new("RGB", (64, 64), "red").save(out / "whole.png")
    (out / "cut.png").write_bytes((out / "whole.png").read_bytes()[:60])
    with VideoWriter(out / "whole.mp4") as video:
        video.write(clip(20))
    (out / "cut.mp4").write_bytes((out / "whole.mp4").read_bytes()[:300])
    for name in ("missing.mp4", "text.mp4", "cut.mp4", "."):
        with pytest.raises(UserError, match="cannot read video") as caught:
            read_video(out / name)
        assert str(out / name) in str(caught.value) and "\n" not in str(caught.value)
    for name in ("missing.png", "empty.png", "text.png", "cut.png", "."):
        with pytest.raises(UserError, match="cannot read image") as caught:
            read_image(out / name)
        assert "\n" not in str(caught.value)


def test_read_image_is_upright_opaque_and_8_bit(out):
    image = Image.new("RGB", (20, 10), (200, 40, 40))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    image.save(out / "turned.png", exif=exif)
    assert read_image(out / "turned.png").shape == (20, 10, 3)

    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(out / "clear.png")
    assert (read_image(out / "clear.png") == 255).all()
    Image.new("LA", (4, 4), (100, 255)).save(out / "grey.png")
    assert (read_image(out / "grey.png") == 100).all()
    Image.fromarray(np.full((4, 4), 257 * 77, np.uint16)).save(out / "deep.png")
    assert (read_image(out / "deep.png") == 77).all()
    Image.new("RGB", (4, 4), (1, 2, 3)).quantize(4).save(out / "palette.png")
    assert (read_image(out / "palette.png") == (1, 2, 3)).all()
    Image.new("F", (4, 4), 0.5).save(out / "float.tiff")
    with pytest.raises(UserError, match="floats"):
        read_image(out / "float.tiff")


def test_fit_covers_and_keeps_the_centre():
    frames = np.zeros((2, 30, 90, 3), np.uint8)
    frames[:, :, 30:60] = 255  # the middle third of a wide picture
    assert (fit(frames, 30, 30) == 255).all()
    fitted = fit(frames, 60, 120)
    assert fitted.shape == (2, 60, 120, 3)
    assert (fitted[:, :, 36:84] == 255).all() and (fitted[:, :, :24] == 0).all()
    assert fit(frames[:0], 8, 8).shape == (0, 8, 8, 3)


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
