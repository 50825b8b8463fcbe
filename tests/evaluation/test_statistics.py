"""Bootstrap: intervals that cover, groups that stay together, pairs that cancel."""

import math

import numpy as np
import pytest

from evaluation.statistics import GroupedSum, estimate, estimate_difference


def test_the_mean_weighs_by_count_and_the_interval_holds_it():
    parts = [GroupedSum("a", 3, 4), GroupedSum("b", 1, 4), GroupedSum("c", 0, 0)]
    result = estimate(parts)
    assert result.mean == 0.5 and result.low == 0.25 and result.high == 0.75 and result.num_videos == 2
    assert estimate(parts) == result


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    """95 of 100 nominally; the percentile bootstrap of 30 groups covers a little less."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        values = rng.normal(1.0, 2.0, size=30)
        result = estimate([GroupedSum(i, value, 1) for i, value in enumerate(values)])
        covered += result.low <= 1.0 <= result.high
    assert 178 <= covered <= 198


def test_seeds_of_a_prompt_are_drawn_together():
    """Copies of a video under the same prompt are no new evidence; under new prompts they would be."""
    rng = np.random.default_rng(1)
    values = rng.normal(size=20)
    once = estimate([GroupedSum(i, value, 1) for i, value in enumerate(values)])
    copied = estimate([GroupedSum(i, value, 1) for i, value in enumerate(values) for _ in range(9)])
    spread = estimate([GroupedSum((i, k), value, 1) for i, value in enumerate(values) for k in range(9)])
    assert copied.mean == pytest.approx(once.mean)
    assert (copied.low, copied.high) == pytest.approx((once.low, once.high))
    assert spread.high - spread.low < 0.5 * (once.high - once.low)


def test_a_small_difference_shows_in_pairs_where_the_means_overlap():
    rng = np.random.default_rng(2)
    hard = rng.normal(0, 5, size=40)
    one = [GroupedSum(i, value, 1) for i, value in enumerate(hard)]
    other = [
        GroupedSum(i, value + 0.5 + 0.1 * noise, 1)
        for i, (value, noise) in enumerate(zip(hard, rng.normal(size=40), strict=True))
    ]
    result = estimate_difference(other, one)
    assert result.excludes_zero and result.mean == pytest.approx(0.5, abs=0.1)
    assert estimate(other).low < estimate(one).high  # by themselves they could be the same
    assert not estimate_difference(one, one).excludes_zero


def test_nothing_counted_is_no_number():
    result = estimate([GroupedSum("a", 0, 0), GroupedSum("b", 0, 0)])
    assert math.isnan(result.mean) and math.isnan(result.low) and result.num_videos == 0


def test_parts_that_do_not_pair_are_refused():
    with pytest.raises(ValueError, match="paired"):
        estimate_difference([GroupedSum("a", 1, 1)], [GroupedSum("b", 1, 1)])
