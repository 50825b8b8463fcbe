"""A writer of mp4 files for streamed frames; utils/clips.py reads videos.

Frames are uint8 RGB arrays [T, H, W, 3]."""

import contextlib
import os
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch

from utils.errors import DISK_ERRORS, UserError
from utils.files import atomic_path

_QUEUED_FRAMES = 16  # frames that may wait for the encoder, so that it works while the next block is generated


def quantize(frames: torch.Tensor) -> torch.Tensor:
    """Convert frames [T, 3, H, W] in [-1, 1] to uint8 [T, H, W, 3] on their device.

    Values outside the range are clamped; NaN becomes black, so that a diverged model still gives a video.
    """
    values = frames.detach().float().nan_to_num(nan=-1.0).clamp_(-1, 1).add_(1).mul_(127.5).round_()
    return values.to(torch.uint8, memory_format=torch.channels_last).permute(0, 2, 3, 1).contiguous()


def to_uint8(frames: np.ndarray | torch.Tensor) -> np.ndarray:
    """Convert frames to uint8 [T, H, W, 3].

    Args:
        frames: uint8 [T, H, W, 3], returned unchanged, or a float tensor [T, 3, H, W] for `quantize`.

    Raises:
        ValueError: for any other type or shape.
    """
    if isinstance(frames, torch.Tensor) and frames.is_floating_point():
        if frames.ndim != 4 or frames.shape[1] != 3:
            raise ValueError(f"float frames must be [T, 3, H, W], not {tuple(frames.shape)}")
        frames = quantize(frames).cpu().numpy()
    pixels = np.asarray(frames)
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3:
        raise ValueError(f"frames must be uint8 [T, H, W, 3], not {pixels.dtype} {pixels.shape}")
    return pixels


class VideoWriter:
    """Writes a video while it is generated: `with VideoWriter("cat.mp4", fps=16) as video: video.write(frames)`.

    Frames go into the hidden file `partial` beside the final file. It is a fragmented mp4, so players can show it while
    it grows; after a crash, it lacks at most about the last second. At the end of the `with` block it is converted into
    an ordinary mp4 (H.264, yuv420p, index first) and renamed. An exception or Ctrl-C in the block deletes it.

    The bytes depend only on the frames and the FFmpeg version: x264 runs in one thread, and no date is stored.

    Attributes:
        path: final file. Its folder must exist.
        partial: growing file; set inside the `with` block.
        num_frames: number of frames written so far.
    """

    def __init__(self, path: str | os.PathLike[str], fps: float = 16.0, *, crf: int = 17, preset: str = "medium"):
        """
        Args:
            path: final file; an existing file is replaced at the end.
            fps: frames per second.
            crf: quality of x264, from 0 (lossless) to 51; 17 is visually lossless.
            preset: speed of x264, from "ultrafast" to "veryslow".

        Raises:
            UserError: if fps is not between 0 and 1000.
        """
        if not 0 < fps < 1000:
            raise UserError(f"cannot write a video at {fps} frames per second: choose fps between 0 and 1000")
        self.path = Path(path)
        self.num_frames = 0
        self.partial: Path | None = None
        self._fps, self._crf, self._preset = fps, crf, preset
        self._size: tuple[int, int] | None = None  # height, width
        self._encoder: _Encoder | None = None
        self._cleanup = contextlib.ExitStack()

    def __enter__(self) -> "VideoWriter":
        self.partial = self._cleanup.enter_context(atomic_path(self.path))
        return self

    def write(self, frames: np.ndarray | torch.Tensor) -> None:
        """Append frames: uint8 [T, H, W, 3], or a float tensor [T, 3, H, W] in [-1, 1].

        Waits if too many frames are queued for the encoder, so memory stays bounded.

        Raises:
            OSError: if the disk is full or not writable; its `filename` is that of the video.
            UserError: if a side is odd, or the encoder fails for another reason.
            ValueError: if the frames have another type or size than before.
        """
        pixels = to_uint8(frames)
        if len(pixels) == 0:
            return
        with _ffmpeg_errors(self.path):
            if self._encoder is None:
                self._size = pixels.shape[1:3]
                self._encoder = self._start(*self._size)
            if pixels.shape[1:3] != self._size:
                raise ValueError(f"frames of {pixels.shape[1:3]} after frames of {self._size} in {self.path}")
            for frame in pixels:
                self._encoder.send(frame)
                self.num_frames += 1

    def __exit__(self, *exception: Any) -> None:
        if exception[0] is not None:
            self._cleanup.__exit__(*exception)
            return
        with self._cleanup, _ffmpeg_errors(self.path):  # renames the file or, on an error, deletes it
            self._finish()

    def keep_unfinished(self, path: Path) -> Path | None:
        """End the video early and move it to `path`; return `path`, or None if no frame has been written.

        The moved file is playable. The writer cannot be used afterwards.
        """
        if self._encoder is None or self.partial is None:
            return None
        with contextlib.suppress(OSError, ValueError, av.FFmpegError):
            self._encoder.finish()
        if not self.partial.exists() or not self.partial.stat().st_size:
            return None
        return self.partial.replace(path)

    def _start(self, height: int, width: int) -> "_Encoder":
        if height % 2 or width % 2:
            raise UserError(f"cannot write {self.path}: H.264 video needs even sides, not {width}x{height} pixels")
        assert self.partial is not None
        rate, options = frame_rate(self._fps), {"crf": str(self._crf), "preset": self._preset}
        encoder = _Encoder(self.partial, height, width, rate, options)
        self._cleanup.callback(encoder.stop)
        return encoder

    def _finish(self) -> None:
        if self._encoder is None or self.partial is None:
            raise ValueError(f"no frames were written to {self.path}")
        self._encoder.finish()
        with atomic_path(self.partial) as finished:
            num_frames = join_videos([self.partial], finished, self._fps)
            if num_frames != self.num_frames:
                raise UserError(
                    f"cannot write {self.path}: only {num_frames} of its {self.num_frames} frames are on disk; check "
                    "that the disk is not full"
                )


