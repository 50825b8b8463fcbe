"""How pixels get to disk and back: streamed mp4 files, and clips and images to continue.

Frames are uint8 RGB arrays [T, H, W, 3] throughout.
"""

import contextlib
import errno
import io
import os
import re
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

import imageio_ffmpeg
import numpy as np
import torch
from PIL import Image, ImageOps

from utils.errors import UserError
from utils.files import atomic_path

_FINISH_SECONDS = 300  # after the last frame ffmpeg has a second of video left to encode; much more means it hangs
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM)


# ---- Video files ----


def to_uint8(frames: np.ndarray | torch.Tensor) -> np.ndarray:
    """Frames as [T, H, W, 3] uint8: such an array as it is, or a float tensor [T, 3, H, W] in [-1, 1] (clamped).

    NaN becomes black, so that a diverged model yields a video to look at instead of noise from the conversion.

    Raises:
        ValueError: for any other dtype or shape.
    """
    if isinstance(frames, torch.Tensor) and frames.is_floating_point():
        if frames.ndim != 4 or frames.shape[1] != 3:
            raise ValueError(f"float frames must be [T, 3, H, W], not {tuple(frames.shape)}")
        levels = (frames.detach().float().nan_to_num(nan=-1.0).clamp(-1, 1) + 1) * 127.5
        frames = levels.round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    pixels = np.asarray(frames)
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3:
        raise ValueError(f"frames must be uint8 [T, H, W, 3], not {pixels.dtype} {pixels.shape}")
    return pixels


