"""Comparing folders of videos: what is measured, how it is summed up, and the tables.

A method is a folder of videos, each with its record (`X.json`) beside it. Videos of two methods are paired by prompt,
seed and sample.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from utils.errors import UserError
from utils.shapes_measures import STILL, Curve
from utils.statistics import Estimate, Part, difference, estimate


@dataclass(frozen=True)
class Figure:
    """One row of the table."""

    name: str
    meaning: str
    unit: str = "%"
    scale: float = 100.0
    digits: int = 1


FIGURES = (
    Figure("presence", "frames in which a shape is there"),
    Figure("shape", "of those, with the right shape"),
    Figure("color", "of those, in the right colour"),
    Figure("direction", "of those, moving in the right direction"),
    Figure("speed", "of those, at the right one of the speeds"),
    Figure("speed_ratio", "speed along the right direction over the prompt's", "x", 1.0, 2),
    Figure("background", "frames with the right background"),
    Figure("grading", "frames whose background is graded or plain, as it should be"),
    Figure("overlap", "overlap with the best fitting shape"),
    Figure("color_error", "shape's colour against the prompt's", "of 255", 1.0, 1),
    Figure("background_error", "background against the prompt's", "of 255", 1.0, 1),
    Figure("motion", "pixel change per frame", "of 255", 1.0, 2),
    Figure("moving", f"frames in which the shape moves faster than {STILL} pixels"),
    Figure("color_drift", "shape's colour, last quarter against first", "of 255", 1.0, 1),
    Figure("background_drift", "background, last quarter against first", "of 255", 1.0, 1),
    Figure("presence_drift", "presence, last quarter minus first"),
    Figure("motion_drift", "speed_ratio, last quarter minus first", "x", 1.0, 2),
    Figure("seam", "step that departs from the usual, at block borders", "pixels", 1.0, 2),
    Figure("inside", "the same between latent frames inside blocks", "pixels", 1.0, 2),
)
# A frozen video does not drift: what drifts is never shown without what moves.
assert [f.name for f in FIGURES].index("moving") + 1 == [f.name for f in FIGURES].index("color_drift")


@dataclass(frozen=True)
class Key:
    """What a video was asked to be."""

    prompt: str
    seed: int
    sample: int


@dataclass(frozen=True)
class Measured:
    """A video's figures over time and as a whole."""

    key: Key
    file: str
    parts: dict[str, tuple[float, float]]  # figure: sum and count
    curves: dict[str, Curve]


