"""evaluation/statistics.py: intervals cover the truth, groups stay together, pairs reduce the variance."""

import math

import numpy as np
import pytest

from evaluation.statistics import GroupedSum, estimate, estimate_curve, estimate_difference


def test_the_mean_is_weighted_by_count_and_lies_in_its_interval():
    sums = [GroupedSum("a", 3, 4), GroupedSum("b", 1, 4), GroupedSum("c", 0, 0)]
    result = estimate(sums)
    assert result.mean == 0.5 and result.low == 0.25 and result.high == 0.75 and result.num_videos == 2
    assert estimate(sums) == result


def test_intervals_cover_the_truth_about_95_percent_of_the_time():
    """The percentile bootstrap of 30 groups covers slightly less than its nominal 95%."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        values = rng.normal(1.0, 2.0, size=30)
        result = estimate([GroupedSum(i, value, 1) for i, value in enumerate(values)])
        covered += result.low <= 1.0 <= result.high
    assert 178 <= covered <= 198


def test_videos_of_one_prompt_are_resampled_together():
    """Copies of a video with the same prompt add no evidence; with different prompts they would."""
    rng = np.random.default_rng(1)
    values = rng.normal(size=20)
    once = estimate([GroupedSum(i, value, 1) for i, value in enumerate(values)])
    copied = estimate([GroupedSum(i, value, 1) for i, value in enumerate(values) for _ in range(9)])
    spread = estimate([GroupedSum((i, k), value, 1) for i, value in enumerate(values) for k in range(9)])
    assert copied.mean == pytest.approx(once.mean)
    assert (copied.low, copied.high) == pytest.approx((once.low, once.high))
    assert spread.high - spread.low < 0.5 * (once.high - once.low)


def test_pairs_reveal_a_small_difference_between_overlapping_means():
    rng = np.random.default_rng(2)
    hard = rng.normal(0, 5, size=40)
    one = [GroupedSum(i, value, 1) for i, value in enumerate(hard)]
    other = [
        GroupedSum(i, value + 0.5 + 0.1 * noise, 1)
        for i, (value, noise) in enumerate(zip(hard, rng.normal(size=40), strict=True))
    ]
    result = estimate_difference(other, one)
    assert result.excludes_zero and result.mean == pytest.approx(0.5, abs=0.1)
    assert estimate(other).low < estimate(one).high  # without pairing, the intervals overlap
    assert not estimate_difference(one, one).excludes_zero


def test_an_estimate_without_values_is_nan():
    result = estimate([GroupedSum("a", 0, 0), GroupedSum("b", 0, 0)])
    assert math.isnan(result.mean) and math.isnan(result.low) and result.num_videos == 0


def test_sums_of_different_groups_are_refused():
    with pytest.raises(ValueError, match="paired"):
        estimate_difference([GroupedSum("a", 1, 1)], [GroupedSum("b", 1, 1)])


# ---- Curves over time ----


def test_every_point_of_a_curve_is_an_estimate():
    """The interval of a point equals that of `estimate` on the same sums."""
    rng = np.random.default_rng(0)
    groups = [number // 2 for number in range(12)]
    totals, counts = rng.normal(size=(12, 4)), rng.integers(0, 3, (12, 4)).astype(float)
    counts[:, 3] = 0
    curve = estimate_curve(groups, totals, counts)
    for point in range(3):
        one = estimate([GroupedSum(*video) for video in zip(groups, totals[:, point], counts[:, point], strict=True)])
        assert (curve.mean[point], curve.low[point], curve.high[point]) == pytest.approx((one.mean, one.low, one.high))
    assert np.isnan([curve.mean[3], curve.low[3], curve.high[3]]).all()
