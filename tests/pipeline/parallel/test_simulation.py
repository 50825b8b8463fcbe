"""pipeline/parallel/simulation.py: predictions that can be computed by hand."""

from functools import partial

import pytest

from pipeline.parallel.profile import Span
from pipeline.parallel.simulation import OpTimes, median_times, prediction_table, simulate
from pipeline.schedule import Schedule

UNIT = OpTimes({0: 1.0}, {0: 1.0}, {0: 0.0})


def test_one_rank_takes_the_sum_of_all_ops():
    for schedule in (Schedule(4, 10), Schedule(4, 10, method="block_first")):
        passes = len(list(schedule.ops()))
        prediction = simulate(schedule, 1, UNIT)
        assert prediction.total == prediction.work == passes and prediction.busy == [1.0]


def test_four_ranks_approach_two_passes_per_block():
    """With four steps, the limits are 2.5 times block-first's and 4 times timestep-first's speed on one rank."""
    blocks = 400
    pipelined = simulate(Schedule(4, blocks), 4, UNIT)
    assert pipelined.total / blocks == pytest.approx(2, rel=0.02)
    assert simulate(Schedule(4, blocks), 1, UNIT).total / pipelined.total == pytest.approx(4, rel=0.02)
    block_first = simulate(Schedule(4, blocks, method="block_first"), 1, UNIT)
    assert block_first.total / pipelined.total == pytest.approx(2.5, rel=0.02)


def test_the_first_block_arrives_after_its_steps_and_later_if_ranks_send_after_the_write():
    assert simulate(Schedule(4, 10), 4, UNIT).first_block == 4
    assert simulate(Schedule(4, 10), 4, UNIT, transfer_seconds=0.5).first_block == 5.5
    assert simulate(Schedule(4, 10), 4, UNIT, send_after_write=True).first_block == 7


def test_a_slow_decoder_limits_the_speed():
    slow = OpTimes({0: 1.0}, {0: 1.0}, {0: 5.0})
    blocks = 200
    assert simulate(Schedule(4, blocks), 5, slow).total / blocks == pytest.approx(5, rel=0.05)
    assert simulate(Schedule(4, blocks), 4, slow).total / blocks == pytest.approx(7, rel=0.05)  # plus two passes


def test_fused_passes_use_their_own_time():
    times = OpTimes({0: 1.0}, {0: 1.0}, {0: 0.0}, context_and_denoise={0: 1.2})
    blocks = 100
    assert simulate(Schedule(4, blocks), 4, times, fuse_context=True).total / blocks == pytest.approx(1.2, rel=0.05)


def test_the_table_has_a_column_for_each_prediction():
    times = OpTimes({0: 1.0}, {0: 1.0}, {0: 0.0}, context_and_denoise={0: 1.2})
    predict = partial(simulate, Schedule(4, 30), times=times)
    row = [cell.strip() for cell in prediction_table(predict, 3, 900).splitlines()[-1].strip("|").split("|")]
    totals = [predict(num_ranks=3, **{key: True}).total for key in ("send_after_write", "fuse_context")]
    total = predict(num_ranks=3).total
    assert row[0] == "3" and row[2] == f"{900 / total:.2f}"
    assert row[4:] == [f"{900 / seconds:.2f} frames/s" for seconds in totals] and len({total, *totals}) == 3


@pytest.mark.parametrize(
    "options", [dict(leading_blocks=2), dict(leading_steps=2), dict(prefix_blocks=2), dict(context="input")]
)
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 6])
def test_the_work_does_not_depend_on_the_number_of_ranks(options, num_ranks):
    schedule = Schedule(4, 9, **options)
    prediction = simulate(schedule, num_ranks, UNIT)
    assert prediction.work == len(list(schedule.ops())) and prediction.total >= prediction.work / 4


def test_op_times_are_medians_per_block():
    durations = [("denoise", 0, 1.0), ("denoise", 0, 3.0), ("denoise", 0, 2.0), ("denoise", 4, 7.0), ("send", 1, 0.5)]
    times = median_times(Span(name, block, 10.0, 10.0 + seconds) for name, block, seconds in durations)
    assert times.seconds("denoise", 0) == 2 and times.seconds("denoise", 9) == 7 and times.send == 0.5
