"""Video files that the tests write: any codec, pixel format, timestamps, rotation, audio, or damage."""

import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

TIME_BASE = Fraction(1, 16000)  # of the timestamps of frames


def moving_square(num_frames: int, height: int = 64, width: int = 64, colour: Sequence[int] = (30, 60, 220)):
    """Return frames, uint8 [T, H, W, 3], of a red square that moves right by two pixels per frame."""
    frames = np.empty((num_frames, height, width, 3), np.uint8)
    frames[:] = colour
    for t in range(num_frames):
        left = 2 * t % (width // 2)
        frames[t, height // 4 : height // 2, left : left + width // 4] = (220, 30, 30)
    return frames


def grey_levels(levels: Sequence[int], height: int = 16, width: int = 16) -> np.ndarray:
    """Return one plain grey frame per level, uint8 [T, H, W, 3], so that a test can tell which frame it sees."""
    return np.broadcast_to(np.array(levels, np.uint8)[:, None, None, None], (len(levels), height, width, 3)).copy()


def write_video(
    path: Path,
    frames: np.ndarray,
    fps: float = 16,
    *,
    times: Sequence[float] | None = None,
    codec: str = "mpeg4",
    pix_fmt: str = "yuv420p",
    pixel_aspect: Fraction | None = None,
    audio: bool = False,
    video: bool = True,
    index_first: bool = False,
) -> Path:
    """Write frames, uint8 [T, H, W, 3], and return the path.

    Args:
        times: seconds of each frame, for a variable frame rate; default: a constant `fps`.
        pixel_aspect: width of a pixel divided by its height.
        audio: add a stream of silence.
        video: false writes the silence only.
        index_first: put an mp4's index before its frames, so that a cut file can be opened.
    """
    muxing = {"movflags": "+faststart"} if index_first else {}
    with av.open(f"file:{path}", "w", container_options=muxing) as container:
        if video:
            stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1000))
            stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pix_fmt
            stream.time_base = stream.codec_context.time_base = TIME_BASE
            if codec == "mpeg4":
                stream.codec_context.qmin = stream.codec_context.qmax = 2  # nearly without loss
            if pixel_aspect is not None:
                stream.codec_context.sample_aspect_ratio = pixel_aspect
        sound = container.add_stream("aac", rate=48000, layout="mono") if audio or not video else None
        if video:
            for index, pixels in enumerate(frames):
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
                frame.pts = round((times[index] if times else index / fps) / TIME_BASE)
                frame.time_base = TIME_BASE
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        if sound is not None:
            for start in range(0, 48000, 1024):
                silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
                silence.sample_rate, silence.pts = 48000, start
                container.mux(sound.encode(silence))
            container.mux(sound.encode(None))
    return path


def rotate_file(path: Path, degrees: int) -> None:
    """Make players turn an mp4 file clockwise by 90, 180 or 270 degrees, as phones do: in its track header (tkhd)."""
    content = bytearray(path.read_bytes())
    matrix = content.index(b"tkhd") + 44
    assert content[matrix : matrix + 4] == struct.pack(">i", 1 << 16)
    a, b, c, d = {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}[degrees]
    turn = [value << 16 for value in (a, b, 0, c, d, 0, 0, 0)] + [1 << 30]
    content[matrix : matrix + 36] = struct.pack(">9i", *turn)
    path.write_bytes(content)


def cut_off(path: Path, part: float) -> None:
    """Cut a file off after this part of its bytes."""
    content = path.read_bytes()
    path.write_bytes(content[: round(len(content) * part)])
