"""Contact sheets: one row of evenly spaced frames per video, from files or from streamed frames.

Frames are uint8 RGB arrays [T, H, W, 3].
"""

import bisect
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from utils.clips import read_video
from utils.errors import UserError
from utils.files import atomic_path, read_json
from utils.video import to_uint8

_THUMBNAIL_MIN, _THUMBNAIL_MAX = 128, 320  # pixels of a thumbnail's longer side
_MARGIN, _GAP = 12, 4  # pixels
_CAPTION_LINES, _CAPTION_SIZE, _TIME_SIZE = 2, 15, 11  # lines, and font sizes in pixels


@dataclass(frozen=True)
class Strip:
    """One row of a contact sheet.

    Attributes:
        caption: text above the frames.
        frames: frames to show, uint8 [T, H, W, 3].
        seconds: time of each frame in the video.
    """

    caption: str
    frames: np.ndarray
    seconds: tuple[float, ...]


class ContactSheetSampler:
    """Selects the frames of a contact sheet while a video is streamed. Memory does not grow with the video's length.

    The selected frames are evenly spaced and include the first and the last. If the length is unknown, up to twice
    `columns` frames are kept; when there are more, every second one is dropped. The spacing is then less even.
    """

    def __init__(self, num_frames: int | None = None, columns: int = 8, fps: float = 16.0) -> None:
        """
        Args:
            num_frames: pixel frames of the video; None if unknown.
            columns: frames to select, at least 2.
            fps: frames per second.

        Raises:
            ValueError: if `columns` is below 2.
        """
        if columns < 2:
            raise ValueError(f"columns must be at least 2, for the first and the last frame, not {columns}")
        self._columns, self._fps = columns, fps
        self._selected = None if num_frames is None else frozenset(_evenly_spaced(num_frames, columns))
        self._stride = 1
        self._kept: dict[int, np.ndarray] = {}  # frame index => frame [H, W, 3]
        self._last: np.ndarray | None = None
        self._count = 0

    def add(self, frames: np.ndarray | torch.Tensor) -> None:
        """Add the next frames of the video: uint8 [T, H, W, 3], or a float tensor [T, 3, H, W] in [-1, 1]."""
        pixels = to_uint8(frames)
        for frame in pixels:
            index, selected = self._count, self._selected
            if index % self._stride == 0 if selected is None else index in selected:
                self._kept[self._count] = frame.copy()  # a view would keep all of `frames` in memory
                self._thin()
            self._count += 1
        if len(pixels):
            self._last = pixels[-1].copy()

    def strip(self, caption: str) -> Strip:
        """Return the row of the frames so far.

        Raises:
            ValueError: if there are no frames.
        """
        if self._last is None:
            raise ValueError(f"no frames for the contact sheet of {caption!r}")
        kept = {**self._kept, self._count - 1: self._last}
        targets = _evenly_spaced(self._count, self._columns)
        indices = sorted({min(kept, key=lambda index: abs(index - target)) for target in targets})
        return Strip(caption, np.stack([kept[i] for i in indices]), tuple(i / self._fps for i in indices))

    def _thin(self) -> None:
        if self._selected is None and len(self._kept) > 2 * self._columns:
            self._stride *= 2
            self._kept = {index: frame for index, frame in self._kept.items() if index % self._stride == 0}


def read_strip(path: Path, columns: int = 8) -> Strip:
    """Return the row of a video file. Its caption is the prompt in the video's metadata, or else the file's name.

    Args:
        columns: frames to select, at least 2.

    Raises:
        UserError: if the video or its metadata cannot be read.
    """
    frames, fps = read_video(path)
    metadata = path.with_suffix(".json")
    caption = path.stem
    if metadata.exists():
        content = read_json(metadata, "video metadata file")
        name = content.get("name") if isinstance(content, dict) else None
        if not isinstance(name, str):
            raise UserError(f"{metadata} is not the metadata of a video: it has no name; delete it or restore it")
        caption = name
    return _sample(caption, frames, columns, fps)


def draw_contact_sheet(
    rows: Sequence[Strip | tuple[str, np.ndarray]], columns: int = 8, fps: float = 16.0
) -> Image.Image:
    """Draw one row per video: a caption, evenly spaced frames, and their times.

    Frames are scaled as in `thumbnail`.

    Args:
        rows: for each video a `Strip`, or (caption, all frames [T, H, W, 3]).
        columns: frames per row for videos with all frames, at least 2.
        fps: frames per second of these videos.

    Raises:
        ValueError: if there are no rows.
    """
    strips = [row if isinstance(row, Strip) else _sample(*row, columns, fps) for row in rows]
    if not strips:
        raise ValueError("a contact sheet needs at least one video")
    drawn = [_draw_strip(strip) for strip in strips]
    width = max(image.width for image in drawn) + 2 * _MARGIN
    sheet = Image.new("RGB", (width, sum(image.height + _MARGIN for image in drawn) + _MARGIN), "white")
    top = _MARGIN
    for image in drawn:
        sheet.paste(image, (_MARGIN, top))
        top += image.height + _MARGIN
    return sheet