class VideoWriter:
    """Write a video while it is generated; it appears under its final name only when it is complete.

        with VideoWriter("cat.mp4", fps=16) as video:
            for frames in blocks:
                video.write(frames)

    Frames go at once into the hidden file `partial` beside the final one: a fragmented mp4, which players can show up
    to the last second or so while it grows, and after a crash. Leaving the block turns it into an ordinary mp4 (H.264,
    yuv420p, index in front) and renames it. An exception or Ctrl-C in the block removes it.

    The bytes depend only on the frames and the ffmpeg build: x264 runs on one thread, and no date is stored.

    Attributes:
        path: the final file. Its folder must exist.
        partial: the growing file; set while the block runs.
        num_frames: how many frames were written so far.
    """

    def __init__(
        self, path: str | os.PathLike[str], fps: float = 16.0, *, crf: int = 17, preset: str = "medium"
    ) -> None:
        """
        Args:
            path: where the video goes; an existing file is replaced at the end.
            fps: frames per second.
            crf: x264's quality, 0 (lossless) to 51; 17 looks like the source.
            preset: x264's effort, "ultrafast" to "veryslow".

        Raises:
            UserError: if fps is not positive.
        """
        if not 0 < fps < 1000:
            raise UserError(f"cannot write a video at {fps} frames per second: choose fps between 0 and 1000")
        self.path = Path(path)
        self.num_frames = 0
        self.partial: Path | None = None
        self._fps, self._crf, self._preset = fps, crf, preset
        self._size: tuple[int, int] | None = None  # height, width
        self._ffmpeg: _Ffmpeg | None = None
        self._cleanup = contextlib.ExitStack()

    def __enter__(self) -> "VideoWriter":
        self.partial = self._cleanup.enter_context(atomic_path(self.path))
        return self

    def write(self, frames: np.ndarray | torch.Tensor) -> None:
        """Append frames: uint8 [T, H, W, 3], or a float tensor [T, 3, H, W] in [-1, 1].

        Blocks while the encoder is behind, so memory stays bounded.

        Raises:
            OSError: if the disk is full or not writable; it names the video.
            UserError: if a side is odd, or ffmpeg stops for another reason.
            ValueError: if the frames are of another kind or size than before.
        """
        pixels = to_uint8(frames)
        if len(pixels) == 0:
            return
        if self._ffmpeg is None:
            self._size = pixels.shape[1:3]
            self._ffmpeg = self._start(*self._size)
        if pixels.shape[1:3] != self._size:
            raise ValueError(f"frames of {pixels.shape[1:3]} after frames of {self._size} in {self.path}")
        for frame in pixels:
            self._ffmpeg.send(np.ascontiguousarray(frame).data)
            self.num_frames += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._cleanup.__exit__(kind, error, trace)
            return
        with self._cleanup:  # stops ffmpeg if need be, then renames the file or, on an error, removes it
            self._finish()

    def keep_unfinished(self, path: Path) -> Path | None:
        """End the video where it is and move it to `path`, where it plays; None if there is nothing of it yet.

        For a process that is about to end: the writer is of no use afterwards.
        """
        if self._ffmpeg is None or self.partial is None:
            return None
        with contextlib.suppress(UserError, OSError, ValueError):
            self._ffmpeg.finish()
        if not self.partial.exists() or not self.partial.stat().st_size:
            return None
        return self.partial.replace(path)

    def _start(self, height: int, width: int) -> "_Ffmpeg":
        if height % 2 or width % 2:
            raise UserError(f"cannot write {self.path}: H.264 video needs even sides, not {width}x{height} pixels")
        group = max(1, round(self._fps))  # a second per key frame, hence per fragment
        arguments = [
            *("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-framerate", f"{self._fps:.10g}"),
            *("-probesize", "32", "-analyzeduration", "0"),  # else ffmpeg holds megabytes of small frames back
            *("-i", "pipe:0", "-an", "-filter_threads", "1"),
            # HD players assume BT.709; ffmpeg's own default is BT.601 without saying so, which shifts the colours.
            *("-vf", "scale=out_color_matrix=bt709:out_range=tv:flags=bicubic+accurate_rnd+full_chroma_inp"),
            *("-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "bt709", "-color_range", "tv"),
            *("-c:v", "libx264", "-pix_fmt", "yuv420p", "-preset", self._preset, "-crf", str(self._crf)),
            # No B frames: time starts at 0 in every player. A short look-ahead: frames reach the file soon.
            *("-threads", "1", "-g", str(group), "-bf", "0", "-rc-lookahead", str(min(group, 16))),
            *("-fflags", "+bitexact", "-flags:v", "+bitexact", "-flush_packets", "1"),
            *("-movflags", "frag_keyframe+empty_moov+default_base_moof", "-f", "mp4", f"file:{self.partial}"),
        ]
        ffmpeg = _Ffmpeg(arguments, self.path)
        self._cleanup.callback(ffmpeg.kill)
        return ffmpeg

    def _finish(self) -> None:
        if self._ffmpeg is None or self.partial is None:
            raise ValueError(f"no frames were written to {self.path}")
        self._ffmpeg.finish()
        with atomic_path(self.partial) as whole:
            self._copy_whole(self.partial, whole)

    def _copy_whole(self, fragmented: Path, whole: Path) -> None:
        """Copy the stream into an mp4 with one index in front, and check that no frame was lost on the way."""
        arguments = [
            *("-i", f"file:{fragmented}", "-map", "0:v:0", "-c", "copy", "-fflags", "+bitexact"),
            *("-movflags", "+faststart", "-progress", "pipe:1", "-f", "mp4", f"file:{whole}"),
        ]
        ffmpeg = _Ffmpeg(arguments, self.path)
        self._cleanup.callback(ffmpeg.kill)
        counts = re.findall(r"^frame=(\d+)", ffmpeg.finish(), re.MULTILINE)
        if not counts or int(counts[-1]) != self.num_frames:
            raise UserError(
                f"cannot write {self.path}: {counts[-1] if counts else 0} of its {self.num_frames} frames reached the "
                "disk; check that it is not full"
            )


class VideoReader:
    """Read a video frame by frame, upright and at a constant frame rate; memory does not grow with its length.

        with VideoReader("cat.mp4") as video:
            for frame in video:  # uint8 [H, W, 3]
                ...

    Frames can be gone through once. Entering and iterating raise `UserError` if the file is missing or holds no video
    that can be decoded.

    Attributes:
        path: any file that ffmpeg can decode, a `VideoWriter`'s growing one included.
        fps: frames per second; set while the block runs.
        height, width: of the first frame, in pixels; set while the block runs.
    """

    def __init__(self, path: str | os.PathLike[str], max_frames: int | None = None, fps: float | None = None) -> None:
        """
        Args:
            path: the video.
            max_frames: stop after so many frames.
            fps: drop or repeat frames to this rate; default: keep the video's own.
        """
        self.path = Path(path)
        self._arguments = ["-i", f"file:{self.path}", "-map", "0:v:0"]
        self._arguments += [] if fps is None else ["-vf", f"fps={fps:.10g}"]
        self._arguments += [] if max_frames is None else ["-frames:v", str(max_frames)]
        # Each PPM image states its size, which makes us independent of how ffmpeg reports rotated or cropped videos.
        self._arguments += ["-pix_fmt", "rgb24", "-c:v", "ppm", "-f", "image2pipe", "pipe:1"]

    def __enter__(self) -> "VideoReader":
        _require_file(self.path, "video")
        with contextlib.ExitStack() as cleanup:
            # Appended to, because we read it while ffmpeg writes and both share one position in the file.
            self._log = cleanup.enter_context(tempfile.TemporaryFile("a+b"))
            self._process = _popen(["-loglevel", "info", *self._arguments], self._log)
            cleanup.callback(self._end)
            assert self._process.stdin is not None and self._process.stdout is not None
            self._process.stdin.close()
            self._output = io.BufferedReader(self._process.stdout)  # type: ignore[type-var] # typeshed: no RawIOBase
            self._next = _read_ppm(self._output)
            if self._next is None:
                raise self._failure()
            self.height, self.width = self._next.shape[:2]
            number, thousands = re.findall(r"Video: ppm.*?([\d.]+)(k?) fps", _read_log(self._log))[-1]
            self.fps = float(number) * (1000 if thousands else 1)
            self._cleanup = cleanup.pop_all()
        return self

    def __iter__(self) -> Iterator[np.ndarray]:
        while self._next is not None:
            yield self._next
            self._next = _read_ppm(self._output)
        if self._process.wait() != 0:
            raise self._failure()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cleanup.close()

    def _end(self) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def _failure(self) -> UserError:
        self._process.wait()  # it has closed its output, so it is about to end; then its message is complete
        return UserError(f"cannot read video {self.path}: {_last_line(_read_log(self._log)) or 'it has no frames'}")


def read_video(
    path: str | os.PathLike[str], max_frames: int | None = None, fps: float | None = None
) -> tuple[np.ndarray, float]:
    """A whole video as (frames uint8 [T, H, W, 3], frames per second). The arguments are `VideoReader`'s.

    Raises:
        UserError: if the file is missing or holds no video that can be decoded.
    """
    with VideoReader(path, max_frames, fps) as video:
        return np.stack(list(video)), video.fps


class _Ffmpeg:
    """One running ffmpeg that writes `path`: every way it can fail becomes one error that names `path`."""

    def __init__(self, arguments: Sequence[str], path: Path) -> None:
        self._path = path
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 -- not a pipe: nobody would empty it while we send frames
        self._process = _popen(["-loglevel", "error", "-y", *arguments], self._log)

    def send(self, data: memoryview) -> None:
        assert self._process.stdin is not None
        rest = data.cast("B")
        try:
            while rest:
                rest = rest[os.write(self._process.stdin.fileno(), rest) :]
        except BrokenPipeError:
            self._wait()
            raise self._failure() from None

    def finish(self) -> str:
        """End the input, wait for ffmpeg to end, and return what it printed."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._wait()
        output = self._process.stdout.read().decode(errors="replace")  # a few lines: they fit the pipe
        if self._process.returncode != 0:
            raise self._failure()
        return output

    def kill(self) -> None:
        """Make sure that the process is gone and its files are closed; harmless if it has ended."""
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
        self._process.kill()
        self._process.wait()
        self._log.close()

    def _wait(self) -> None:
        try:
            self._process.wait(timeout=_FINISH_SECONDS)
        except subprocess.TimeoutExpired:
            raise UserError(f"cannot write {self._path}: ffmpeg hangs; is the disk reachable?") from None

    def _failure(self) -> Exception:
        message = _read_log(self._log)
        for code in _DISK_ERRORS:
            if os.strerror(code) in message:
                return OSError(code, os.strerror(code), str(self._path))
        reason = _last_line(message) or f"exit code {self._process.returncode}"
        return UserError(f"cannot write {self._path}: ffmpeg stopped ({reason}); check the disk and the ffmpeg build")


def _popen(arguments: Sequence[str], log: IO[bytes]) -> subprocess.Popen[bytes]:
    """Start ffmpeg with pipes for input and output.

    In a session of its own, so that a Ctrl-C in the terminal reaches us alone and we decide what becomes of the file;
    should we be killed, the end of its input still ends ffmpeg.
    """
    try:
        executable = imageio_ffmpeg.get_ffmpeg_exe()
        return subprocess.Popen(
            [executable, "-hide_banner", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            bufsize=0,
            start_new_session=True,
        )
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"cannot start ffmpeg ({error}): pip install imageio-ffmpeg, or set IMAGEIO_FFMPEG_EXE"
        ) from None


def _read_log(log: IO[bytes]) -> str:
    log.seek(0)
    return log.read().decode(errors="replace")


def _last_line(message: str) -> str:
    lines = [re.sub(r"^\[.*?\] ", "", line.strip()) for line in message.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def _read_ppm(stream: IO[bytes]) -> np.ndarray | None:
    """The next binary PPM image of the stream as [H, W, 3], or None at its end or where it breaks off."""
    header = b"".join(stream.readline() for _ in range(3)).split()  # P6 <width> <height> 255
    if len(header) != 4:
        return None
    width, height = int(header[1]), int(header[2])
    pixels = stream.read(3 * width * height)
    if len(pixels) < 3 * width * height:
        return None
    return np.frombuffer(pixels, np.uint8).reshape(height, width, 3)


# ---- Images ----


def read_image(path: str | os.PathLike[str]) -> np.ndarray:
    """Read an image as uint8 [H, W, 3]: upright by its EXIF tag, transparency on white, 16 bits reduced to 8.

    Raises:
        UserError: if the file is missing, broken, or of a kind whose brightness scale is unknown (float).
    """
    path = Path(path)
    _require_file(path, "image")
    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened)
            image.load()
    # Pillow's decoders report broken files by any of these.
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


def fit(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize frames [T, H, W, 3] to cover height x width pixels, and cut the centre out: nothing is stretched."""
    images = [Image.fromarray(frame) for frame in to_uint8(frames)]
    fitted = [ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS) for image in images]
    return np.stack([np.asarray(image) for image in fitted]) if fitted else np.empty((0, height, width, 3), np.uint8)


def _require_file(path: Path, kind: str) -> None:
    """Raise the one-line error that Pillow and ffmpeg would not."""
    try:
        with path.open("rb") as file:
            empty = not file.read(1)
    except OSError as error:
        raise UserError(f"cannot read {kind} {path}: {error.strerror}") from None
    if empty:
        raise UserError(f"cannot read {kind} {path}: the file is empty")
