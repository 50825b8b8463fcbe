"""evaluation/side_by_side.py: position and content of the panels, and no files left after an error."""

from pathlib import Path

import numpy as np
import pytest

from evaluation.side_by_side import write_side_by_side
from utils.clips import VideoReader, read_video
from utils.errors import UserError
from utils.video import VideoWriter

RED, GREEN, BLUE = (220, 30, 30), (30, 180, 40), (30, 60, 220)
BARS = (238, 238, 238)


def save(path: Path, color, num_frames: int = 2, height: int = 64, width: int = 64, fps: float = 16) -> Path:
    """Write a video of one colour."""
    with VideoWriter(path, fps, preset="ultrafast") as video:
        video.write(np.full((num_frames, height, width, 3), color, np.uint8))
    return path


def box(frame: np.ndarray, color) -> tuple[int, int, int, int] | None:
    """Return top, left, height and width of the area of a colour, which must be a filled box; None without any."""
    near = (np.abs(frame.astype(int) - color) < 12).all(axis=2)
    rows, columns = np.flatnonzero(near.mean(axis=1) > 0.05), np.flatnonzero(near.mean(axis=0) > 0.05)
    if not len(rows):
        return None
    top, left, height, width = rows[0], columns[0], np.ptp(rows) + 1, np.ptp(columns) + 1
    assert near[top : top + height, left : left + width].mean() > 0.9
    return int(top), int(left), int(height), int(width)


def about(value: int):
    return pytest.approx(value, abs=4)  # video chroma has half the resolution, so edges are off by a pixel or two


def test_panels_are_side_by_side_and_enlarged_until_text_is_legible(tmp_path):
    videos = [("a", save(tmp_path / "a.mp4", RED)), ("b", save(tmp_path / "b.mp4", BLUE))]
    write_side_by_side(tmp_path / "both.mp4", videos, "a prompt")
    frames, fps = read_video(tmp_path / "both.mp4")
    assert fps == 16 and len(frames) == 2 and frames.shape[1] % 2 == frames.shape[2] % 2 == 0
    red, blue = box(frames[0], RED), box(frames[0], BLUE)
    assert red[2:] == (about(256), about(256)) and blue[2:] == (about(256), about(256))
    assert red[0] == about(blue[0]) and blue[1] - red[1] == about(256 + 8)
    ink = frames[0].max(axis=2) < 100
    assert ink[: red[0] - 2, : blue[1]].any() and ink[: red[0] - 2, blue[1] :].any()  # a label above each
    assert ink[red[0] + 260 :].any()  # and the prompt below


def test_columns_and_scale_can_be_set(tmp_path):
    videos = [(name, save(tmp_path / f"{name}.mp4", c)) for name, c in (("a", RED), ("b", GREEN), ("c", BLUE))]
    write_side_by_side(tmp_path / "grid.mp4", videos, columns=2, scale=2)
    [frame, _], _ = read_video(tmp_path / "grid.mp4")
    red, green, blue = (box(frame, color) for color in (RED, GREEN, BLUE))
    assert [panel[2:] for panel in (red, green, blue)] == [(about(128), about(128))] * 3
    assert red[0] == about(green[0]) and red[1] == about(blue[1])
    assert blue[0] - red[0] > 128 and green[1] - red[1] == about(128 + 8)


def test_large_videos_keep_their_size(tmp_path):
    videos = [(name, save(tmp_path / f"{name}.mp4", color, 1, 258, 130)) for name, color in (("a", RED), ("b", BLUE))]
    write_side_by_side(tmp_path / "both.mp4", videos)
    [frame], _ = read_video(tmp_path / "both.mp4")
    assert box(frame, RED)[2:] == (about(258), about(130))


def test_videos_of_other_shapes_get_equal_heights_without_stretching(tmp_path):
    videos = [
        ("wide", save(tmp_path / "a.mp4", RED, 1, 64, 128)),
        ("narrow", save(tmp_path / "b.mp4", BLUE, 1, 32, 16)),
        ("odd factor", save(tmp_path / "c.mp4", GREEN, 1, 48, 48)),
    ]
    write_side_by_side(tmp_path / "all.mp4", videos)
    [frame], _ = read_video(tmp_path / "all.mp4")
    assert box(frame, RED)[2:] == (about(128), about(256))
    top, left, height, width = box(frame, BLUE)
    assert (height, width) == (about(128), about(64))
    bars = frame[top + 5 : top + 120, left - 90 : left - 5], frame[top + 5 : top + 120, left + 70 : left + 155]
    assert all(np.abs(bar.astype(int) - BARS).max() < 12 for bar in bars)
    assert box(frame, GREEN)[2:] == (about(128), about(128))


