"""pipeline/batching.py and the batches of pipeline/rollout.py: one forward pass per diagonal.

Claims: a batch holds the ops of one diagonal, on different caches. Its latents are those of the step-major order, also
with hybrids, prefixes, prompt switches and live prompts, bit for bit for a fake denoiser. The causal DiT's are
equal up to rounding. A timestep-first video of fused ops needs one pass per diagonal.
"""

import itertools
from collections.abc import Sequence

import pytest
import test_prompt_switch as switch
import torch
from test_rollout import (
    BLOCKS,
    CASES,
    FIRST_FRAME,
    FRAME,
    VARIANTS,
    FakeDenoiser,
    case_schedule,
    fake_rollout,
    net_rollout,
    run_to_end,
)
from torch import Tensor

from model.block_pass import BlockPass
from model.denoiser import Denoiser, GuidedCache, GuidedDenoiser
from pipeline.batching import Batch, arrange, unbatched
from pipeline.lag import prompt_lag
from pipeline.prompt_switch import add_switch_ops
from pipeline.prompt_track import LivePrompts, PromptTrack
from pipeline.rollout import BlockLayout, Rollout
from pipeline.schedule import Schedule

variants = pytest.mark.parametrize("variant", VARIANTS)


class Batching:
    """Adds `run_batch` to a fake denoiser: all blocks are given before the first one is denoised."""

    def run_batch(self, passes: Sequence[BlockPass]) -> list[Tensor]:
        results = []
        for item in passes:
            arguments = item.x, item.sigma, item.first_frame, item.cache
            if item.denoise:
                results.append(self.denoise(*arguments, item.write))  # type: ignore[attr-defined]
            else:
                self.write_context(*arguments)  # type: ignore[attr-defined]
        return results


class BatchingDenoiser(Batching, FakeDenoiser):
    """The fake denoiser of test_rollout.py with batches."""


class BatchingPromptDenoiser(Batching, switch.FakeDenoiser):
    """The fake denoiser of test_prompt_switch.py with batches."""


def batching_rollout(*args, **options) -> Rollout:
    rollout = fake_rollout(*args, **options)
    rollout.denoiser = BatchingDenoiser()
    return rollout


def switching_rollout(track: PromptTrack, **options) -> Rollout:
    denoisers = {}

    def denoiser_at(block: int) -> BatchingPromptDenoiser:
        prompt = track.prompt_at(block)
        return denoisers.setdefault(prompt, BatchingPromptDenoiser(prompt, []))

    return switch.fake_rollout(track, denoiser_at=denoiser_at, **options)


# ---- Batches ----


def test_a_diagonal_of_fused_ops_is_one_batch():
    batches = list(arrange(Schedule(2, 4), "batched", fuse_context=True))
    assert [[(op.block, op.cache) for op in unbatched(batch)] for batch in batches] == [
        [(0, 0)],
        [(1, 0), (0, 1)],
        [(2, 0), (1, 1)],
        [(3, 0), (2, 1)],
        [(3, 1)],
    ]


@variants
@pytest.mark.parametrize("fuse", [False, True])
def test_batches_hold_the_ops_of_the_diagonal_order(variant, fuse):
    schedule = Schedule(4, BLOCKS, **VARIANTS[variant])
    batches = list(arrange(schedule, "batched", fuse))
    ops = [op for batch in batches for op in unbatched(batch)]
    plain = list(schedule.ops("diagonal", fuse))
    for cache in schedule.caches:
        assert [op for op in ops if op.cache == cache] == [op for op in plain if op.cache == cache]
    position = {cache: index for index, cache in enumerate(schedule.caches)}
    for batch in batches:
        members = unbatched(batch)
        assert len({op.cache for op in members}) == len(members)
        assert len({op.block + position[op.cache] for op in members}) == 1
    assert any(isinstance(batch, Batch) for batch in batches) == (len(schedule.caches) > 1)


def test_an_endless_video_is_batched_one_diagonal_at_a_time():
    batches = list(itertools.islice(arrange(Schedule(4, None), "batched", True), 100))
    assert [len(unbatched(batch)) for batch in batches] == [1, 2, 3] + [4] * 97
    assert [batch.block for batch in batches] == list(range(100))


def test_the_lag_counts_a_batch_as_one_pass():
    lag = prompt_lag(Schedule(4, None), True, "keep", lambda block: max(0, block - 6), "batched")
    assert (lag.first_block, lag.shortest, lag.longest) == (4, 8, 8)  # a switch splits the pass of each cache


# ---- Execution ----


@variants
@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("layout", [BlockLayout(2), FIRST_FRAME], ids=["equal blocks", "independent first frame"])
def test_batches_give_the_same_latents(variant, fuse, layout):
    schedule = Schedule(4, BLOCKS, **VARIANTS[variant])
    expected = run_to_end(fake_rollout(layout), list(schedule.ops()), schedule.caches)
    for make in (batching_rollout, fake_rollout):  # the second one cannot run batches
        actual = run_to_end(make(layout), list(arrange(schedule, "batched", fuse)), schedule.caches)
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("fuse", [False, True])
def test_batches_continue_a_prefix(fuse):
    layout, frames = BlockLayout(2, prefix_frames=3), torch.arange(3.0).view(1, 3, 1, 1, 1)
    schedule = Schedule(4, 5, prefix_blocks=2)
    expected = run_to_end(fake_rollout(layout, prefix=frames), list(schedule.ops()), schedule.caches)
    rollout = batching_rollout(layout, prefix=frames)
    assert torch.equal(run_to_end(rollout, arrange(schedule, "batched", fuse), schedule.caches), expected)


