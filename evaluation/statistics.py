"""Means with bootstrap confidence intervals, over videos that come in groups (several seeds of one prompt)."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

NUM_RESAMPLES = 2000
LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean with its confidence interval."""

    mean: float  # NaN where nothing counted
    low: float
    high: float
    num_videos: int  # that anything counted in

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of zero: for a difference, that it is significant."""
        return bool(self.low > 0 or self.high < 0)


@dataclass(frozen=True)
class Part:
    """What one video contributes to a mean: the sum of its values and how many there are."""

    group: Hashable  # the prompt: videos of a group are drawn together
    total: float
    count: float


def estimate(parts: Sequence[Part]) -> Estimate:
    """Sum of totals over sum of counts, with a percentile interval from resampling groups with replacement.

    Groups and not videos are resampled, because seeds of one prompt succeed and fail together (Davison and Hinkley
    1997, section 3.8). The resampling is seeded: the same parts give the same interval.
    """
    totals, counts = _by_group([parts])
    means = _resampled(totals[0], counts[0], _weights(totals.shape[1]))
    num_videos = sum(part.count > 0 for part in parts)
    return Estimate(_ratio(totals[0].sum(), counts[0].sum()), *_interval(means), num_videos)


def difference(parts: Sequence[Part], others: Sequence[Part]) -> Estimate:
    """Mean of `parts` minus mean of `others`, pair by pair: part i of both is of the same prompt and seed.

    Raises:
        ValueError: if the groups of the two do not correspond.
    """
    if [part.group for part in parts] != [part.group for part in others]:
        raise ValueError("paired parts must be of the same groups in the same order")
    totals, counts = _by_group([parts, others])
    weights = _weights(totals.shape[1])
    means = [_resampled(total, count, weights) for total, count in zip(totals, counts, strict=True)]
    mean = _ratio(totals[0].sum(), counts[0].sum()) - _ratio(totals[1].sum(), counts[1].sum())
    num_videos = sum(a.count > 0 and b.count > 0 for a, b in zip(parts, others, strict=True))
    return Estimate(mean, *_interval(means[0] - means[1]), num_videos)


def _by_group(samples: Sequence[Sequence[Part]]) -> tuple[np.ndarray, np.ndarray]:
    """Totals and counts [samples, groups]."""
    number = {group: i for i, group in enumerate(dict.fromkeys(part.group for part in samples[0]))}
    totals, counts = np.zeros((2, len(samples), len(number)))
    for row, parts in enumerate(samples):
        for part in parts:
            totals[row, number[part.group]] += part.total
            counts[row, number[part.group]] += part.count
    return totals, counts


@cache
def _weights(num_groups: int) -> np.ndarray:
    """How often each group is drawn in each resampling: [resamplings, groups]."""
    rng = np.random.default_rng(0)
    return rng.multinomial(num_groups, np.full(num_groups, 1 / num_groups), size=NUM_RESAMPLES)


def _resampled(totals: np.ndarray, counts: np.ndarray, weights: np.ndarray) -> np.ndarray:
    sums = weights @ counts
    return np.divide(weights @ totals, sums, out=np.full(len(weights), np.nan), where=sums > 0)


def _ratio(total: float, count: float) -> float:
    return float(total / count) if count > 0 else float("nan")


def _interval(means: np.ndarray) -> tuple[float, float]:
    if np.isnan(means).all():
        return float("nan"), float("nan")
    tail = (1 - LEVEL) / 2
    low, high = np.nanquantile(means, [tail, 1 - tail])
    return float(low), float(high)
