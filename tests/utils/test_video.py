import contextlib
import errno
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image

from utils.errors import UserError
from utils.video import VideoReader, VideoWriter, fit, read_image, read_video, to_uint8

ROOT = Path(__file__).resolve().parents[2]
COLOURS = {"red": (220, 30, 30), "green": (30, 180, 40), "blue": (30, 60, 220), "white": (255, 255, 255)}


def clip(
    num_frames: int, height: int = 64, width: int = 64, colour: tuple[int, int, int] = (30, 60, 220)
) -> np.ndarray:
    """A red square that moves right by two pixels a frame."""
    frames = np.empty((num_frames, height, width, 3), np.uint8)
    frames[:] = colour
    for t in range(num_frames):
        left = 2 * t % (width // 2)
        frames[t, height // 4 : height // 2, left : left + width // 4] = (220, 30, 30)
    return frames


def fake_ffmpeg(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    executable = folder / "ffmpeg"
    executable.write_text("#!/bin/sh\n" + script.format(ffmpeg=imageio_ffmpeg.get_ffmpeg_exe()))
    executable.chmod(executable.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", lambda: str(executable))


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


@pytest.mark.parametrize("colour", COLOURS.values(), ids=COLOURS.keys())
def test_colours_survive_in_any_player_that_reads_bt709(out, colour):
    with VideoWriter(out / "a.mp4") as video:
        video.write(np.full((4, 32, 48, 3), colour, np.uint8))
    decoded, _ = read_video(out / "a.mp4")
    assert np.abs(decoded.astype(int) - colour).max() <= 4


def test_float_tensors_are_clamped_and_scaled(out):
    levels = torch.tensor([-3.0, -1.0, 0.0, 1.0, 2.0, float("nan")])
    frames = levels[:, None, None, None].expand(6, 3, 16, 32)
    assert to_uint8(frames)[:, 0, 0, 0].tolist() == [0, 0, 128, 255, 255, 0]
    assert to_uint8(frames.bfloat16()).shape == (6, 16, 32, 3)
    with VideoWriter(out / "a.mp4") as video:
        video.write(frames)
    assert read_video(out / "a.mp4")[0].shape == (6, 16, 32, 3)


@pytest.mark.parametrize("shape", [(1, 3, 4), (2, 4, 4, 4), (2, 8, 8, 3)])
def test_frames_of_another_layout_are_refused(shape):
    with pytest.raises(ValueError, match="must be"):
        to_uint8(torch.zeros(shape))
    with pytest.raises(ValueError, match="must be uint8"):
        to_uint8(np.zeros(shape, np.float32))


@pytest.mark.parametrize(("height", "width"), [(2, 2), (18, 34), (130, 6), (480, 832)])
def test_unusual_even_sizes_are_kept(out, height, width):
    with VideoWriter(out / "a.mp4") as video:
        video.write(clip(2, height, width))
    assert read_video(out / "a.mp4")[0].shape == (2, height, width, 3)


def test_odd_sizes_are_refused_and_leave_nothing(out):
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


def test_frames_are_on_disk_while_the_video_is_written_and_the_name_appears_at_the_end(out):
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


def test_same_frames_give_the_same_bytes_however_they_are_split(out):
    frames = clip(20)
    for name, step in (("a", 20), ("b", 3)):
        with VideoWriter(out / f"{name}.mp4") as video:
            for start in range(0, 20, step):
                video.write(frames[start : start + step])
    assert (out / "a.mp4").read_bytes() == (out / "b.mp4").read_bytes()


def test_the_index_comes_first_and_nothing_is_fragmented(out):
    with VideoWriter(out / "a.mp4") as video:
        video.write(clip(40))
    content = (out / "a.mp4").read_bytes()
    assert 0 < content.index(b"moov") < content.index(b"mdat") and b"moof" not in content


@pytest.mark.parametrize("name", ["a: b.mp4", "100%d.mp4", "猫 🐱.mp4", "it's [x] 'y'.mp4", "猫" * 66 + ".mp4"])
def test_file_names_that_ffmpeg_could_misread(out, name):
    with VideoWriter(out / name) as video:
        video.write(clip(2))
    assert [p.name for p in out.iterdir()] == [name]
    assert len(read_video(out / name)[0]) == 2


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_removes_the_file_and_ends_ffmpeg(out, error):
    path = out / "a.mp4"
    path.write_bytes(b"older video")
    with pytest.raises(error), VideoWriter(path) as video:
        video.write(clip(20))
        process = video._ffmpeg._process
        raise error
    assert process.returncode is not None
    assert [p.name for p in out.iterdir()] == ["a.mp4"] and path.read_bytes() == b"older video"


def test_no_frames_and_changing_sizes_are_errors(out):
    with pytest.raises(ValueError, match="no frames"), VideoWriter(out / "a.mp4") as video:
        video.write(np.empty((0, 64, 64, 3), np.uint8))
    with pytest.raises(ValueError, match="after frames of"), VideoWriter(out / "a.mp4") as video:
        video.write(clip(2))
        video.write(clip(2, 32, 32))
    assert list(out.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's always full device")
@pytest.mark.parametrize("frames", [1, 400], ids=["noticed at the end", "noticed while writing"])
def test_a_full_disk_is_one_oserror_that_names_the_video(out, tmp_path, monkeypatch, frames):
    """An ffmpeg whose output file is the device that is always full."""
    to_full = 'for last; do :; done; file="${{last#file:}}"; rm -f "$file"; ln -s /dev/full "$file"\n'
    fake_ffmpeg(tmp_path, monkeypatch, to_full + 'exec "{ffmpeg}" "$@"\n')
    with pytest.raises(OSError, match="No space left") as caught, VideoWriter(out / "a.mp4") as video:
        for _ in range(frames):
            video.write(clip(4))
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(out / "a.mp4")
    assert list(out.iterdir()) == []


@pytest.mark.parametrize(
    ("script", "reason"),
    [("echo 'Unknown encoder libx264' >&2; exit 1", "Unknown encoder libx264"), ("kill -9 $$", "exit code -9")],
)
def test_a_dying_ffmpeg_is_one_line_that_names_the_video(out, tmp_path, monkeypatch, script, reason):
    fake_ffmpeg(tmp_path, monkeypatch, script)
    with pytest.raises(UserError, match=rf"a\.mp4: ffmpeg stopped \({reason}\)"), VideoWriter(out / "a.mp4") as video:
        for _ in range(50):
            video.write(clip(4))
    assert list(out.iterdir()) == []


def test_frames_lost_on_the_way_are_noticed(out, tmp_path, monkeypatch):
    """An encoder that loses frames and says that all is well must not leave a short video."""
    three = 3 * 64 * 64 * 3  # bytes of three frames
    losing = f'head -c {three} | "{{ffmpeg}}" "$@"; cat >/dev/null'
    fake_ffmpeg(tmp_path, monkeypatch, f'case "$*" in *rawvideo*) {losing};; *) exec "{{ffmpeg}}" "$@";; esac\n')
    with pytest.raises(UserError, match="3 of its 9 frames"), VideoWriter(out / "a.mp4") as video:
        video.write(clip(9))
    assert list(out.iterdir()) == []


def test_a_missing_folder_or_ffmpeg_is_a_clear_error(out, monkeypatch):
    with pytest.raises(UserError, match="No such file or directory"), VideoWriter(out / "no" / "a.mp4") as video:
        video.write(clip(2))

    def missing() -> str:
        raise RuntimeError("No ffmpeg exe could be found")

    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", missing)
    with pytest.raises(UserError, match="pip install imageio-ffmpeg"), VideoWriter(out / "a.mp4") as video:
        video.write(clip(2))
    assert list(out.iterdir()) == []


SCRIPT = """
import sys, time
import numpy as np
from utils.video import VideoWriter

with VideoWriter(sys.argv[1]) as video:
    while True:
        video.write(np.zeros((16, 32, 32, 3), np.uint8))
        print(video._ffmpeg._process.pid, flush=True)
        time.sleep(0.01)
"""


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_ctrl_c_leaves_nothing_and_a_kill_leaves_a_playable_part(out, sent):
    """The signal goes to the whole process group, as a terminal sends it."""
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(out / "a.mp4")],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        text=True,
    )
    assert process.stdout is not None
    for _ in range(8):
        ffmpeg = int(process.stdout.readline())
    os.killpg(process.pid, sent)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert wait_for(lambda: not _runs(ffmpeg))
    left = list(out.iterdir())
    if sent == signal.SIGINT:
        assert left == []
    else:
        assert len(left) == 1 and left[0].name.startswith(".") and len(read_video(left[0])[0]) >= 16


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat")
        return not (state.exists() and state.read_text().split()[2] == "Z")  # a zombie has ended
    except ProcessLookupError:
        return False


# ---- Reading ----


def test_read_video_can_stop_early_and_change_the_rate(out):
    with VideoWriter(out / "a.mp4", fps=16) as video:
        video.write(clip(32))
    frames, fps = read_video(out / "a.mp4", max_frames=5)
    assert fps == 16 and len(frames) == 5
    frames, fps = read_video(out / "a.mp4", fps=8)
    assert fps == 8 and len(frames) == 16


def test_frames_are_read_as_they_are_asked_for(out):
    frames = clip(40)
    with VideoWriter(out / "a.mp4", fps=24) as video:
        video.write(frames)
    whole, _ = read_video(out / "a.mp4")
    with VideoReader(out / "a.mp4") as reader:
        assert (reader.fps, reader.height, reader.width) == (24, 64, 64)
        stream = iter(reader)
        first = [next(stream) for _ in range(3)]
        process = reader._process
    assert process.poll() is not None  # though most of the video was not read
    assert (np.stack(first) == whole[:3]).all()
    with VideoReader(out / "a.mp4", max_frames=2, fps=12) as reader:
        assert reader.fps == 12 and [frame.shape for frame in reader] == [(64, 64, 3)] * 2


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
    exif[0x0112] = 6  # to be turned by 90 degrees
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