def test_a_rollout_runs_one_pass_per_batch_and_reports_each_op():
    ops, passes, schedule = [], [], Schedule(4, BLOCKS)
    rollout = batching_rollout(on_op=ops.append)
    run_batch = rollout.denoiser.run_batch
    rollout.denoiser.run_batch = lambda items: passes.append(items) or run_batch(items)
    run_to_end(rollout, list(arrange(schedule, "batched", True)), schedule.caches)
    assert len(passes) == BLOCKS + 4 - 1
    assert ops == [op for item in arrange(schedule, "batched", True) for op in unbatched(item)]


# ---- The tiny network ----

TOLERANCE = dict(atol=1e-4, rtol=0)
"""Of latents with standard deviation 1. Sums of a batch may be rounded differently."""


@pytest.fixture(scope="module")
def net(make_net):
    return make_net(num_layers=2).requires_grad_(False)


@pytest.fixture(scope="module")
def text(net):
    return net.encode_text(torch.randn(1, 3, 24, generator=torch.Generator().manual_seed(2)))


@pytest.mark.parametrize("case", CASES)
def test_batches_of_the_network_are_equal_up_to_rounding(net, text, case):
    """Among the cases are blocks of different lengths: a prefix of 1.5 blocks, and an independent first frame."""
    schedule, options = case_schedule(case), CASES[case][1]
    expected = run_to_end(net_rollout(net, text, **options), schedule.ops(), schedule.caches)
    for fuse in (False, True):
        rollout = net_rollout(net, text, **options)
        actual = run_to_end(rollout, arrange(schedule, "batched", fuse), schedule.caches)
        torch.testing.assert_close(actual, expected, **TOLERANCE)


@pytest.mark.parametrize("moving_sink", [False, True])
def test_batches_with_a_sink_and_a_write_window(net, text, moving_sink):
    schedule, results = Schedule(4, BLOCKS, write_frames=2), []
    for order in ("step_major", "batched"):
        rollout = net_rollout(net, text)
        rollout.new_cache = lambda: net.new_cache(1, *FRAME[1:], 5, 2, sink_frames=3, moving_sink=moving_sink)
        results.append(run_to_end(rollout, arrange(schedule, order, True), schedule.caches))
    torch.testing.assert_close(*results, **TOLERANCE)


def test_batches_with_guidance_and_two_videos(net):
    """Both branches run in batches; each has its own cache."""
    schedule, results = Schedule(4, BLOCKS), []
    texts = [net.encode_text(torch.randn(2, 3, 24, generator=torch.Generator().manual_seed(n))) for n in (3, 4)]
    for order in ("step_major", "batched"):
        rollout = net_rollout(net, texts[0], samples=(0, 1))
        rollout.denoiser = GuidedDenoiser(*(Denoiser(net, text) for text in texts), 2.0)
        rollout.new_cache = lambda: GuidedCache(*(net.new_cache(2, *FRAME[1:], 4, 2) for _ in range(2)))
        results.append(run_to_end(rollout, arrange(schedule, order, True), schedule.caches))
    torch.testing.assert_close(*results, **TOLERANCE)


# ---- Prompts that change ----


@variants
@switch.rules
@pytest.mark.parametrize("fuse", [False, True])
def test_batches_with_prompt_switches_give_the_same_latents(variant, rule, fuse):
    schedule = Schedule(4, switch.BLOCKS, **VARIANTS[variant])
    ops = add_switch_ops(arrange(schedule, "batched", fuse), switch.TRACK, rule, switch.first_context_block)
    actual = run_to_end(switching_rollout(switch.TRACK), ops, schedule.caches)
    assert torch.equal(actual, switch.expected_latents(variant, rule))


@switch.rules
def test_a_live_prompt_holds_from_the_next_block_that_has_not_started(rule):
    """Batches are requested one at a time, so no block has its prompt fixed early."""
    schedule, live, started = Schedule(4, switch.BLOCKS), LivePrompts("a"), []

    def on_op(op):
        started.append(max([op.block, *started[-1:]]))
        if len(started) == 9:
            live.prompt = "bb"

    ops = add_switch_ops(arrange(schedule, "batched", True), live, rule, switch.first_context_block)
    latents = run_to_end(switching_rollout(live, on_op=on_op), ops, schedule.caches)
    assert live.to_metadata() == [[0, "a"], [started[8] + 1, "bb"]] and started[8] == 3
    track = PromptTrack((block, prompt) for block, prompt in live.to_metadata())
    assert torch.equal(latents, switch.expected_latents("timestep_first", rule, track))
