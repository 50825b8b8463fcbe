"""Means with bootstrap confidence intervals, for groups of videos (several seeds of one prompt)."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np

NUM_RESAMPLES = 2000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean with its confidence interval; all three are NaN if there are no values."""

    mean: float
    low: float
    high: float
    num_videos: int  # videos with at least one value

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of zero. A difference is then significant."""
        return bool(self.low > 0 or self.high < 0)


@dataclass(frozen=True)
class GroupedSum:
    """One video's contribution to a mean: the sum and the number of its values.

    Attributes:
        group: the prompt. Videos of one group are resampled together.
    """

    group: Hashable
    total: float
    count: float


def estimate(sums: Sequence[GroupedSum]) -> Estimate:
    """Return the ratio of totals to counts with a percentile bootstrap interval.

    Groups are resampled instead of videos, because seeds of one prompt succeed and fail together (Davison and Hinkley
    1997, section 3.8). The resampling has a fixed seed: equal sums give equal intervals.
    """
    totals, counts = _sum_by_group([sums])
    means = _resampled_means(totals[0], counts[0], _group_counts(totals.shape[1]))
    num_videos = sum(video.count > 0 for video in sums)
    return Estimate(_ratio(totals[0].sum(), counts[0].sum()), *_interval(means), num_videos)


def estimate_difference(sums: Sequence[GroupedSum], others: Sequence[GroupedSum]) -> Estimate:
    """Return the mean of `sums` minus the mean of `others`; entry i of both has the same prompt and seed.

    Raises:
        ValueError: if the groups of the two differ.
    """
    if [video.group for video in sums] != [video.group for video in others]:
        raise ValueError("paired sums must have the same groups in the same order")
    totals, counts = _sum_by_group([sums, others])
    weights = _group_counts(totals.shape[1])
    means = [_resampled_means(total, count, weights) for total, count in zip(totals, counts, strict=True)]
    mean = _ratio(totals[0].sum(), counts[0].sum()) - _ratio(totals[1].sum(), counts[1].sum())
    num_videos = sum(a.count > 0 and b.count > 0 for a, b in zip(sums, others, strict=True))
    return Estimate(mean, *_interval(means[0] - means[1]), num_videos)


class CurveEstimate(NamedTuple):
    """A mean over time with its confidence interval at every point, three arrays [points]; NaN without values."""

    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def estimate_curve(groups: Sequence[Hashable], totals: np.ndarray, counts: np.ndarray) -> CurveEstimate:
    """Return the ratio of totals to counts at every point, with percentile bootstrap intervals as in `estimate`.

    Args:
        groups: the group (prompt) of each video.
        totals, counts: sums and numbers of the values of each video at each point, [videos, points].
    """
    totals, counts = _sum_rows(groups, totals), _sum_rows(groups, counts)
    means = _resampled_means(totals, counts, _group_counts(len(totals)))  # [resamples, points]
    low, high = np.full((2, means.shape[1]), np.nan)
    tail = (1 - CONFIDENCE) / 2
    missing = np.isnan(means)
    complete, partial = ~missing.any(axis=0), missing.any(axis=0) & ~missing.all(axis=0)
    for points, quantile in ((complete, np.quantile), (partial, np.nanquantile)):  # nanquantile is slow
        if points.any():
            low[points], high[points] = quantile(means[:, points], [tail, 1 - tail], axis=0)
    return CurveEstimate(_divide(totals.sum(0), counts.sum(0)), low, high)


def _sum_rows(groups: Sequence[Hashable], rows: np.ndarray) -> np.ndarray:
    """Sum the rows [videos, points] of every group; returns [groups, points]."""
    number = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    sums = np.zeros((len(number), rows.shape[1]))
    np.add.at(sums, [number[group] for group in groups], rows)
    return sums


def _sum_by_group(samples: Sequence[Sequence[GroupedSum]]) -> tuple[np.ndarray, np.ndarray]:
    """Return totals and counts, [samples, groups] each."""
    number = {group: i for i, group in enumerate(dict.fromkeys(video.group for video in samples[0]))}
    totals, counts = np.zeros((2, len(samples), len(number)))
    for row, sums in enumerate(samples):
        for video in sums:
            totals[row, number[video.group]] += video.total
            counts[row, number[video.group]] += video.count
    return totals, counts


@cache
def _group_counts(num_groups: int) -> np.ndarray:
    """Return how often each resample contains each group, [resamples, groups]."""
    rng = np.random.default_rng(0)
    return rng.multinomial(num_groups, np.full(num_groups, 1 / num_groups), size=NUM_RESAMPLES)


def _resampled_means(totals: np.ndarray, counts: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return _divide(weights @ totals, weights @ counts)


def _divide(totals: np.ndarray, counts: np.ndarray) -> np.ndarray:
    return np.divide(totals, counts, out=np.full(counts.shape, np.nan), where=counts > 0)


def _ratio(total: float, count: float) -> float:
    return float(total / count) if count > 0 else float("nan")


def _interval(means: np.ndarray) -> tuple[float, float]:
    if np.isnan(means).all():
        return float("nan"), float("nan")
    tail = (1 - CONFIDENCE) / 2
    low, high = np.nanquantile(means, [tail, 1 - tail])
    return float(low), float(high)
