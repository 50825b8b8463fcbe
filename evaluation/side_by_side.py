"""Combine several videos into one: labelled panels side by side, with a caption below.

Frames are streamed, so memory does not grow with the videos' length. Frames are uint8 RGB arrays [H, W, 3].
"""

import contextlib
import itertools
import math
import os
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from utils.clips import VideoReader
from utils.contact_sheet import format_time, wrap_text
from utils.video import VideoWriter

_MAX_COLUMNS = 4
_LEGIBLE = 256  # pixels; a panel of this size has room for its label
_MARGIN, _GAP = 12, 8  # pixels
_FONT_MIN, _FONT_MAX = 13, 28  # pixels
_LABEL_LINES, _CAPTION_LINES = 1, 3
_BARS = (238, 238, 238)  # colour of the bars around a narrower video
_DIMMED = 0.35  # brightness of a video that has ended


def write_side_by_side(
    path: str | os.PathLike[str],
    videos: Sequence[tuple[str, str | os.PathLike[str]]],
    caption: str = "",
    columns: int | None = None,
    scale: int | None = None,
    fps: float | None = None,
    *,
    timestamp: bool = False,
    max_frames: int | None = None,
    crf: int = 17,
) -> None:
    """Write one video with a panel for each of several videos, atomically.

    All panels have the height of the tallest video times `scale`. Narrower videos get grey bars; nothing is stretched.
    A video that has ended shows its last frame, darkened and marked, until the longest video ends.

    Args:
        path: the mp4 file to write; its folder must exist.
        videos: (label, file) of every panel.
        caption: text below the panels, truncated after three lines.
        columns: panels per row; default: one row of up to four.
        scale: panel pixels per pixel of the tallest video; integers enlarge without smoothing. Default: the
            smallest factor with legible labels, which is 1 for videos of 256 pixels or more.
        fps: frames per second; default: the highest rate. Frames of other videos are repeated or dropped.
        timestamp: show the time at the lower right.
        max_frames: stop every video after this number of its frames.
        crf: x264's quality, see `VideoWriter`.

    Raises:
        OSError: if the disk is full or not writable.
        UserError: if a video cannot be read.
        ValueError: if there are no videos, or `columns` or `scale` is below 1.
    """
    if not videos or min(columns or 1, scale or 1) < 1:
        raise ValueError(f"side by side needs videos, columns >= 1 and scale >= 1, not {videos}, {columns}, {scale}")
    sizes, rates = [], []
    for _, file in videos:
        with VideoReader(file) as video:
            sizes.append((video.height, video.width))
            rates.append(video.fps)
    fps = fps or max(rates)
    board = _Board([label for label, _ in videos], sizes, caption, columns, scale, timestamp)
    with contextlib.ExitStack() as files:
        readers = [
            files.enter_context(VideoReader(file, max_frames, None if rate == fps else fps))
            for (_, file), rate in zip(videos, rates, strict=True)
        ]
        # At x264's default effort, labels and enlarged pixels take three times as long and save no bytes.
        output = files.enter_context(VideoWriter(path, fps, crf=crf, preset="veryfast"))
        for frame in board.frames(readers, fps):
            output.write(frame[None])


class _Board:
    """The picture shared by all frames. Labels are drawn once; each frame replaces only the panels and the time."""

    def __init__(
        self,
        labels: Sequence[str],
        sizes: Sequence[tuple[int, int]],
        caption: str,
        columns: int | None,
        scale: int | None,
        timestamp: bool,
    ) -> None:
        tallest = max(height for height, _ in sizes)
        scale = scale or math.ceil(_LEGIBLE / max(max(size) for size in sizes))
        self._height = tallest * scale
        self._width = max(round(width * self._height / height) for height, width in sizes)
        font_size = min(_FONT_MAX, max(_FONT_MIN, self._width // 16))
        self._font = ImageFont.load_default(font_size)
        columns = min(len(labels), columns or _MAX_COLUMNS)
        rows = -(-len(labels) // columns)
        line = int(font_size * 1.35)  # between the tops of two lines
        row_height = line + self._height + _GAP

        inner = columns * (self._width + _GAP) - _GAP
        time_width = int(self._font.getlength("00:00:00")) if timestamp else 0
        lines = wrap_text(caption, max(1, inner - time_width), self._font.getlength, _CAPTION_LINES)
        width = inner + 2 * _MARGIN
        height = _MARGIN + rows * row_height + max(len(lines), int(timestamp)) * line + _MARGIN
        # H.264 requires even sides.
        self._board = Image.new("RGB", (width + width % 2, height + height % 2), "white")
        self._draw = ImageDraw.Draw(self._board)
        self._corners = []
        for number, label in enumerate(labels):
            left = _MARGIN + number % columns * (self._width + _GAP)
            top = _MARGIN + number // columns * row_height
            for text in wrap_text(label, self._width, self._font.getlength, _LABEL_LINES):
                self._draw.text((left, top), text, fill="black", font=self._font)
            self._corners.append((left, top + line))
        for number, text in enumerate(lines):
            self._draw.text((_MARGIN, _MARGIN + rows * row_height + number * line), text, fill="black", font=self._font)
        time_left, time_top = _MARGIN + inner - time_width, _MARGIN + rows * row_height
        self._time_box = (time_left, time_top, time_left + time_width, time_top + line) if timestamp else None

    def frames(self, videos: Sequence[Iterable[np.ndarray]], fps: float) -> Iterator[np.ndarray]:
        """Yield the frames of the combined video, uint8 [H, W, 3], until the longest video ends."""
        streams = [iter(video) for video in videos]
        running = [True] * len(streams)
        for count in itertools.count():
            for number, stream in enumerate(streams):
                frame = next(stream, None)
                if frame is not None:
                    self._show(number, frame)
                elif running[number]:
                    running[number] = False
                    self._end(number)
            if not any(running):
                return
            yield self._picture(count / fps)

    def _show(self, number: int, frame: np.ndarray) -> None:
        """Draw a frame into a panel."""
        self._board.paste(self._fit(Image.fromarray(frame)), self._corners[number])

    def _end(self, number: int) -> None:
        """Darken a panel's last frame and mark it as ended."""
        left, top = self._corners[number]
        box = (left, top, left + self._width, top + self._height)
        self._board.paste(self._board.crop(box).point([round(_DIMMED * value) for value in range(256)] * 3), box)
        centre = (left + self._width // 2, top + self._height // 2)
        self._draw.text(centre, "ended", fill="white", font=self._font, anchor="mm")

    def _picture(self, seconds: float) -> np.ndarray:
        """Return the current picture, uint8 [H, W, 3], with the time."""
        if self._time_box is not None:
            self._draw.rectangle(self._time_box, fill="white")
            right, top = self._time_box[2], self._time_box[1]
            self._draw.text((right, top), format_time(seconds), fill="dimgray", font=self._font, anchor="ra")
        return np.asarray(self._board)

    def _fit(self, image: Image.Image) -> Image.Image:
        """Resize an image to the panel, centred and with its aspect ratio."""
        factor = min(self._height / image.height, self._width / image.width)
        if factor.is_integer():
            image = image.resize((image.width * int(factor), image.height * int(factor)), Image.Resampling.NEAREST)
        else:
            size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
            image = image.resize(size, Image.Resampling.LANCZOS)
        if image.size == (self._width, self._height):
            return image
        panel = Image.new("RGB", (self._width, self._height), _BARS)
        panel.paste(image, ((self._width - image.width) // 2, (self._height - image.height) // 2))
        return panel