class _Encoder:
    """H.264 encoder that runs in a thread of its own and writes a fragmented mp4."""

    def __init__(self, path: Path, height: int, width: int, rate: Fraction, options: dict[str, str]) -> None:
        """Create the file. `rate` is the number of frames per second, `options` are x264's crf and preset."""
        self._time_base = 1 / rate
        self._num_frames = 0
        # HD players assume BT.709; FFmpeg's default is an untagged BT.601, which shifts the colours.
        conversion = "out_color_matrix=bt709:out_range=tv:flags=bicubic+accurate_rnd+full_chroma_inp"
        self._to_yuv = graph = av.filter.Graph()
        graph.threads = 1
        rgb = graph.add_buffer(None, width, height, av.VideoFormat("rgb24"), time_base=self._time_base)
        filters = [graph.add("scale", conversion), graph.add("format", "pix_fmts=yuv420p"), graph.add("buffersink")]
        graph.link_nodes(rgb, *filters).configure()

        muxing = {
            "movflags": "frag_keyframe+empty_moov+default_base_moof+negative_cts_offsets",
            "fflags": "+bitexact",
            "flush_packets": "1",
        }
        self._container = av.open(f"file:{path}", "w", format="mp4", container_options=muxing)
        group = max(1, round(rate))  # one key frame, hence one fragment, per second
        # Negative offsets let time start at 0 despite B-frames. A short look-ahead writes frames early. With mbtree and
        # B-frames, x264's bytes differ from run to run.
        options = options | {"g": str(group), "mbtree": "0", "rc-lookahead": str(min(group, 16)), "flags": "+bitexact"}
        self._stream = self._container.add_stream("libx264", rate=rate, options=options)
        self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, "yuv420p"
        codec = self._stream.codec_context
        codec.time_base, codec.thread_count = self._time_base, 1
        codec.colorspace = codec.color_primaries = codec.color_trc = 1  # BT.709
        codec.color_range = 1  # limited
        self._container.start_encoding()
        self._thread = ThreadPoolExecutor(1)
        self._queue: deque[Future[None]] = deque()
        self._lock = threading.Lock()  # a monitor thread may finish the file while frames are sent

    def send(self, pixels: np.ndarray) -> None:
        """Queue a frame, uint8 [H, W, 3]. Raises the errors of frames that were queued earlier."""
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
        frame.pts, frame.time_base = self._num_frames, self._time_base
        self._num_frames += 1
        with self._lock:
            self._queue.append(self._thread.submit(self._encode, frame))
            self._wait(_QUEUED_FRAMES)

    def finish(self) -> None:
        """Encode all queued frames and close the file."""
        with self._lock:
            self._wait(0)
            self._thread.shutdown()
            self._container.mux(self._stream.encode(None))
            self._container.close()

    def stop(self) -> None:
        """Stop the thread and close the file without reporting errors. It may be closed already."""
        self._thread.shutdown(cancel_futures=True)
        with contextlib.suppress(OSError, ValueError, av.FFmpegError):
            self._container.close()

    def _wait(self, num_queued: int) -> None:
        while len(self._queue) > num_queued:
            self._queue.popleft().result()

    def _encode(self, frame: av.VideoFrame) -> None:
        self._to_yuv.vpush(frame)
        self._container.mux(self._stream.encode(self._to_yuv.vpull()))


def frame_rate(fps: float | Fraction) -> Fraction:
    """Return a frame rate as FFmpeg stores it, a fraction of limited size."""
    return Fraction(fps).limit_denominator(1001000)


def join_videos(parts: Sequence[Path], target: Path, fps: float) -> int:
    """Copy the packets of mp4 files of `VideoWriter`, one after another, into an ordinary mp4 with its index first.

    Args:
        parts: files of the same size, frame rate and quality.

    Returns:
        the number of frames.
    """
    num_frames = 0
    options = {"movflags": "+faststart", "fflags": "+bitexact"}
    with av.open(f"file:{target}", "w", format="mp4", container_options=options) as output:
        stream = None
        for part in parts:
            with av.open(f"file:{part}") as source:
                stream = stream or output.add_stream_from_template(source.streams.video[0])
                num_frames += _copy_packets(source, output, stream, num_frames / frame_rate(fps))
    return num_frames


def _copy_packets(source: Any, output: Any, stream: Any, start: Fraction) -> int:
    """Copy all packets of an mp4; its first frame is shown at `start`, in seconds. Return the number of frames."""
    num_frames = offset = 0
    for packet in source.demux(source.streams.video[0]):
        if packet.size:  # the last packet is empty
            if not num_frames:  # B-frames delay the first frame
                offset = round(start / packet.time_base) - (packet.pts or 0)
            packet.pts, packet.dts = (packet.pts or 0) + offset, (packet.dts or 0) + offset
            packet.stream = stream
            output.mux(packet)
            num_frames += 1
    return num_frames


@contextlib.contextmanager
def _ffmpeg_errors(path: Path) -> Iterator[None]:
    """Turn FFmpeg's errors into one-line errors that name `path`: OSError for a full disk, else UserError."""
    try:
        yield
    except av.FFmpegError as error:
        if error.errno in DISK_ERRORS:
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from None
        raise UserError(
            f"cannot write {path}: the encoder failed ({error.strerror}); check the folder and the disk"
        ) from None
