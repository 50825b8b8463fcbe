"""Prompt tracks in a rollout: each op has its block's prompt, and the rules keep, recache and flush change the context.

Claims: with every rule, the latents do not depend on the order, on fused passes or on the number of ranks, bit for bit
(law 1, docs/method.md). Prompts that are set while a rollout runs give the bits of the same track given in advance. The
tiny network equals plain loops of LongLive and HiAR, and masked passes without a cache.
"""

import itertools
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_rollout import (
    SIGMAS,
    STAGES,
    VARIANTS,
    keyed_block_noise,
    random_order,
    run_ranks,
    run_to_end,
    variants,
)
from torch import Tensor

from pipeline.lag import prompt_lag
from pipeline.prompt_switch import FLUSH_FRAMES, add_switch_ops
from pipeline.prompt_track import LivePrompts, PromptTrack
from pipeline.rollout import BlockLayout, Rollout
from pipeline.schedule import ForgetContext, Op, RewindContext, Schedule, WriteContext, WriteThenDenoise

RULES = ["keep", "recache", "flush"]
rules = pytest.mark.parametrize("rule", RULES)
TRACK = PromptTrack([(0, "a"), (3, "bb"), (4, "ccc"), (6, "a")])
BLOCKS, LAYOUT, CONTEXT, SINK = 8, BlockLayout(2), 5, 1


# ---- A fake denoiser with prompts ----


class FakeCache(dict):
    """The frames of a cache by index: the sink and the newest frames, as in a KVCache."""

    def __init__(self) -> None:
        self.next = 0

    def append(self, x: Tensor) -> None:
        for frame in x.unbind(1):
            self[self.next] = frame
            self.next += 1
        for frame in [f for f in self if SINK <= f < self.next - (CONTEXT - SINK)]:
            del self[frame]

    def forget(self, frames: int) -> None:
        for frame in [f for f in self if SINK <= f < self.next - frames]:
            del self[frame]

    def rewind(self, frame: int) -> None:
        for old in [f for f in self if f >= min(SINK, frame)]:
            del self[old]
        self.next = frame

    def reset(self) -> None:
        self.clear()
        self.next = 0


class FakeDenoiser:
    """Its output depends on the prompt, the level, and every frame of the context. It counts passes."""

    def __init__(self, prompt: str, passes: list[str]):
        self.prompt, self.passes = prompt, passes

    def _embed(self, x: Tensor, sigma: float, first_frame: int, cache: FakeCache) -> Tensor:
        self.passes.append(self.prompt)
        assert first_frame == cache.next
        context = sum((torch.cos(index + cache[index].mean()) for index in sorted(cache)), torch.zeros(()))
        return torch.sin(x + context + len(self.prompt) + first_frame * 0.01 + sigma)

    def denoise(self, x: Tensor, sigma: float, first_frame: int, cache: FakeCache, write: bool = False) -> Tensor:
        x0 = self._embed(x, sigma, first_frame, cache)
        if write:
            cache.append(x0 + x)
        return x0

    def write_context(self, x: Tensor, sigma: float, first_frame: int, cache: FakeCache) -> None:
        cache.append(self._embed(x, sigma, first_frame, cache) + x)

    def write_then_denoise(
        self, context: Tensor, context_sigma: float, x: Tensor, sigma: float, first_frame: int, cache: FakeCache
    ) -> Tensor:
        self.write_context(context, context_sigma, first_frame, cache)
        return self.denoise(x, sigma, first_frame + context.shape[1], cache)


def fake_rollout(
    track: PromptTrack, layout: BlockLayout = LAYOUT, rollout_class: type[Rollout] = Rollout, **options
) -> Rollout:
    noise, passes = keyed_block_noise(layout, frame=(1, 1, 1)), []
    unused = FakeDenoiser("unused", passes)
    options = {"denoiser_at": lambda block: FakeDenoiser(track.prompt_at(block), passes)} | options
    return rollout_class(unused, SIGMAS, noise, FakeCache, layout, retained_frames=CONTEXT, **options)


def first_context_block(block: int, layout: BlockLayout = LAYOUT, context: int = CONTEXT, sink: int = SINK) -> int:
    start = layout.start(block)
    return 0 if start <= context else layout.block_at(start - (context - sink))


def switched(ops, track: PromptTrack, rule: str) -> list[Op]:
    return list(add_switch_ops(ops, track, rule, first_context_block))


class SwitchedSchedule(Schedule):
    """A schedule whose ops include those of a rule; for `run_ranks`."""

    def ops(self, order="step_major", fuse_context=False):
        rule = self.rule  # type: ignore[attr-defined]
        return add_switch_ops(super().ops(order, fuse_context), TRACK, rule, first_context_block)


