"""A video in a row of frames: contact sheets, from whole videos or while they stream by.

Frames are uint8 RGB arrays [T, H, W, 3] throughout.
"""

import bisect
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from utils.files import atomic_path
from utils.video import to_uint8

_THUMBNAIL_MIN, _THUMBNAIL_MAX = 128, 320  # pixels of the longer side
_MARGIN, _GAP = 12, 4  # pixels
_CAPTION_LINES, _CAPTION_SIZE, _TIME_SIZE = 2, 15, 11  # lines, and font sizes in pixels


@dataclass(frozen=True)
class Strip:
    """One row of a contact sheet.

    Attributes:
        caption: the text above it.
        frames: the frames to show, uint8 [T, H, W, 3].
        seconds: when each of them is shown in the video.
    """

    caption: str
    frames: np.ndarray
    seconds: tuple[float, ...]


class ContactSheetSampler:
    """Keep the few frames that a contact sheet shows while a video streams by; memory does not grow with its length.

    The frames kept are evenly spaced, the first and the last included. With an unknown length they are as even as
    thinning allows: at most twice `columns` frames are held, and every second one is dropped when there are more.
    """

    def __init__(self, num_frames: int | None = None, columns: int = 8, fps: float = 16.0) -> None:
        """
        Args:
            num_frames: pixel frames of the video; None if it may go on for ever.
            columns: frames to keep in the end, at least 2.
            fps: frames per second.
        """
        if columns < 2:
            raise ValueError(f"a contact sheet shows the first and the last frame: columns must be >= 2, not {columns}")
        self._columns, self._fps = columns, fps
        self._wanted = None if num_frames is None else frozenset(_evenly_spaced(num_frames, columns))
        self._stride = 1
        self._kept: dict[int, np.ndarray] = {}  # frame index => frame [H, W, 3]
        self._last: np.ndarray | None = None
        self._count = 0

    def add(self, frames: np.ndarray | torch.Tensor) -> None:
        """Take the next frames of the video: uint8 [T, H, W, 3], or a float tensor [T, 3, H, W] in [-1, 1]."""
        pixels = to_uint8(frames)
        for frame in pixels:
            if self._count in self._wanted if self._wanted is not None else self._count % self._stride == 0:
                self._kept[self._count] = frame.copy()  # a view would keep all of `frames` alive
                self._thin()
            self._count += 1
        if len(pixels):
            self._last = pixels[-1].copy()

    def strip(self, caption: str) -> Strip:
        """The frames seen so far as a row of a contact sheet.

        Raises:
            ValueError: if there were none.
        """
        if self._last is None:
            raise ValueError(f"no frames for the contact sheet of {caption!r}")
        kept = {**self._kept, self._count - 1: self._last}
        targets = _evenly_spaced(self._count, self._columns)
        indices = sorted({min(kept, key=lambda index: abs(index - target)) for target in targets})
        return Strip(caption, np.stack([kept[i] for i in indices]), tuple(i / self._fps for i in indices))

    def _thin(self) -> None:
        if self._wanted is None and len(self._kept) > 2 * self._columns:
            self._stride *= 2
            self._kept = {index: frame for index, frame in self._kept.items() if index % self._stride == 0}


def contact_sheet(rows: Sequence[Strip | tuple[str, np.ndarray]], columns: int = 8, fps: float = 16.0) -> Image.Image:
    """Draw videos below each other: a caption, evenly spaced frames from first to last, and their times.

    Frames smaller than 128 pixels are enlarged without smoothing, those larger than 320 reduced.

    Args:
        rows: a video each, as (caption, all its frames [T, H, W, 3]) or as a sampler's `Strip`.
        columns: frames per row, at least 2, for the rows given as a whole video.
        fps: frames per second, for the same rows.
    """
    strips = [row if isinstance(row, Strip) else _strip_of(*row, columns, fps) for row in rows]
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
    """Write `contact_sheet(rows, columns, fps)` as a PNG; it appears complete or not at all.

    Raises:
        OSError: if the disk is full or not writable; it names `path`.
    """
    sheet = contact_sheet(rows, columns, fps)
    try:
        with atomic_path(path) as temporary:
            sheet.save(temporary, format="PNG")
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None  # Pillow does not say which file


def _strip_of(caption: str, frames: np.ndarray, columns: int, fps: float) -> Strip:
    sampler = ContactSheetSampler(len(frames), columns, fps)
    sampler.add(frames)
    return sampler.strip(caption)


def _evenly_spaced(count: int, columns: int) -> list[int]:
    """At most `columns` distinct indices below `count`, the first and the last included."""
    return sorted({round(i * (count - 1) / (columns - 1)) for i in range(columns)})


def _draw_strip(strip: Strip) -> Image.Image:
    thumbnails = [thumbnail(frame) for frame in to_uint8(strip.frames)]
    width, height = thumbnails[0].size
    caption_font, time_font = ImageFont.load_default(_CAPTION_SIZE), ImageFont.load_default(_TIME_SIZE)
    image_width = len(thumbnails) * (width + _GAP) - _GAP
    lines = wrap(strip.caption, image_width, caption_font.getlength, _CAPTION_LINES)
    caption_height = len(lines) * (_CAPTION_SIZE + _GAP) + _GAP
    image = Image.new("RGB", (image_width, caption_height + height + _TIME_SIZE + 2 * _GAP), "white")
    draw = ImageDraw.Draw(image)
    for number, line in enumerate(lines):
        draw.text((0, number * (_CAPTION_SIZE + _GAP)), line, fill="black", font=caption_font)
    for column, (small, second) in enumerate(zip(thumbnails, strip.seconds, strict=True)):
        left = column * (width + _GAP)
        image.paste(small, (left, caption_height))
        draw.text((left, caption_height + height + _GAP), time_text(second), fill="dimgray", font=time_font)
    return image


def thumbnail(frame: np.ndarray, smallest: int = _THUMBNAIL_MIN, largest: int = _THUMBNAIL_MAX) -> Image.Image:
    """A frame [H, W, 3] at a size to look at: one whose longer side is below `smallest` pixels is enlarged by a whole
    number, without smoothing, one above `largest` is reduced."""
    image = Image.fromarray(frame)
    longer = max(image.size)
    if longer < smallest:
        factor = -(-smallest // longer)
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    image.thumbnail((largest, largest), Image.Resampling.LANCZOS)  # only ever reduces
    return image


def wrap(text: str, width: float, measure: Callable[[str], float], num_lines: int) -> list[str]:
    """`text` in at most `num_lines` lines of `width` pixels, ellipsized if it is longer; `measure` gives a width."""
    text = " ".join(text.split())[:1000]  # the lines of the widest sheet hold fewer
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
    """How many leading characters of `text` fit into `width`; at least one."""
    return max(1, bisect.bisect_left(range(1, len(text) + 1), True, key=lambda n: measure(text[:n]) > width))


def time_text(seconds: float) -> str:
    """A time in a video as it is shown."""
    return f"{seconds:.1f} s" if seconds < 60 else f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
