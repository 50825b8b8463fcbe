"""pipeline/parallel/stages.py: the roles of ranks, for any number of ranks."""

import pytest

from pipeline.parallel.runner import use_one_nccl_channel
from pipeline.parallel.stages import describe_assignment, plan_pipelines, split_caches
from pipeline.parallel.work import decode_passes
from pipeline.schedule import Schedule
from utils.config_loading import load_config


@pytest.mark.parametrize("leading_steps", [0, 2, 3])
@pytest.mark.parametrize("num_steps", [1, 2, 4, 6])
def test_every_cache_has_one_rank_and_every_rank_has_a_role(num_steps, leading_steps):
    schedule = Schedule(num_steps, 5, leading_steps=min(leading_steps, num_steps))
    for num_ranks in range(1, 20):
        pipelines = plan_pipelines(num_ranks, schedule)
        assert sorted(rank for p in pipelines for rank in p.ranks) == list(range(num_ranks))
        for pipeline in pipelines:
            assert [cache for _, caches in pipeline.stages for cache in caches] == schedule.caches
            assert all(caches for _, caches in pipeline.stages)
            assert all(pipeline.roles(rank, schedule) for rank in pipeline.ranks)


def test_roles_with_four_steps():
    schedule = Schedule(4, 5)

    def lines(num_ranks: int) -> list[str]:
        return describe_assignment(plan_pipelines(num_ranks, schedule), schedule).splitlines()

    assert lines(1) == ["rank 0: text, steps 0-3, decoding"]
    assert lines(2) == ["rank 0: text, steps 0-1", "rank 1: steps 2-3, decoding"]
    assert lines(3)[-1] == "rank 2: steps 2-3, decoding"
    assert lines(6)[0] == "rank 0: step 0" and lines(6)[3:] == ["rank 3: step 3", "rank 4: decoding", "rank 5: text"]
    assert "rank 6: pipeline 1: text, steps 0-3, decoding" in lines(7)


def test_block_first_is_one_stage():
    schedule = Schedule(4, 5, method="block_first")
    assert describe_assignment(plan_pipelines(3, schedule), schedule).splitlines() == [
        "rank 0: steps 0-3",
        "rank 1: decoding",
        "rank 2: text",
    ]


def test_the_slowest_rank_has_as_few_passes_as_possible():
    assert split_caches(Schedule(6, 5), 4) == [(0,), (1,), (2, 3), (4, 5)]
    assert split_caches(Schedule(4, 5, leading_steps=2), 2) == [(0,), (2, 3)]  # 3 passes per block, and 4


def test_upstream_and_downstream_ranks():
    schedule = Schedule(4, 5)
    [two] = plan_pipelines(2, schedule)
    assert (two.upstream(0), two.downstream(0)) == (None, 1)
    assert (two.upstream(1), two.downstream(1)) == (0, None)
    [five] = plan_pipelines(5, schedule)
    assert (five.upstream(3), five.downstream(3)) == (2, 4)


@pytest.mark.parametrize(
    ("num_ranks", "decode_work", "caches", "decoder"),
    [
        (4, 0.0, [(0,), (1,), (2,), (3,)], 3),
        (4, 1.0, [(0,), (1,), (2,), (3,)], 3),  # 3 passes for the last rank; without decoding, one rank would have 4
        (4, 2.5, [(0,), (1,), (2, 3)], 3),  # the last rank only decodes; otherwise it would have 4.5 passes
        (3, 0.0, [(0,), (1,), (2, 3)], 2),
        (3, 1.0, [(0,), (1, 2), (3,)], 2),
        (2, 2.5, [(0, 1, 2), (3,)], 1),
        (2, 9.0, [(0, 1, 2, 3)], 1),
        (1, 9.0, [(0, 1, 2, 3)], 0),
        (5, 0.0, [(0,), (1,), (2,), (3,)], 4),
    ],
)
def test_decoding_counts_as_work(num_ranks, decode_work, caches, decoder):
    [pipeline] = plan_pipelines(num_ranks, Schedule(4, 5), decode_work)
    assert [group for _, group in pipeline.stages] == caches
    assert pipeline.decoder_rank == decoder and pipeline.text_rank == 0
    assert pipeline.downstream(pipeline.stage_ranks[-1]) == (None if decoder in pipeline.stage_ranks else decoder)


def test_the_work_of_decoding_is_that_of_the_counted_operations():
    """Two sizes of networks, with the counts of `benchmark.flops`. Operations of the decoder count twice."""
    wan = load_config("configs/hiar.yaml", ["model.base=absent", "video.num_output_frames=21"])
    assert decode_passes(wan) == pytest.approx(2 * 40.65 / 40.41, rel=0.02)
    miniature = load_config("configs/shapes.yaml", ["video.num_output_frames=21"])
    assert decode_passes(miniature) == pytest.approx(2 * 4.47, rel=0.2)


def test_nccl_has_one_channel_unless_the_user_has_set_channels():
    environment: dict[str, str] = {"NCCL_DEBUG": "INFO"}
    use_one_nccl_channel(environment)
    assert environment["NCCL_MAX_NCHANNELS"] == environment["NCCL_MIN_NCHANNELS"] == "1"
    for name in ("NCCL_MAX_NCHANNELS", "NCCL_MIN_P2P_NCHANNELS", "NCCL_MAX_CTAS"):
        environment = {name: "4"}
        use_one_nccl_channel(environment)
        assert environment == {name: "4"}