def save_contact_sheet(
    path: str | os.PathLike[str],
    rows: Sequence[Strip | tuple[str, np.ndarray]],
    columns: int = 8,
    fps: float = 16.0,
) -> None:
    """Write a contact sheet as a PNG, atomically; arguments as in `draw_contact_sheet`.

    Raises:
        OSError: if the disk is full or not writable; the error names `path`.
    """
    sheet = draw_contact_sheet(rows, columns, fps)
    try:
        with atomic_path(path) as temporary:
            sheet.save(temporary, format="PNG", compress_level=1)  # the default takes as long as decoding a block
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None  # Pillow's error has no file name


def _sample(caption: str, frames: np.ndarray, columns: int, fps: float) -> Strip:
    sampler = ContactSheetSampler(len(frames), columns, fps)
    sampler.add(frames)
    return sampler.strip(caption)


def _evenly_spaced(count: int, columns: int) -> list[int]:
    """Return at most `columns` distinct indices below `count`, including the first and the last."""
    return sorted({round(i * (count - 1) / (columns - 1)) for i in range(columns)})


def _draw_strip(strip: Strip) -> Image.Image:
    thumbnails = [thumbnail(frame) for frame in to_uint8(strip.frames)]
    width, height = thumbnails[0].size
    caption_font, time_font = ImageFont.load_default(_CAPTION_SIZE), ImageFont.load_default(_TIME_SIZE)
    image_width = len(thumbnails) * (width + _GAP) - _GAP
    lines = wrap_text(strip.caption, image_width, caption_font.getlength, _CAPTION_LINES)
    caption_height = len(lines) * (_CAPTION_SIZE + _GAP) + _GAP
    image = Image.new("RGB", (image_width, caption_height + height + _TIME_SIZE + 2 * _GAP), "white")
    draw = ImageDraw.Draw(image)
    for number, line in enumerate(lines):
        draw.text((0, number * (_CAPTION_SIZE + _GAP)), line, fill="black", font=caption_font)
    for column, (small, second) in enumerate(zip(thumbnails, strip.seconds, strict=True)):
        left = column * (width + _GAP)
        image.paste(small, (left, caption_height))
        draw.text((left, caption_height + height + _GAP), format_time(second), fill="dimgray", font=time_font)
    return image


def thumbnail(frame: np.ndarray, smallest: int = _THUMBNAIL_MIN, largest: int = _THUMBNAIL_MAX) -> Image.Image:
    """Resize a frame [H, W, 3] for viewing.

    If its longer side is below `smallest` pixels, it is enlarged by a whole factor without smoothing. If it is above
    `largest` pixels, it is reduced.
    """
    image = Image.fromarray(frame)
    longer = max(image.size)
    if longer < smallest:
        factor = -(-smallest // longer)
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    image.thumbnail((largest, largest), Image.Resampling.LANCZOS)  # never enlarges
    return image


def wrap_text(text: str, width: float, measure: Callable[[str], float], num_lines: int) -> list[str]:
    """Break a text into lines of at most `width` pixels; longer texts end in an ellipsis.

    Args:
        measure: returns the width of a text in pixels.
        num_lines: maximum number of lines.
    """
    text = " ".join(text.split())[:1000]  # more than fits on the widest sheet
    text = "".join(c if c.isprintable() else " " for c in text)
    lines: list[str] = []
    while text:
        end = _fitting(text, width, measure)
        if end < len(text) and len(lines) == num_lines - 1:
            end = _fitting(text, width - measure("\u2026"), measure)
            return [*lines, text[:end].rstrip() + "\u2026"]
        if end < len(text) and (space := text.rfind(" ", 1, end + 1)) > 0:
            end = space
        lines.append(text[:end].rstrip())
        text = text[end:].lstrip()
    return lines


def _fitting(text: str, width: float, measure: Callable[[str], float]) -> int:
    """Return how many leading characters of `text` fit into `width`, at least one."""
    return max(1, bisect.bisect_left(range(1, len(text) + 1), True, key=lambda n: measure(text[:n]) > width))


def format_time(seconds: float) -> str:
    """Format a time in a video, such as "5.0 s" or "1:30"."""
    return f"{seconds:.1f} s" if seconds < 60 else f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
