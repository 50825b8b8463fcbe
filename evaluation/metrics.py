"""Metrics of a video: curves with one value per frame, and their reduction to one number."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class SumCount(NamedTuple):
    """The sum of some values and the number of values: one video's contribution to a mean."""

    total: float
    num_values: float


NO_VALUES = SumCount(0.0, 0.0)


@dataclass(frozen=True)
class MetricCurve:
    """A metric over time.

    Attributes:
        value: one value per pixel frame, float [T].
        valid: the frames that count, bool [T].
    """

    value: np.ndarray
    valid: np.ndarray

    def sum_between(self, start: float, end: float) -> SumCount:
        """Sum the valid values between two fractions (0 to 1) of the video."""
        section = slice(round(start * len(self.value)), round(end * len(self.value)))
        valid = self.valid[section]
        return SumCount(float(self.value[section][valid].sum()), float(valid.sum()))


def mean_over_frames(curves: Sequence[MetricCurve]) -> SumCount:
    """Sum one curve over all valid frames. In a mean over videos, every frame then has the same weight."""
    [curve] = curves
    return curve.sum_between(0, 1)


def quarter_change(curves: Sequence[MetricCurve]) -> SumCount:
    """Return one curve's mean over the last quarter minus its mean over the first; `NO_VALUES` without valid frames."""
    [curve] = curves
    early, late = curve.sum_between(0, 0.25), curve.sum_between(0.75, 1)
    if not (early.num_values and late.num_values):
        return NO_VALUES
    return SumCount(late.total / late.num_values - early.total / early.num_values, 1.0)


def quarter_distance(curves: Sequence[MetricCurve]) -> SumCount:
    """Return the mean over several curves of the absolute `quarter_change`; `NO_VALUES` if one has none."""
    changes = [quarter_change([curve]) for curve in curves]
    if not all(change.num_values for change in changes):
        return NO_VALUES
    return SumCount(float(np.mean([abs(change.total) for change in changes])), 1.0)


def start_end_contrast(curves: Sequence[MetricCurve]) -> SumCount:
    """Return a curve's absolute difference between the first and the last 15% of a video (arXiv 2504.12626, eq. 7)."""
    [curve] = curves
    start, end = curve.sum_between(0, 0.15), curve.sum_between(0.85, 1)
    if not (start.num_values and end.num_values):
        return NO_VALUES
    return SumCount(abs(start.total / start.num_values - end.total / end.num_values), 1.0)


_MOTION = (
    *("direction", "speed", "speed_ratio", "moving"),
    *("motion", "flow", "static", "smoothness", "warp_error"),
)


@dataclass(frozen=True)
class Metric:
    """One row of the tables.

    Attributes:
        meaning: a short explanation, for the report.
        unit: unit of the printed value: `scale` times the mean, with `digits` decimals.
        inputs: names of the curves that the metric is computed from; default: the curve of its own name.
        reduce: computes one video's contribution from these curves. Contributions of videos are pooled.
    """

    name: str
    meaning: str
    unit: str = "%"
    scale: float = 100.0
    digits: int = 1
    inputs: tuple[str, ...] = ()
    reduce: Callable[[Sequence[MetricCurve]], SumCount] = mean_over_frames

    @property
    def title(self) -> str:
        """The name with its unit."""
        return f"{self.name} [{self.unit}]"

    @property
    def subject(self) -> str:
        """The subject under which the report shows the metric: drift, seams, motion or appearance."""
        if self.name.endswith(("_drift", "_distance", "_start_end")) or self.name.startswith(("identity_", "clip_")):
            return "drift"
        if self.name in ("seam", "inside", "pixel_seam", "pixel_inside"):
            return "seams"
        return "motion" if self.name in _MOTION else "appearance"


def video_sums(metrics: Sequence[Metric], curves: Mapping[str, MetricCurve]) -> dict[str, SumCount]:
    """Return a video's contribution to every metric, by the metric's name."""
    return {m.name: m.reduce([curves[name] for name in m.inputs or (m.name,)]) for m in metrics}