@dataclass
class Method:
    """One column of the table."""

    label: str
    videos: list[Measured] = field(default_factory=list)
    folder: str = ""

    def parts(self, figure: str, keys: Sequence[Key] | None = None) -> list[Part]:
        """What each video contributes to a figure: all of them, or those of `keys`, in their order."""
        by_key = {video.key: video for video in self.videos}
        videos = self.videos if keys is None else [by_key[key] for key in keys]
        return [Part(video.key.prompt, *video.parts[figure]) for video in videos]

    def estimate(self, figure: str) -> Estimate:
        """A figure over all videos."""
        return estimate(self.parts(figure))

    def curve(self, name: str, window: int = 4) -> np.ndarray:
        """A figure over time: mean over videos of each `window` frames (one latent frame), NaN where nothing counts."""
        length = max(len(video.curves[name].value) for video in self.videos) // window
        totals, counts = np.zeros((2, length))
        for video in self.videos:
            curve = video.curves[name]
            windows = min(length, len(curve.value) // window)
            shape = (windows, window)
            cut = windows * window
            totals[:windows] += np.where(curve.counts, curve.value, 0)[:cut].reshape(shape).sum(1)
            counts[:windows] += curve.counts[:cut].reshape(shape).sum(1)
        return np.divide(totals, counts, out=np.full(length, np.nan), where=counts > 0)


def sum_up(curves: dict[str, Curve]) -> dict[str, tuple[float, float]]:
    """A video's contribution to every figure: sum and count over its frames, or one value of the whole video."""
    parts = {name: curve.over(0, 1) for name, curve in curves.items()}
    for name in ("color", "background"):
        parts[f"{name}_drift"] = _look_change(curves, name)
    early, late = (_mean(curves["presence"].over(*part)) for part in ((0, 0.25), (0.75, 1)))
    parts["presence_drift"] = (late - early, 1.0)
    speeds = [curves["speed_ratio"].over(*part) for part in ((0, 0.25), (0.75, 1))]
    parts["motion_drift"] = (0.0, 0.0)
    if all(count for _, count in speeds):
        parts["motion_drift"] = _mean(speeds[1]) - _mean(speeds[0]), 1.0
    return {figure.name: parts[figure.name] for figure in FIGURES}


def _look_change(curves: dict[str, Curve], name: str) -> tuple[float, float]:
    """Distance between the mean colours of the first and the last quarter, if both can be told."""
    channels = [curves[key] for key in curves if key.startswith(f"{name}_of_")]
    sums = [[channel.over(*part) for channel in channels] for part in ((0, 0.25), (0.75, 1))]
    if not all(count for quarter in sums for _, count in quarter):
        return 0.0, 0.0
    early, late = (np.array([_mean(part) for part in quarter]) for quarter in sums)
    return float(np.abs(late - early).mean()), 1.0


def _mean(part: tuple[float, float]) -> float:
    return part[0] / part[1] if part[1] else 0.0


# ---- Folders ----


def find_videos(folder: str) -> list[tuple[Path, Key, dict]]:
    """The videos of a folder with their keys and records, sorted by key.

    Raises:
        UserError: if there are none, one has no record, or two are of the same prompt, seed and sample.
    """
    if not Path(folder).is_dir():
        raise UserError(f"no folder {folder}")
    found: dict[Key, tuple[Path, Key, dict]] = {}
    for video in sorted(
        path
        for path in Path(folder).glob("*.mp4")
        if not path.name.startswith(".") and not path.name.endswith(".unfinished.mp4")
    ):
        path = video.with_suffix(".json")
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            key = Key(record["prompt"], int(record["config"]["runtime"]["seed"]), int(record["sample"]))
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(
                f"{video} has no record {path.name} that states its prompt, seed and sample; inference.py and "
                "scripts/sample_teacher.py write one"
            ) from None
        if key in found:
            raise UserError(f"{found[key][0]} and {video} are of the same prompt, seed and sample; remove one")
        found[key] = video, key, record
    if not found:
        raise UserError(f"no videos in {folder}; make some with inference.py")
    return [found[key] for key in sorted(found, key=lambda k: (k.prompt, k.seed, k.sample))]


def common_keys(one: Method, other: Method) -> list[Key]:
    """The keys that both methods have a video of."""
    keys = {video.key for video in other.videos}
    return [video.key for video in one.videos if video.key in keys]


# ---- Tables ----


def table(methods: Sequence[Method]) -> str:
    """Markdown: a row per figure, a column per method, each a mean with its 95% interval."""
    rows = [["", *(f"{m.label} ({len(m.videos)} videos)" for m in methods)]]
    for figure in FIGURES:
        cells = [show(method.estimate(figure.name), figure) for method in methods]
        rows.append([f"{figure.name} [{figure.unit}]", *cells])
    return markdown(rows)


def pair_table(methods: Sequence[Method]) -> str:
    """Markdown: every later method minus the first, over the videos that both have; * marks what excludes zero."""
    first, rest = methods[0], [(m, common_keys(m, methods[0])) for m in methods[1:]]
    rows = [[f"minus {first.label}", *(f"{m.label} ({len(keys)} pairs)" for m, keys in rest)]]
    for figure in FIGURES:
        cells = []
        for method, keys in rest:
            if not keys:
                cells.append("no pairs")
                continue
            result = difference(method.parts(figure.name, keys), first.parts(figure.name, keys))
            cells.append(show(result, figure) + (" *" if result.excludes_zero else ""))
        rows.append([f"{figure.name} [{figure.unit}]", *cells])
    return markdown(rows)


def show(result: Estimate, figure: Figure) -> str:
    """An estimate as text, in the figure's unit."""
    if np.isnan(result.mean):
        return "-"
    mean, low, high = (f"{figure.scale * x:.{figure.digits}f}" for x in (result.mean, result.low, result.high))
    return f"{mean} [{low}, {high}]"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table whose columns line up in a terminal too; the first row is its head."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])
