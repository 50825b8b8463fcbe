"""utils/clips.py: videos of any size, rate and codec are read upright and in time."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from video_files import cut_off, grey_levels, moving_square, rotate_file, write_video

from utils import clips
from utils.clips import VideoReader, read_image, read_video, resize_and_crop
from utils.errors import UserError
from utils.video import VideoWriter


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def test_reading_can_stop_early_and_change_the_rate(out):
    with VideoWriter(out / "a.mp4", fps=16) as video:
        video.write(moving_square(32))
    frames, fps = read_video(out / "a.mp4", max_frames=5)
    assert fps == 16 and len(frames) == 5
    frames, fps = read_video(out / "a.mp4", fps=8)
    assert fps == 8 and len(frames) == 16


def test_frames_are_decoded_on_demand(out, monkeypatch):
    with VideoWriter(out / "a.mp4", fps=24) as video:
        video.write(moving_square(40))
    whole, _ = read_video(out / "a.mp4")
    decode, decoded = clips._decode, []

    def counting(*arguments):
        for frame in decode(*arguments):
            decoded.append(frame)
            yield frame

    monkeypatch.setattr(clips, "_decode", counting)
    with VideoReader(out / "a.mp4") as reader:
        assert (reader.fps, reader.height, reader.width) == (24, 64, 64)
        stream = iter(reader)
        first = [next(stream) for _ in range(3)]
    assert (np.stack(first) == whole[:3]).all() and len(decoded) < 10
    with VideoReader(out / "a.mp4", max_frames=2, fps=12) as reader:
        assert reader.fps == 12 and [frame.shape for frame in reader] == [(64, 64, 3)] * 2


def test_rotated_videos_are_read_upright(out):
    """Phones store the rotation in the track's header."""
    for degrees in (90, 180, 270):
        path = write_video(out / f"{degrees}.mp4", moving_square(3, 32, 48))
        plain, _ = read_video(path)
        rotate_file(path, degrees)
        turned, _ = read_video(path)
        expected = np.rot90(plain, -degrees // 90, axes=(1, 2))  # clockwise
        assert turned.shape == expected.shape and np.abs(turned.astype(int) - expected).mean() < 2


def test_pixels_become_square(out):
    """DV and DVD store 16:9 videos with wide pixels."""
    path = write_video(out / "wide.mkv", moving_square(3, 48, 36), pixel_aspect=Fraction(16, 9))
    frames, _ = read_video(path)
    assert frames.shape == (3, 48, 64, 3)
    red = frames[0, 18, :, 0] > 128  # the square takes the left quarter
    assert red[:15].all() and not red[17:].any()


def test_a_variable_frame_rate_is_resampled_by_timestamps(out):
    """Frames of uneven length: each is shown from the nearest frame of the new rate until the next one."""
    times, levels = [0, 0.05, 0.5, 0.52, 1.0, 1.5], [20, 60, 100, 140, 180, 220]
    path = write_video(out / "phone.mp4", grey_levels(levels), times=times)
    frames, fps = read_video(path, max_frames=25, fps=16)
    shown = [max(i for i, t in enumerate(times) if round(16 * t) <= n) for n in range(25)]
    assert fps == 16 and shown[:2] == [0, 1] and 2 not in shown  # .5 and .52 are nearest to the same frame
    np.testing.assert_allclose(frames[:, 8, 8, 0], [levels[i] for i in shown], atol=3)


def test_any_size_depth_rate_and_codec_is_read(out):
    cases = {
        "odd.mkv": ((33, 51), 16, {"codec": "ffv1", "pix_fmt": "bgr0"}),
        "deep.mp4": ((32, 48), 25, {"codec": "libx264", "pix_fmt": "yuv420p10le"}),
        "full.webm": ((32, 48), 60, {"codec": "libvpx-vp9", "pix_fmt": "yuv444p"}),
        "sound.mp4": ((32, 48), 30, {"audio": True}),
    }
    for name, (size, fps, options) in cases.items():
        path = write_video(out / name, grey_levels([200] * 5, *size), fps, **options)
        frames, read = read_video(path)
        assert frames.shape == (5, *size, 3) and read == pytest.approx(fps, abs=0.01), name
        assert np.abs(frames.astype(int) - 200).max() <= 3, name


def test_frames_are_resized_to_cover_a_size_on_demand(out):
    path = write_video(out / "a.mp4", moving_square(4, 64, 96))
    with VideoReader(path, size=(32, 32)) as reader:
        assert (reader.height, reader.width) == (64, 96)
        frames = np.stack(list(reader))
    np.testing.assert_array_equal(frames, resize_and_crop(read_video(path)[0], 32, 32))
    np.testing.assert_array_equal(frames, read_video(path, size=(32, 32))[0])


def test_a_file_of_sound_is_no_video(out):
    path = write_video(out / "sound.mp4", moving_square(1), video=False)
    with pytest.raises(UserError, match=r"sound\.mp4: it has no video stream"):
        read_video(path)


def test_a_cut_or_damaged_file_is_read_up_to_there_or_refused(out):
    noise = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), np.uint8)
    path = write_video(out / "a.mp4", noise, index_first=True)
    whole = path.read_bytes()
    assert len(read_video(path, strict=True)[0]) == 20
    cut_off(path, 0.6)
    assert 8 <= len(read_video(path)[0]) < 20
    assert len(read_video(path, max_frames=5, strict=True)[0]) == 5  # the cut lies behind
    with pytest.raises(UserError, match=r"a\.mp4: it is cut off after \d+ frames"):
        read_video(path, strict=True)
    zeros = bytes(2000)
    path.write_bytes(whole[: len(whole) // 2] + zeros + whole[len(whole) // 2 + len(zeros) :])
    assert len(read_video(path)[0]) > 8
    with pytest.raises(UserError, match=r"a\.mp4: it is damaged.* after \d+ frames"):
        read_video(path, strict=True)


def test_broken_videos_and_images_are_one_line(out):
    (out / "text.mp4").write_text("no video")
    (out / "empty.png").touch()
    (out / "text.png").write_text("no image")
    Image.new("RGB", (64, 64), "red").save(out / "whole.png")
    (out / "cut.png").write_bytes((out / "whole.png").read_bytes()[:60])
    with VideoWriter(out / "whole.mp4") as video:
        video.write(moving_square(20))
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


def test_resize_and_crop_covers_and_keeps_the_centre():
    frames = np.zeros((2, 30, 90, 3), np.uint8)
    frames[:, :, 30:60] = 255  # the middle third of a wide picture
    assert (resize_and_crop(frames, 30, 30) == 255).all()
    fitted = resize_and_crop(frames, 60, 120)
    assert fitted.shape == (2, 60, 120, 3)
    assert (fitted[:, :, 36:84] == 255).all() and (fitted[:, :, :24] == 0).all()
    assert resize_and_crop(frames[:0], 8, 8).shape == (0, 8, 8, 3)
