"""What is seen in a video, kept on disk: looked at once, judged as often and in as many ways as one likes.

Looking (decoding, optical flow, explaining every frame) is nearly all of the work. What was seen of a beginning is the
beginning of what is seen of the whole, so a video that was looked at whole is never opened again for a part of it.
"""

import hashlib
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from evaluation import video_metrics as video_measures
from shapes import metrics as shapes_measures
from shapes import world as shapes
from shapes.metrics import Findings
from utils import video
from utils.files import atomic_path
from utils.video import VideoReader, read_video


@dataclass(frozen=True)
class Observed:
    """What was seen in the T frames of a video.

    Attributes:
        pixels: of any video, for `video_measures.measure`: [T, number of things].
        found: of one of the miniature's world, for `shapes_measures.judge`.
        whole: whether the video ends with these frames.
    """

    pixels: np.ndarray
    found: Findings | None
    fps: float
    whole: bool

    def beginning(self, num_frames: int | None) -> "Observed":
        """Its first frames; everything for None."""
        if num_frames is None or num_frames >= len(self.pixels):
            return self
        found = self.found and self.found.beginning(num_frames)
        return Observed(self.pixels[:num_frames], found, self.fps, False)


def observe(path: Path, in_shapes_world: bool, max_frames: int | None, kept: Path) -> Observed:
    """Look at the first `max_frames` frames of a video (None: at all), unless the folder `kept` has what is seen there.

    What is kept belongs to one version of the video and of the code that looks at it.

    Raises:
        ValueError: if it cannot be read, or is not of the miniature's world though it should be.
    """
    file = kept / f"{_name(path, in_shapes_world)}.npz"
    seen = _load(file)
    if seen is None or not (seen.whole or (max_frames is not None and len(seen.pixels) >= max_frames)):
        seen = look(path, in_shapes_world, max_frames)
        _save(file, seen)
    return seen.beginning(max_frames)


def look(path: Path, in_shapes_world: bool, max_frames: int | None = None) -> Observed:
    """What is seen in the first frames of a video, kept nowhere. Raises as `observe` does."""
    if in_shapes_world:
        frames, fps = read_video(path, max_frames)
        pixels, found = video_measures.observe(frames), shapes_measures.explain(frames)
    else:
        with VideoReader(path, max_frames) as reader:
            pixels, found, fps = video_measures.observe(reader), None, reader.fps
    return Observed(pixels, found, fps, max_frames is None or len(pixels) < max_frames)


def _name(path: Path, in_shapes_world: bool) -> str:
    status = path.stat()
    words = path.resolve(), status.st_size, status.st_mtime_ns, in_shapes_world, _code()
    return hashlib.sha256(repr(words).encode()).hexdigest()[:32]


@cache
def _code() -> str:
    """Of the code that looks."""
    sources = (Path(str(module.__file__)).read_bytes() for module in (shapes, shapes_measures, video, video_measures))
    return hashlib.sha256(b"".join(sources)).hexdigest()


def _save(file: Path, seen: Observed) -> None:
    found = {f"found_{f.name}": getattr(seen.found, f.name) for f in fields(Findings)} if seen.found else {}
    with atomic_path(file) as temporary:
        np.savez(temporary, pixels=seen.pixels, fps=seen.fps, whole=seen.whole, **found)


def _load(file: Path) -> Observed | None:
    """None if there is nothing, or nothing that can be read."""
    try:
        with np.load(file) as stored:
            columns = [stored[name] for f in fields(Findings) if (name := f"found_{f.name}") in stored]
            found = Findings(*columns) if columns else None
            return Observed(stored["pixels"], found, float(stored["fps"]), bool(stored["whole"]))
    except (OSError, EOFError, ValueError, KeyError, BadZipFile):
        return None
