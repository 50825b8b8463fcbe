"""Readers of videos and images of any size, rate and codec. Frames are uint8 RGB arrays [H, W, 3]."""

import contextlib
import itertools
import os
import struct
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.stream import Disposition
from PIL import Image, ImageOps

from utils.errors import UserError
from utils.mp4 import is_complete_mp4
from utils.video import frame_rate, to_uint8

VIDEO_SUFFIXES = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".mts", ".wmv", ".flv")
_ROTATIONS = {90: "transpose=cclock", -90: "transpose=clock", 180: "hflip,vflip", -180: "hflip,vflip"}
_WIDEST_PIXEL = 4  # ratio of a pixel's sides; a larger one is a damaged header, and would need much memory


class VideoReader:
    """Reads a video frame by frame at a constant frame rate. Memory does not grow with the video's length.

    Frames are upright (rotation of the display matrix) and have square pixels (sample aspect ratio). Inside a `with`
    block, the frames, uint8 [H, W, 3], can be iterated once. Entering the block raises `UserError` if the file is
    missing or has no video that can be decoded.

    Attributes:
        path: any file that FFmpeg can decode, including the growing file of a `VideoWriter`.
        fps: frames per second; set inside the `with` block.
        height, width: size of the video in pixels, before `size`; set inside the `with` block.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        max_frames: int | None = None,
        fps: float | None = None,
        *,
        size: tuple[int, int] | None = None,
        strict: bool = False,
    ):
        """
        Args:
            path: video file.
            max_frames: number of frames to read. None: all.
            fps: resample to this frame rate by dropping or repeating frames. A timestamp is rounded to the nearest
                frame of the new rate, and a frame is repeated until the next one. None: the frame rate of the video.
            size: height and width of the frames, by `resize_and_crop`. None: those of the video.
            strict: raise `UserError` at the first damaged frame, or where a file is cut off. False: skip damaged
                frames, and end where the file is cut off.
        """
        self.path = Path(path)
        self._max_frames, self._requested_fps, self._size, self._strict = max_frames, fps, size, strict

    def __enter__(self) -> "VideoReader":
        _require_file(self.path, "video")
        with contextlib.ExitStack() as cleanup:
            try:
                container = cleanup.enter_context(av.open(f"file:{self.path}"))
            except (av.FFmpegError, ValueError) as error:
                raise UserError(f"cannot read video {self.path}: {getattr(error, 'strerror', error)}") from None
            stream = _video_stream(container)
            if stream is None:
                raise UserError(f"cannot read video {self.path}: it has no video stream")
            rate = frame_rate(self._requested_fps or stream.guessed_rate or 25)
            self.fps = float(rate)
            decoded = _decode_strictly(container, stream, self.path) if self._strict else _decode(container, stream)
            frames = itertools.islice(_resample(decoded, stream, rate), self._max_frames)
            first = next(frames, None)
            if first is None:
                raise UserError(f"cannot read video {self.path}: it has no frames")
            self.height, self.width = first.shape[:2]
            self._frames = itertools.chain([first], frames)
            self._cleanup = cleanup.pop_all()
        return self

    def __iter__(self) -> Iterator[np.ndarray]:
        if self._size is None:
            return self._frames
        height, width = self._size
        return (resize_and_crop(frame[None], height, width)[0] for frame in self._frames)

    def __exit__(self, *exception: Any) -> None:
        self._cleanup.close()


def read_video(
    path: str | os.PathLike[str], max_frames: int | None = None, fps: float | None = None, **options: Any
) -> tuple[np.ndarray, float]:
    """Return a whole video as (frames uint8 [T, H, W, 3], frames per second). Arguments as in `VideoReader`.

    Raises:
        UserError: if the file is missing or has no video that can be decoded.
    """
    with VideoReader(path, max_frames, fps, **options) as video:
        return np.stack(list(video)), video.fps


def _video_stream(container: av.container.InputContainer) -> av.VideoStream | None:
    """Return the first video stream that is not the cover picture of a sound file."""
    return next((s for s in container.streams.video if not s.disposition & Disposition.attached_pic), None)


def _decode(container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[av.VideoFrame]:
    """Yield the frames of a stream; skip broken packets, and end where the file is cut off."""
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets)
        except (StopIteration, av.FFmpegError):
            break
        with contextlib.suppress(av.FFmpegError):
            yield from packet.decode()
    with contextlib.suppress(av.FFmpegError):
        yield from stream.decode(None)  # the decoder holds frames back


def _decode_strictly(
    container: av.container.InputContainer, stream: av.VideoStream, path: Path
) -> Iterator[av.VideoFrame]:
    """Yield the frames of a stream; raise UserError at a broken packet, or where the file is cut off."""
    count = 0
    problem = "cut off" if "mp4" in container.format.name and not is_complete_mp4(path) else ""
    try:
        for packet in container.demux(stream):
            if packet.is_corrupt:
                problem = problem or "damaged"
                break
            for frame in packet.decode():
                if frame.is_corrupt:
                    problem = problem or "damaged"
                    break
                yield frame
                count += 1
    except av.FFmpegError as error:
        problem = problem or f"damaged ({error.strerror})"
    if problem:
        raise UserError(f"cannot read video {path}: it is {problem} after {count} frames")


def _resample(decoded: Iterator[av.VideoFrame], stream: av.VideoStream, rate: Fraction) -> Iterator[np.ndarray]:
    """Yield decoded frames as RGB arrays, upright, with square pixels and at a constant rate."""
    graph = None
    for frame in itertools.chain(decoded, [None]):
        if graph is None:
            if frame is None:
                return
            graph = av.filter.Graph()
            filters = [f"fps={rate}", *_geometry(frame, stream), "format=pix_fmts=rgb24"]
            nodes = [graph.add(*text.split("=", 1)) for text in filters]
            graph.link_nodes(graph.add_buffer(template=stream), *nodes, graph.add("buffersink")).configure()
        graph.vpush(frame)  # None: end of the stream
        # BlockingIOError: no frame is ready. EOFError: there are no more frames.
        with contextlib.suppress(av.error.BlockingIOError, av.error.EOFError):
            while True:
                yield graph.vpull().to_ndarray()


def _geometry(frame: av.VideoFrame, stream: av.VideoStream) -> list[str]:
    """Return the filters that make frames upright and their pixels square."""
    filters = []
    ratio = stream.sample_aspect_ratio or Fraction(1)
    if ratio != 1 and 1 / _WIDEST_PIXEL <= ratio <= _WIDEST_PIXEL:
        filters = [f"scale=w=max(1\,round(iw*{ratio.numerator}/{ratio.denominator})):h=ih", "setsar=1"]
    return filters + [text for text in _ROTATIONS.get(round(frame.rotation), "").split(",") if text]


def read_image(path: str | os.PathLike[str]) -> np.ndarray:
    """Return an image as uint8 [H, W, 3]: upright by its EXIF tag, transparency on white, 16 bits reduced to 8.

    Raises:
        UserError: if the file is missing, broken or holds floats of unknown range.
    """
    _require_file(Path(path), "image")
    try:
        Image.init()
        formats = [name for name in Image.ID if name != "EPS"]  # Pillow reads EPS, a program, with Ghostscript
        with Image.open(path, formats=formats) as opened:
            image = ImageOps.exif_transpose(opened)
            image.load()
    # Pillow's decoders report broken files with any of these errors.
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise UserError(f"cannot read image {path}: {error}") from None
    if image.mode == "F":
        raise UserError(f"cannot read image {path}: it holds floats of unknown range; save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        grey = np.asarray(image, np.int64).clip(0, 65535) / 257
        return np.repeat(grey.round().astype(np.uint8)[..., None], 3, axis=2)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGB"))


def resize_and_crop(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize frames [T, H, W, 3] to cover height x width pixels, then crop the centre; keeps the aspect ratio."""
    images = [Image.fromarray(frame) for frame in to_uint8(frames)]
    fitted = [ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS) for image in images]
    return np.stack([np.asarray(image) for image in fitted]) if fitted else np.empty((0, height, width, 3), np.uint8)


def _require_file(path: Path, kind: str) -> None:
    """Raise a one-line error if `path` is missing, unreadable or empty."""
    try:
        with path.open("rb") as file:
            if not file.read(1):
                raise UserError(f"cannot read {kind} {path}: the file is empty")
    except OSError as error:
        raise UserError(f"cannot read {kind} {path}: {error.strerror}") from None
