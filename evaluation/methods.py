"""Methods to compare: a method is the measured videos of one folder."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from evaluation.metrics import Metric, MetricCurve, SumCount
from evaluation.statistics import CurveEstimate, Estimate, GroupedSum, estimate, estimate_curve, estimate_difference
from evaluation.videos import VideoKey


@dataclass(frozen=True)
class MeasuredVideo:
    """A video with its metrics.

    Attributes:
        file: the file's name.
        sums: contribution to each metric, by name.
        curves: metrics over time, by name.
        fps: frames per second.
    """

    key: VideoKey
    file: str
    sums: dict[str, SumCount]
    curves: dict[str, MetricCurve]
    fps: float = 16.0


@dataclass
class Method:
    """The measured videos of one folder: one column of the tables."""

    label: str
    videos: list[MeasuredVideo] = field(default_factory=list)
    folder: str = ""

    def grouped_sums(self, metric: str, keys: Sequence[VideoKey] | None = None) -> list[GroupedSum]:
        """Return each video's contribution to a metric; with `keys`, only those videos, in that order."""
        by_key = {video.key: video for video in self.videos}
        videos = self.videos if keys is None else [by_key[key] for key in keys]
        return [GroupedSum(video.key.prompt, *video.sums[metric]) for video in videos]

    def estimate(self, metric: str) -> Estimate:
        """Estimate the mean of a metric over all videos."""
        return estimate(self.grouped_sums(metric))

    @property
    def fps(self) -> float:
        """Frames per second of the first video, used for all."""
        return self.videos[0].fps

    def mean_curve(self, name: str, window: int) -> CurveEstimate:
        """Average a curve over all videos and over windows of `window` pixel frames; NaN where no frame is valid."""
        length = max(len(video.curves[name].value) for video in self.videos) // window
        totals, counts = np.zeros((2, len(self.videos), length))
        for row, video in enumerate(self.videos):
            curve = video.curves[name]
            num_windows = min(length, len(curve.value) // window)
            shape, end = (num_windows, window), num_windows * window
            totals[row, :num_windows] = np.where(curve.valid, curve.value, 0)[:end].reshape(shape).sum(1)
            counts[row, :num_windows] = curve.valid[:end].reshape(shape).sum(1)
        return estimate_curve([video.key.prompt for video in self.videos], totals, counts)


def common_keys(one: Method, other: Method) -> list[VideoKey]:
    """Return the keys for which both methods have a video."""
    keys = {video.key for video in other.videos}
    return [video.key for video in one.videos if video.key in keys]


def compare_methods(minuend: Method, subtrahend: Method, metrics: Sequence[Metric]) -> dict[str, Estimate]:
    """Estimate the difference of every metric over the videos that both methods have; empty if there are none."""
    keys = common_keys(minuend, subtrahend)
    if not keys:
        return {}
    return {
        m.name: estimate_difference(minuend.grouped_sums(m.name, keys), subtrahend.grouped_sums(m.name, keys))
        for m in metrics
    }
