"""pipeline/parallel/simulate.py: predictions that can be made by hand."""

import pytest

from pipeline.parallel.simulate import Times, simulate, times_of
from pipeline.schedule import Schedule

UNIT = Times({0: 1.0}, {0: 1.0}, {0: 0.0})


def test_one_rank_does_everything_one_after_the_other():
    for schedule in (Schedule(4, 10), Schedule(4, 10, method="block_first")):
        passes = len(list(schedule.ops()))
        prediction = simulate(schedule, 1, UNIT)
        assert prediction.total == prediction.work == passes and prediction.busy == [1.0]


def test_the_steady_period_of_a_step_per_rank_is_two_passes():
    """2.5 times block-first's and 4 times timestep-first's on one GPU, in the limit (METHOD.md, section 3)."""
    blocks = 400
    piped = simulate(Schedule(4, blocks), 4, UNIT)
    assert piped.total / blocks == pytest.approx(2, rel=0.02)
    assert simulate(Schedule(4, blocks), 1, UNIT).total / piped.total == pytest.approx(4, rel=0.02)
    block_first = simulate(Schedule(4, blocks, method="block_first"), 1, UNIT)
    assert block_first.total / piped.total == pytest.approx(2.5, rel=0.02)


def test_the_first_block_comes_after_its_steps_or_later_if_contexts_are_waited_for():
    assert simulate(Schedule(4, 10), 4, UNIT).first_block == 4
    assert simulate(Schedule(4, 10), 4, UNIT, hop=0.5).first_block == 5.5
    assert simulate(Schedule(4, 10), 4, UNIT, late=True).first_block == 7


def test_a_slow_decoder_bounds_the_speed():
    slow = Times({0: 1.0}, {0: 1.0}, {0: 5.0})
    blocks = 200
    assert simulate(Schedule(4, blocks), 5, slow).total / blocks == pytest.approx(5, rel=0.05)
    assert simulate(Schedule(4, blocks), 4, slow).total / blocks == pytest.approx(7, rel=0.05)  # and two passes


def test_fused_passes_take_their_own_time():
    times = Times({0: 1.0}, {0: 1.0}, {0: 0.0}, joined={0: 1.2})
    blocks = 100
    assert simulate(Schedule(4, blocks), 4, times, fuse_context=True).total / blocks == pytest.approx(1.2, rel=0.05)


@pytest.mark.parametrize(
    "options", [dict(leading_blocks=2), dict(leading_steps=2), dict(prefix_blocks=2), dict(context="input")]
)
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 6])
def test_work_is_the_same_on_any_number_of_ranks(options, num_ranks):
    schedule = Schedule(4, 9, **options)
    prediction = simulate(schedule, num_ranks, UNIT)
    assert prediction.work == len(list(schedule.ops())) and prediction.total >= prediction.work / 4


def test_times_are_medians_by_block():
    times = times_of(
        [("denoise", 0, 1.0), ("denoise", 0, 3.0), ("denoise", 0, 2.0), ("denoise", 4, 7.0), ("send", 1, 0.5)]
    )
    assert times.at("denoise", 0) == 2 and times.at("denoise", 9) == 7 and times.send == 0.5
