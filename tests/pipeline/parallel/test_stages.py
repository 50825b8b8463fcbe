"""pipeline/parallel/stages.py: who does what, for any number of ranks."""

import pytest

from pipeline.parallel.stages import describe, plan_pipelines, split_caches
from pipeline.schedule import Schedule


@pytest.mark.parametrize("leading_steps", [0, 2, 3])
@pytest.mark.parametrize("num_steps", [1, 2, 4, 6])
def test_every_cache_has_one_rank_and_every_rank_something_to_do(num_steps, leading_steps):
    schedule = Schedule(num_steps, 5, leading_steps=min(leading_steps, num_steps))
    for num_ranks in range(1, 20):
        pipelines = plan_pipelines(num_ranks, schedule)
        assert sorted(rank for p in pipelines for rank in p.ranks) == list(range(num_ranks))
        for pipeline in pipelines:
            assert [cache for _, caches in pipeline.stages for cache in caches] == schedule.caches
            assert all(caches for _, caches in pipeline.stages)


def test_four_steps():
    schedule = Schedule(4, 5)
    assert describe(plan_pipelines(1, schedule), schedule) == "rank 0: text, steps 0-3, decoding"
    assert describe(plan_pipelines(2, schedule), schedule) == "rank 0: text, steps 0-1\nrank 1: steps 2-3, decoding"
    assert describe(plan_pipelines(3, schedule), schedule).splitlines()[-1] == "rank 2: steps 2-3, decoding"
    six = describe(plan_pipelines(6, schedule), schedule).splitlines()
    assert six[0] == "rank 0: step 0" and six[3:] == ["rank 3: step 3", "rank 4: decoding", "rank 5: text"]
    assert "rank 6: pipeline 1: text, steps 0-3, decoding" in describe(plan_pipelines(7, schedule), schedule)


def test_block_first_is_one_stage():
    schedule = Schedule(4, 5, method="block_first")
    assert describe(plan_pipelines(3, schedule), schedule).splitlines() == [
        "rank 0: steps 0-3",
        "rank 1: decoding",
        "rank 2: text",
    ]


def test_the_slowest_rank_has_as_little_as_possible():
    assert split_caches(Schedule(6, 5), 4) == [(0,), (1,), (2, 3), (4, 5)]
    assert split_caches(Schedule(4, 5, leading_steps=2), 2) == [(0,), (2, 3)]  # 3 passes a block, and 4


def test_neighbours():
    schedule = Schedule(4, 5)
    [two] = plan_pipelines(2, schedule)
    assert two.neighbours(0) == (None, 1) and two.neighbours(1) == (0, None)
    [five] = plan_pipelines(5, schedule)
    assert five.neighbours(3) == (2, 4)
