"""Per-frame measurements of a video, cached on disk.

Decoding and optical flow take nearly all the time of an evaluation, so measurements are stored. Each frame is measured
from itself and earlier frames only. The measurements of a whole video therefore serve evaluations of its beginning.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol
from zipfile import BadZipFile

import numpy as np

from evaluation import video_metrics
from evaluation.metrics import Metric, MetricCurve
from utils import clips
from utils.clips import VideoReader, read_video
from utils.files import atomic_path

_DETECTION = "found_"  # prefix of a detection's array in a cache file


class World(Protocol):
    """A synthetic world: the prompt of a video determines its ground truth. Implementations must be picklable."""

    @property
    def metrics(self) -> Sequence[Metric]:
        """The metrics that compare a video with the ground truth."""

    @property
    def plotted_curves(self) -> Sequence[str]:
        """Names of the curves to plot over time."""

    @property
    def source_files(self) -> Sequence[Path]:
        """The Python files that determine the result of `detect`."""

    def is_caption(self, prompt: str) -> bool:
        """Return whether a prompt describes a scene of this world."""

    def detect(self, frames: np.ndarray) -> dict[str, np.ndarray]:
        """Detect objects in frames, uint8 [T, H, W, 3]; return named arrays with one row per frame.

        Raises:
            ValueError: if the frames do not fit this world, for example in size.
        """

    def curves(self, detections: Mapping[str, np.ndarray], prompt: str, block_frames: int) -> dict[str, MetricCurve]:
        """Compare detections with the scene that a prompt describes; `block_frames` are latent frames per block."""


@dataclass(frozen=True)
class FrameMeasurements:
    """Measurements of the first T pixel frames of a video.

    Attributes:
        pixels: input of `video_metrics.pixel_curves`, float [T, K].
        detections: input of `World.curves`, arrays [T, ...]; None if measured without a world.
        fps: frames per second.
        complete: whether these are all frames of the video.
    """

    pixels: np.ndarray
    detections: Mapping[str, np.ndarray] | None
    fps: float
    complete: bool

    def beginning(self, num_frames: int | None) -> "FrameMeasurements":
        """Return the measurements of the first frames; all of them for None."""
        if num_frames is None or num_frames >= len(self.pixels):
            return self
        detections = self.detections
        if detections is not None:
            detections = {name: rows[:num_frames] for name, rows in detections.items()}
        return FrameMeasurements(self.pixels[:num_frames], detections, self.fps, False)


def cached_measurements(
    path: Path, world: World | None, max_frames: int | None, cache_folder: Path
) -> FrameMeasurements:
    """Return the measurements of a video from the cache, or measure the video and cache the result.

    A cache entry is valid for one version of the video file and of the measuring code.

    Args:
        world: the world to detect objects of; None measures pixels only.
        max_frames: measure only the first frames; None for all.

    Raises:
        UserError: if the video cannot be read.
        ValueError: if its frames do not fit `world`.
    """
    file = cache_folder / f"{_cache_key(path, world)}.npz"
    found = _load(file)
    if found is None or not (found.complete or (max_frames is not None and len(found.pixels) >= max_frames)):
        found = measure_file(path, world, max_frames)
        _save(file, found)
    return found.beginning(max_frames)


def measure_file(path: Path, world: World | None, max_frames: int | None = None) -> FrameMeasurements:
    """Measure the first frames of a video without a cache; arguments and errors as in `cached_measurements`."""
    if world is not None:
        frames, fps = read_video(path, max_frames)
        pixels, detections = video_metrics.measure_frames(frames), world.detect(frames)
    else:
        with VideoReader(path, max_frames) as reader:
            pixels, detections, fps = video_metrics.measure_frames(reader), None, reader.fps
    return FrameMeasurements(pixels, detections, fps, max_frames is None or len(pixels) < max_frames)


def _cache_key(path: Path, world: World | None) -> str:
    status = path.stat()
    sources = (str(clips.__file__), str(video_metrics.__file__), *(map(str, world.source_files) if world else ()))
    parts = path.resolve(), status.st_size, status.st_mtime_ns, world is not None, _code_hash(sources)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


@cache
def _code_hash(sources: tuple[str, ...]) -> str:
    return hashlib.sha256(b"".join(Path(source).read_bytes() for source in sources)).hexdigest()


def _save(file: Path, measurements: FrameMeasurements) -> None:
    arrays: dict[str, Any] = {_DETECTION + name: rows for name, rows in (measurements.detections or {}).items()}
    arrays |= {"pixels": measurements.pixels, "fps": measurements.fps, "whole": measurements.complete}
    with atomic_path(file) as temporary:
        np.savez(temporary, **arrays)


def _load(file: Path) -> FrameMeasurements | None:
    """Return the content of a cache file; None if it is missing or damaged."""
    try:
        with np.load(file) as stored:
            names = [name for name in stored.files if name.startswith(_DETECTION)]
            detections = {name.removeprefix(_DETECTION): stored[name] for name in names} or None
            return FrameMeasurements(stored["pixels"], detections, float(stored["fps"]), bool(stored["whole"]))
    except (OSError, EOFError, ValueError, KeyError, BadZipFile):
        return None