def expected_latents(variant: str, rule: str, track: PromptTrack = TRACK) -> Tensor:
    schedule = Schedule(4, BLOCKS, **VARIANTS[variant])
    return run_to_end(fake_rollout(track), switched(schedule.ops(), track, rule), schedule.caches)


@variants
@rules
@settings(max_examples=3)
@given(random=st.randoms(use_true_random=False))
def test_any_order_gives_the_same_latents(variant, rule, random):
    schedule = Schedule(4, BLOCKS, **VARIANTS[variant])
    expected = expected_latents(variant, rule)
    for fuse in (False, True):
        ops = switched(schedule.ops(fuse_context=fuse), TRACK, rule)
        for order in (ops, switched(schedule.ops("diagonal", fuse), TRACK, rule), random_order(ops, random)):
            assert torch.equal(run_to_end(fake_rollout(TRACK), order, schedule.caches), expected)


def test_rules_and_tracks_differ():
    """Otherwise the comparisons of this file would prove nothing."""
    for variant in VARIANTS:
        results = [expected_latents(variant, rule) for rule in RULES]
        results.append(expected_latents(variant, "keep", PromptTrack([(0, "a")])))
        for a, b in itertools.combinations(results, 2):
            assert not torch.equal(a[:, 6:], b[:, 6:])
            assert torch.equal(a[:, :6], b[:, :6])  # blocks before the first switch


@rules
@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize(
    ("variant", "stages"),
    [
        *((variant, stages) for variant in ("timestep_first", "input", "noisy_clean") for stages in STAGES.values()),
        ("leading_blocks", STAGES["two ranks"]),
        ("leading_blocks", STAGES["four ranks"]),
        ("both_hybrids", [[0], [3]]),
    ],
)
def test_ranks_give_the_same_latents(variant, stages, rule, fuse):
    schedule = SwitchedSchedule(4, BLOCKS, **VARIANTS[variant])
    object.__setattr__(schedule, "rule", rule)

    def make(**options) -> Rollout:
        return fake_rollout(TRACK, **options)

    actual = run_ranks(make, schedule, stages, "diagonal", fuse)
    assert torch.equal(actual, expected_latents(variant, rule))


@rules
def test_a_prefix_has_prompts_too(rule):
    """The prefix of three frames fills blocks 0 and 1; the first generated block has a new prompt."""
    layout, frames = BlockLayout(2, prefix_frames=3), torch.arange(3.0).view(1, 3, 1, 1, 1)
    schedule, track = Schedule(4, 6, prefix_blocks=2), PromptTrack([(0, "a"), (2, "bb"), (4, "c")])
    results = []
    for order, fuse in itertools.product(("step_major", "diagonal"), (False, True)):
        first = lambda block: first_context_block(block, layout)  # noqa: E731
        ops = add_switch_ops(schedule.ops(order, fuse), track, rule, first)
        results.append(run_to_end(fake_rollout(track, layout, prefix=frames), ops, schedule.caches))
    assert all(torch.equal(result, results[0]) for result in results)


# ---- Ops ----


def test_a_track_without_switches_changes_no_op():
    for rule, fuse in itertools.product(RULES, (False, True)):
        ops = list(Schedule(4, 5).ops("diagonal", fuse))
        assert switched(ops, PromptTrack([(0, "a")]), rule) == ops


@pytest.mark.parametrize("fuse", [False, True])
def test_each_cache_gets_the_ops_of_a_switch_before_the_block(fuse):
    """Block 3 starts at frame 6. Its context of five frames, of which one is the sink, starts in block 1."""
    schedule, track = Schedule(4, 5), PromptTrack([(0, "a"), (3, "b")])
    plain = list(schedule.ops("diagonal"))
    for rule in RULES:
        for cache in range(4):
            ops = [op for op in switched(schedule.ops("diagonal", fuse), track, rule) if op.cache == cache]
            kinds = [(type(op).__name__, op.block) for op in ops]
            start = kinds.index(("Denoise", 3))
            assert not any(isinstance(op, WriteThenDenoise) and op.block == 3 for op in ops)
            if rule == "keep":
                assert isinstance(ops[start - 1], WriteContext)
            elif rule == "flush":
                assert ops[start - 1] == ForgetContext(3, cache, FLUSH_FRAMES)
            else:
                writes = [op for op in plain if isinstance(op, WriteContext) and op.cache == cache]
                again = [op for op in ops if isinstance(op, WriteContext) and op.prompt_block == 3]
                assert ops[start - 3 : start] == [RewindContext(3, cache, 1), *again]
                assert [(op.block, op.noise_index) for op in again] == [(w.block, w.noise_index) for w in writes[1:3]]