def test_an_ended_video_stays_darkened(tmp_path):
    videos = [("short", save(tmp_path / "a.mp4", RED, 3)), ("long", save(tmp_path / "b.mp4", BLUE, 6))]
    write_side_by_side(tmp_path / "both.mp4", videos)
    frames, _ = read_video(tmp_path / "both.mp4")
    assert len(frames) == 6 and all(box(frame, BLUE) for frame in frames)
    assert [box(frame, RED) is not None for frame in frames] == [True] * 3 + [False] * 3
    left = frames[5][40:100, 20:100]
    assert left.max() < 100 and left[..., 0].mean() > 3 * left[..., 1].mean()  # dark red


def test_frame_rates_are_converted_to_the_highest_or_the_requested_one(tmp_path):
    levels = np.arange(8, dtype=np.uint8) * 30
    with VideoWriter(tmp_path / "slow.mp4", 8) as video:
        video.write(np.broadcast_to(levels[:, None, None, None], (8, 64, 64, 3)))
    videos = [("slow", tmp_path / "slow.mp4"), ("fast", save(tmp_path / "fast.mp4", BLUE, 16))]
    write_side_by_side(tmp_path / "both.mp4", videos)
    frames, fps = read_video(tmp_path / "both.mp4")
    assert fps == 16 and len(frames) == 16
    assert np.abs(frames[:, 60:200, 60:200].mean(axis=(1, 2, 3)) - np.repeat(levels, 2)).max() < 4
    write_side_by_side(tmp_path / "slower.mp4", videos, fps=8)
    frames, fps = read_video(tmp_path / "slower.mp4")
    assert fps == 8 and len(frames) == 8
    assert np.abs(frames[:, 60:200, 60:200].mean(axis=(1, 2, 3)) - levels).max() < 4


def test_the_timestamp_is_shown_on_request(tmp_path):
    videos = [("a", save(tmp_path / "a.mp4", RED, 32))]
    write_side_by_side(tmp_path / "without.mp4", videos, "prompt")
    write_side_by_side(tmp_path / "with.mp4", videos, "prompt", timestamp=True)
    without, _ = read_video(tmp_path / "without.mp4")
    with_time, _ = read_video(tmp_path / "with.mp4")
    footer = (slice(None), slice(-40, None), slice(140, None))
    assert with_time.shape == without.shape
    assert (without[footer].min(axis=(1, 2, 3)) > 200).all() and (with_time[footer].min(axis=(1, 2, 3)) < 160).all()
    assert np.abs(with_time[footer][0].astype(int) - with_time[footer][-1]).max() > 80


def test_long_labels_and_captions_are_truncated(tmp_path):
    video = save(tmp_path / "a.mp4", RED, 1)
    write_side_by_side(tmp_path / "one.mp4", [("a", video)], "word")
    write_side_by_side(tmp_path / "many.mp4", [("label " * 100, video)], "word " * 500)
    [one], [many] = read_video(tmp_path / "one.mp4")[0], read_video(tmp_path / "many.mp4")[0]
    assert one.shape[1] == many.shape[1] and box(one, RED) == tuple(map(about, box(many, RED)))
    assert 30 < many.shape[0] - one.shape[0] < 60  # two more lines


def test_videos_are_streamed(tmp_path, monkeypatch):
    videos = [(name, save(tmp_path / f"{name}.mp4", RED, 20)) for name in "ab"]
    read, written, ahead = 0, 0, []
    frames_of, write = VideoReader.__iter__, VideoWriter.write

    def counting_read(self):
        nonlocal read
        for frame in frames_of(self):
            read += 1
            yield frame

    def counting_write(self, frames):
        nonlocal written
        written += len(frames)
        ahead.append(read - 2 * written)
        write(self, frames)

    monkeypatch.setattr(VideoReader, "__iter__", counting_read)
    monkeypatch.setattr(VideoWriter, "write", counting_write)
    write_side_by_side(tmp_path / "both.mp4", videos)
    assert written == 20 and max(ahead) <= 6  # three per video: the decoder and the rate filter hold some back


def test_an_error_leaves_no_file(tmp_path):
    good = save(tmp_path / "a.mp4", RED)
    (tmp_path / "b.mp4").write_text("no video")
    for bad in (tmp_path / "b.mp4", tmp_path / "none.mp4"):
        with pytest.raises(UserError, match=f"cannot read video {bad}"):
            write_side_by_side(tmp_path / "both.mp4", [("a", good), ("b", bad)])
    for options in ({"columns": -1}, {"scale": -1}):
        with pytest.raises(ValueError, match=">= 1"):
            write_side_by_side(tmp_path / "both.mp4", [("a", good)], **options)
    with pytest.raises(ValueError, match="needs videos"):
        write_side_by_side(tmp_path / "both.mp4", [])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "b.mp4"]