def test_a_block_is_not_written_before_the_same_switch_writes_it_again():
    """In a fused schedule this saves one pass per cache. The latents are the same."""
    track = PromptTrack([(0, "a"), (3, "b")])
    for fuse, count in ((False, 2), (True, 1)):
        ops = switched(Schedule(4, 5, "block_first").ops(fuse_context=fuse), track, "recache")
        assert sum(isinstance(op, WriteContext) and op.block == 2 for op in ops) == count


# ---- Live prompts ----


def run_live(schedule: Schedule, rule: str, fuse: bool, changes: dict[int, str]) -> tuple[Tensor, LivePrompts, list]:
    """Run in diagonal order and set prompts after some ops; return the latents, the track, and (op count, block)."""
    live, count, started = LivePrompts("a"), itertools.count(1), []

    def on_op(op: Op) -> None:
        number = next(count)
        started.append(max(op.block, started[-1] if started else 0))
        if number in changes:
            live.prompt = changes[number]

    ops = add_switch_ops(schedule.ops("diagonal", fuse), live, rule, first_context_block)
    latents = run_to_end(fake_rollout(live, on_op=on_op), ops, schedule.caches)
    return latents, live, started


@rules
@variants
@settings(max_examples=4)
@given(random=st.randoms(use_true_random=False))
def test_live_prompts_give_the_bits_of_the_track_given_in_advance(variant, rule, random: Random):
    schedule = Schedule(4, BLOCKS, **VARIANTS[variant])
    fuse = random.random() < 0.5
    changes = {random.randrange(1, 40): random.choice(["a", "bb", "ccc"]) for _ in range(4)}
    latents, live, _ = run_live(schedule, rule, fuse, changes)
    track = PromptTrack((block, prompt) for block, prompt in live.to_metadata())
    again = switched(schedule.ops("step_major", fuse), track, rule)
    assert torch.equal(run_to_end(fake_rollout(track), again, schedule.caches), latents)


@pytest.mark.parametrize("variant", ["timestep_first", "block_first", "input", "leading_blocks"])
@pytest.mark.parametrize("fuse", [False, True])
def test_a_live_prompt_holds_from_the_next_block_that_has_not_started(variant, fuse):
    """Ops are generated one at a time, so no block has its prompt fixed early."""
    schedule = Schedule(4, BLOCKS, **VARIANTS[variant])
    for number in range(1, 30):
        _, live, started = run_live(schedule, "recache", fuse, {number: "bb"})
        block = started[number - 1] + 1
        assert live.to_metadata() == ([[0, "a"], [block, "bb"]] if block < BLOCKS else [[0, "a"]])


def test_an_endless_live_video_with_many_switches_holds_a_few_blocks():
    live, held = LivePrompts("a"), []

    def on_op(op: Op) -> None:
        live.prompt = f"prompt {op.block}"
        held.append((len(rollout.blocks), sum(map(len, rollout._written.values())), len(rollout.caches[0])))

    rollout = fake_rollout(live, on_op=on_op)
    ops = add_switch_ops(Schedule(4, None).ops("diagonal", True), live, "recache", first_context_block)
    for _ in itertools.islice(rollout.run(ops, range(4)), 200):
        pass
    blocks, written, frames = (max(values) for values in zip(*held, strict=True))
    assert blocks <= 6 and written <= 4 * 4 and frames <= CONTEXT + 2
    assert len(live.to_metadata()) > 150


# ---- Lag ----


def lag(fuse: bool = True, rule: str = "keep", **options) -> tuple[int, int, int]:
    """Return passes of a rollout of 4 steps, blocks of 3 and a window of 21: first block, shortest and longest lag."""
    counted = prompt_lag(Schedule(4, None, **options), fuse, rule, lambda block: max(0, block - 6))  # type: ignore[arg-type]
    return counted.first_block, counted.shortest, counted.longest


def test_the_lag_of_a_prompt_is_counted_in_passes():
    assert lag(method="block_first") == (4, 5, 8)  # a pass over two prompts is split: one pass more than the steps
    assert lag(False, method="block_first") == (4, 4, 8)
    assert lag(context="input") == (10, 16, 19)
    assert lag() == (10, 20, 23)
    assert lag(leading_blocks=1) == (4, 20, 23)
    assert lag(rule="flush") == lag()
    assert lag(rule="recache", method="block_first") == (4, 10, 13)  # six blocks of the window are written again
    assert str(prompt_lag(Schedule(4, None), True, "keep", lambda block: max(0, block - 6))) == (
        "first block after 10 passes; a new prompt shows after 20 to 23 passes"
    )
