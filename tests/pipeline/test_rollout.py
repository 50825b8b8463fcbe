"""pipeline/rollout.py and pipeline/parallel/stage_rollout.py: law 1 (docs/method.md) and the denoising formulas.

Claims: the latents do not depend on the order (if it keeps the dependencies) or on the number of ranks, bit for bit.
This holds for a fake denoiser and for the tiny network. The rollout equals naive nested loops of HiAR and
Self-Forcing, and masked passes without a cache. Re-noising, prefixes, memory, endless videos, fused passes and batches
are as documented.
"""

import functools
import itertools
import queue
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.attention import BlockCausalMask
from model.denoiser import Denoiser
from model.flow import add_noise
from pipeline.parallel.stage_rollout import StageRollout
from pipeline.rollout import BlockLayout, Rollout
from pipeline.schedule import (
    Denoise,
    Op,
    Schedule,
    WriteContext,
    dependencies,
    diagonal,
    drop_unread_writes,
    for_stage,
    step_major,
)
from utils.rng import keyed_noise

SIGMAS = [1.0, 0.9, 0.7, 0.4, 0.0]
FRAME = (4, 4, 6)  # channels, height, width of the tiny net's latents
BLOCKS = 5

VARIANTS = {
    "timestep_first": dict(),
    "block_first": dict(method="block_first"),
    "clean": dict(context="clean"),
    "input": dict(context="input"),
    "leading_blocks": dict(leading_blocks=2),
    "leading_steps": dict(leading_steps=2),
    "both_hybrids": dict(leading_blocks=1, leading_steps=3),
    "noisy_block_first": dict(method="block_first", context_noise=0.2),
    "noisy_clean": dict(context="clean", context_noise=0.2),
    "noisy_leading": dict(leading_blocks=2, context_noise=0.2),
}
variants = pytest.mark.parametrize("variant", VARIANTS)
FIRST_FRAME = BlockLayout(2, independent_first_frame=True)


def keyed_block_noise(layout: BlockLayout, samples: Sequence[int] = (0,), frame=FRAME) -> Callable[[int, int], Tensor]:
    def noise(block: int, step: int) -> Tensor:
        return torch.stack([keyed_noise(7, s, block, step, (layout.frames(block), *frame)) for s in samples])

    return noise


def random_order(ops: Sequence[Op], random: Random) -> list[Op]:
    """Return a random order of `ops` that keeps the dependencies."""
    waiting = dict(enumerate(dependencies(ops)))
    order: list[Op] = []
    while waiting:
        index = random.choice([i for i, before in waiting.items() if before.isdisjoint(waiting)])
        del waiting[index]
        order.append(ops[index])
    return order


def run_to_end(rollout: Rollout, ops, caches) -> Tensor:
    """Return all generated blocks [B, F, C, h, w]; check that each is yielded once."""
    blocks = list(rollout.run(ops, caches))
    assert len(dict(blocks)) == len(blocks)
    return torch.cat([latents for _, latents in sorted(blocks, key=lambda item: item[0])], dim=1)


# ---- A fake denoiser ----


class FakeCache(deque):
    """A list of written blocks; keeps the last three."""

    def __init__(self) -> None:
        super().__init__(maxlen=3)

    def reset(self) -> None:
        self.clear()


@dataclass
class FakeDenoiser:
    """Its output depends on every argument and on the order of the cache. It records its calls."""

    calls: list[tuple] = field(default_factory=list)

    def denoise(self, x: Tensor, sigma: float, first_frame: int, cache: FakeCache, write: bool = False) -> Tensor:
        context = sum(((i + 1) * c.mean() for i, c in enumerate(cache)), torch.zeros(()))
        if write:
            cache.append(x * (1 + sigma))
        x0 = torch.sin(x + context + first_frame * 0.01 + sigma)
        self.calls.append(("denoise", first_frame, sigma, x, x0))
        return x0

    def write_context(self, x: Tensor, sigma: float, first_frame: int, cache: FakeCache) -> None:
        self.calls.append(("write", first_frame, sigma, x, None))
        cache.append(x * (1 + sigma))

    def write_then_denoise(
        self, context: Tensor, context_sigma: float, x: Tensor, sigma: float, first_frame: int, cache: FakeCache
    ) -> Tensor:
        self.write_context(context, context_sigma, first_frame, cache)
        return self.denoise(x, sigma, first_frame + context.shape[1], cache)


def fake_rollout(
    layout: BlockLayout = BlockLayout(2),  # noqa: B008
    rollout_class: type[Rollout] = Rollout,
    **options,
) -> Rollout:
    noise = keyed_block_noise(layout, frame=(1, 1, 1))
    return rollout_class(FakeDenoiser(), SIGMAS, noise, FakeCache, layout, **options)


@variants
@pytest.mark.parametrize("layout", [BlockLayout(2), FIRST_FRAME], ids=["equal blocks", "independent first frame"])
@pytest.mark.parametrize("deterministic", [False, True])
@settings(max_examples=4)
@given(random=st.randoms(use_true_random=False))
def test_any_order_gives_the_same_latents(variant, layout, deterministic, random):
    schedule = Schedule(4, BLOCKS, **VARIANTS[variant])
    ops = list(schedule.ops())
    expected = run_to_end(fake_rollout(layout, deterministic=deterministic), ops, schedule.caches)
    for order in (list(schedule.ops("diagonal")), random_order(ops, random)):
        actual = run_to_end(fake_rollout(layout, deterministic=deterministic), order, schedule.caches)
        assert torch.equal(actual, expected)


def test_variants_differ():
    """Otherwise the comparisons of this file would prove nothing."""
    schedules = [Schedule(4, BLOCKS, **variant) for variant in VARIANTS.values()]
    results = [run_to_end(fake_rollout(), list(s.ops()), s.caches) for s in schedules]
    for a, b in itertools.combinations(results, 2):
        assert not torch.equal(a, b)


def test_an_order_that_breaks_a_dependency_fails():
    ops = list(Schedule(4, 3).ops())
    assert ops[5] == Denoise(0, 1, 1) and ops[0] == Denoise(0, 0, 0)
    with pytest.raises(AssertionError, match="has not reached noise index"):
        run_to_end(fake_rollout(), [ops[5], *ops[:5], *ops[6:]], range(4))
    with pytest.raises(AssertionError, match="not ready"):
        run_to_end(fake_rollout(), [*ops[:6], ops[5]], range(4))
    late_write = [ops[0], ops[2], *ops[5:6], Denoise(0, 2, 2), ops[1]]
    with pytest.raises(AssertionError, match="too late"):
        run_to_end(fake_rollout(), late_write, range(4))


# ---- Between steps ----


def denoise_calls(rollout: Rollout, schedule: Schedule) -> list[tuple]:
    list(rollout.run(list(schedule.ops()), schedule.caches))
    return [call for call in rollout.denoiser.calls if call[0] == "denoise"]


def test_steps_renoise_with_fresh_noise():
    rollout = fake_rollout()
    calls = denoise_calls(rollout, Schedule(4, 1))
    assert torch.equal(calls[0][3], rollout.noise(0, 0))
    for step in (1, 2, 3):
        assert calls[step][2] == SIGMAS[step]
        x0, sigma = calls[step - 1][4], SIGMAS[step]
        torch.testing.assert_close(calls[step][3], (1 - sigma) * x0 + sigma * rollout.noise(0, step))


def test_deterministic_rollouts_take_euler_steps_along_the_flow():
    rollout = fake_rollout(deterministic=True)
    calls = denoise_calls(rollout, Schedule(4, 1))
    for step in (0, 1, 2):
        (_, _, sigma, x, x0), after, following = calls[step], calls[step + 1][3], SIGMAS[step + 1]
        flow = (x - x0) / sigma
        torch.testing.assert_close(after, x + (following - sigma) * flow)


@pytest.mark.parametrize(
    ("variant", "noise_indices"),
    [("timestep_first", [1, 2, 3, 4]), ("input", [0, 1, 2, 3]), ("clean", [4] * 4), ("block_first", [4])],
)
def test_contexts_are_written_at_the_noise_index_of_the_rule(variant, noise_indices):
    """Checked on unfused writes of the first of two blocks, at every step."""
    schedule = Schedule(4, 2, **VARIANTS[variant])
    rollout = fake_rollout()
    list(rollout.run(list(drop_unread_writes(step_major(schedule.ops_per_cache()))), schedule.caches))
    denoised = {
        sigma: (x, x0) for kind, frame, sigma, x, x0 in rollout.denoiser.calls if (kind, frame) == ("denoise", 0)
    }
    writes = [(sigma, x) for kind, _, sigma, x, _ in rollout.denoiser.calls if kind == "write"]
    assert [sigma for sigma, _ in writes] == [SIGMAS[index] for index in noise_indices]
    for step, (sigma, x) in enumerate(writes):
        if sigma:
            assert torch.equal(x, denoised[sigma][0])  # the same latents as the input of that step
        else:
            last = 3 if variant == "block_first" else step
            assert torch.equal(x, denoised[SIGMAS[last]][1])


# ---- Layout and prefix ----


@pytest.mark.parametrize(
    ("prefix_frames", "prefix_blocks", "starts"),
    [(0, 0, [0, 3, 6, 9]), (3, 1, [0, 3, 6, 9]), (1, 1, [0, 1, 4, 7]), (5, 2, [0, 2, 5, 8]), (6, 2, [0, 3, 6, 9])],
)
def test_the_prefix_ends_where_a_block_ends(prefix_frames, prefix_blocks, starts):
    check_layout(BlockLayout(3, prefix_frames), prefix_blocks, starts)


@pytest.mark.parametrize(
    ("prefix_frames", "prefix_blocks", "starts"),
    [
        (0, 0, [0, 1, 4, 7, 10]),
        (1, 1, [0, 1, 4, 7, 10]),  # an image
        (2, 2, [0, 1, 2, 5, 8]),
        (6, 3, [0, 1, 3, 6, 9]),
        (7, 3, [0, 1, 4, 7, 10]),  # an image and two whole blocks
    ],
)
def test_an_independent_first_frame_is_a_block(prefix_frames, prefix_blocks, starts):
    check_layout(BlockLayout(3, prefix_frames, independent_first_frame=True), prefix_blocks, starts)


def check_layout(layout: BlockLayout, prefix_blocks: int, starts: list[int]) -> None:
    assert layout.prefix_blocks == prefix_blocks
    assert [layout.start(block) for block in range(len(starts))] == starts
    sizes = [b - a for a, b in itertools.pairwise(starts)]
    assert [layout.frames(block) for block in range(len(sizes))] == sizes
    assert layout.start(prefix_blocks) == layout.prefix_frames
    assert [layout.block_at(frame) for frame in range(starts[-1])] == [b for b, n in enumerate(sizes) for _ in range(n)]
    for num_blocks, end in enumerate(starts[1:], start=1):
        whole = replace(layout, num_frames=end)
        assert whole.num_blocks == num_blocks and whole.sizes == tuple(sizes[:num_blocks]) and whole.is_whole
        if sizes[num_blocks - 1] > 1 and end - 1 > layout.prefix_frames:
            cut = replace(layout, num_frames=end - 1)
            assert cut.sizes == (*whole.sizes[:-1], whole.sizes[-1] - 1) and not cut.is_whole


@variants
def test_the_prefix_is_clean_context_in_every_cache_and_is_not_yielded(variant):
    layout = BlockLayout(2, prefix_frames=3)
    frames = torch.arange(3.0).view(1, 3, 1, 1, 1)
    schedule = Schedule(4, 5, prefix_blocks=2, **VARIANTS[variant])
    rollout = fake_rollout(layout, prefix=frames)
    yielded = [block for block, _ in rollout.run(list(schedule.ops()), schedule.caches)]
    assert yielded == [2, 3, 4]
    prefix_writes = [
        (frame, sigma, x) for kind, frame, sigma, x, _ in rollout.denoiser.calls if kind == "write" and frame < 3
    ]
    assert [(frame, sigma) for frame, sigma, _ in prefix_writes] == [(0, 0.0), (1, 0.0)] * len(schedule.caches)
    assert all(torch.equal(x, frames[:, frame : frame + x.shape[1]]) for frame, _, x in prefix_writes)


# ---- Memory ----


def test_diagonal_order_holds_a_few_blocks_and_one_cache_per_step():
    held: list[tuple[int, int]] = []
    rollout = fake_rollout(on_op=lambda op: held.append((len(rollout.blocks), len(rollout.caches))))
    rollout.denoiser.calls = deque(maxlen=1)
    schedule = Schedule(4, 200)
    assert len(list(rollout.run(schedule.ops("diagonal"), schedule.caches))) == 200
    assert max(blocks for blocks, _ in held) <= 5
    assert max(caches for _, caches in held) == 4


@pytest.mark.parametrize(("variant", "order", "caches"), [
    ("timestep_first", "step_major", 1),
    ("timestep_first", "diagonal", 4),
    ("block_first", "step_major", 1),
    ("leading_steps", "step_major", 1),
])  # fmt: skip
def test_caches_are_reused(variant, order, caches):
    made: list[FakeCache] = []

    def new_cache() -> FakeCache:
        made.append(FakeCache())
        return made[-1]

    schedule = Schedule(4, BLOCKS, **VARIANTS[variant])
    rollout = Rollout(
        FakeDenoiser(), SIGMAS, keyed_block_noise(BlockLayout(2), frame=(1, 1, 1)), new_cache, BlockLayout(2)
    )
    list(rollout.run(list(schedule.ops(order)), schedule.caches))
    assert len(made) == caches
    assert not any(made)  # all are empty again


def test_block_first_order_holds_one_block():
    held = []
    rollout = fake_rollout(on_op=lambda op: held.append(len(rollout.blocks)))
    list(rollout.run(Schedule(4, 50, "block_first").ops(), [0]))
    assert max(held) <= 2


def test_blocks_finish_as_early_as_the_order_allows():
    """In diagonal order the first block finishes after S diagonals instead of almost the whole video."""
    for order, ops_before in (("diagonal", 2 * (1 + 2 + 3) + 7), ("step_major", 3 * (2 * 50 - 1) + 1)):
        seen: list[Op] = []
        ops = Schedule(4, 50).ops(order)
        next(iter(fake_rollout(on_op=seen.append).run(ops, range(4))))
        assert len(seen) == ops_before


def test_on_op_is_called_for_every_op_in_order():
    seen: list[Op] = []
    ops = list(Schedule(4, 3).ops("diagonal"))
    list(fake_rollout(on_op=seen.append).run(ops, range(4)))
    assert seen == ops


# ---- Pipeline ranks ----


class QueueTransport:
    """A rank's transport over queues between threads."""

    def __init__(
        self, before: queue.Queue | None, after: queue.Queue | None, handoff_index: Callable[[int], int | None]
    ):
        self.before, self.after, self.handoff_index = before, after, handoff_index

    def receive(self, block: int) -> tuple[int, Tensor, Tensor]:
        assert self.before is not None
        number, *state = self.before.get(timeout=10)
        assert number == block
        return tuple(state)

    def send(self, block: int, noise_index: int, x: Tensor, x0: Tensor) -> None:
        assert self.after is not None
        self.after.put((block, noise_index, x.clone(), x0.clone()))


def run_ranks(
    make: Callable[..., Rollout], schedule: Schedule, stages: list[list[int]], order: str, fuse_context: bool = False
) -> Tensor:
    """Run every rank in its own thread; return the finished blocks [B, F, C, h, w]."""
    queues = [None, *(queue.Queue() for _ in stages[1:]), None]
    finished: list[tuple[int, Tensor]] = []

    def work(rank: int) -> None:
        torch.set_num_threads(1)
        ops = for_stage(schedule.ops(order, fuse_context), stages[rank])
        handoff_index = functools.partial(schedule.handoff_index, caches=stages[rank])
        rollout = make(
            rollout_class=StageRollout, transport=QueueTransport(queues[rank], queues[rank + 1], handoff_index)
        )
        blocks = list(rollout.run(ops, stages[rank]))
        assert bool(blocks) == (rank == len(stages) - 1)  # only the last rank yields blocks
        finished.extend(blocks)

    with ThreadPoolExecutor(len(stages)) as pool:
        for future in [pool.submit(work, rank) for rank in range(len(stages))]:
            future.result()
    assert all(blocks.empty() for blocks in queues if blocks is not None), (
        "a rank sent blocks that the next rank did not receive"
    )
    assert len(dict(finished)) == len(finished)
    return torch.cat([latents for _, latents in sorted(finished, key=lambda item: item[0])], dim=1)


STAGES = {
    "two ranks": [[0, 1], [2, 3]],
    "four ranks": [[0], [1], [2], [3]],
    "uneven ranks": [[0], [1, 2], [3]],
}


@pytest.mark.parametrize("stages", STAGES)
@pytest.mark.parametrize("order", ["step_major", "diagonal"])
@pytest.mark.parametrize("variant", ["timestep_first", "clean", "input", "noisy_clean"])
def test_ranks_give_the_same_latents(variant, order, stages):
    schedule = Schedule(4, BLOCKS, **VARIANTS[variant])
    expected = run_to_end(fake_rollout(), list(schedule.ops()), schedule.caches)
    assert torch.equal(run_ranks(fake_rollout, schedule, STAGES[stages], order), expected)


@pytest.mark.parametrize(
    ("variant", "stages"),
    [
        ("leading_blocks", [[0, 1], [2, 3]]),
        ("leading_blocks", [[0], [1], [2], [3]]),
        ("leading_steps", [[0], [2, 3]]),
        ("leading_steps", [[0, 2], [3]]),
        ("both_hybrids", [[0], [3]]),
        ("noisy_leading", [[0, 1], [2, 3]]),
    ],
)
def test_ranks_of_hybrids_give_the_same_latents(variant, stages):
    schedule = Schedule(4, BLOCKS, **VARIANTS[variant])
    expected = run_to_end(fake_rollout(), list(schedule.ops()), schedule.caches)
    assert torch.equal(run_ranks(fake_rollout, schedule, stages, "diagonal"), expected)


def test_ranks_continue_a_prefix():
    layout, frames = BlockLayout(2, prefix_frames=3), torch.arange(3.0).view(1, 3, 1, 1, 1)
    schedule = Schedule(4, 5, prefix_blocks=2)

    def make(**changes) -> Rollout:
        return fake_rollout(layout, prefix=frames, **changes)

    expected = run_to_end(make(), list(schedule.ops()), schedule.caches)
    assert torch.equal(run_ranks(make, schedule, STAGES["four ranks"], "diagonal"), expected)


def test_a_rank_sends_a_block_before_it_writes_its_context():
    """The next rank does not need that pass, so it must not wait for it."""
    events: list[str] = []
    transport = QueueTransport(None, None, handoff_index=lambda block: 1)
    transport.send = lambda block, noise_index, x, x0: events.append(f"send {block}")
    schedule = Schedule(4, 3)
    rollout = fake_rollout(
        rollout_class=StageRollout,
        transport=transport,
        on_op=lambda op: events.append(f"{type(op).__name__} {op.block}"),
    )
    list(rollout.run(for_stage(schedule.ops(), [0]), [0]))
    assert [e for e in events if e.endswith(" 1")] == ["send 1", "Denoise 1", "WriteContext 1"]


# ---- The tiny network ----


def net_rollout(
    net,
    text,
    layout=BlockLayout(2),  # noqa: B008
    context=4,
    sink=0,
    samples=(0,),
    sigmas=SIGMAS,
    rollout_class: type[Rollout] = Rollout,
    **options,
) -> Rollout:
    def new_cache():
        return net.new_cache(len(samples), *FRAME[1:], context, layout.block_frames, sink)

    return rollout_class(Denoiser(net, text), sigmas, keyed_block_noise(layout, samples), new_cache, layout, **options)


CASES = {
    "timestep_first, short window": ("timestep_first", dict(context=4)),
    "timestep_first, sink and prefix": (
        "timestep_first",
        dict(context=5, sink=1, layout=BlockLayout(2, 3), prefix=torch.linspace(-1, 1, 3 * 96).view(1, 3, *FRAME)),
    ),
    "block_first, short window": ("block_first", dict(context=4)),
    "clean, sink": ("clean", dict(context=4, sink=2)),
    "input, short window": ("input", dict(context=3, sink=1)),
    "leading_blocks": ("leading_blocks", dict(context=4)),
    "leading_steps, deterministic": ("leading_steps", dict(context=4, deterministic=True)),
    "noisy_leading, first frame, sink": ("noisy_leading", dict(context=4, sink=2, layout=FIRST_FRAME)),
    "noisy_clean, first frame": ("noisy_clean", dict(context=4, layout=FIRST_FRAME)),
}


def case_schedule(case: str) -> Schedule:
    variant, changes = CASES[case]
    prefix_blocks = changes["layout"].prefix_blocks if "layout" in changes else 0
    return Schedule(4, BLOCKS, prefix_blocks=prefix_blocks, **VARIANTS[variant])


@pytest.fixture(scope="module")
def small_net(make_net):
    return make_net(num_layers=2).requires_grad_(False)


@pytest.fixture(scope="module")
def small_text(small_net):
    return small_net.encode_text(torch.randn(1, 3, 24, generator=torch.Generator().manual_seed(2)))


@pytest.fixture(scope="module")
def expected(small_net, small_text) -> Callable[[str], Tensor]:
    """expected(case): the step-major latents of a case, computed once."""
    known: dict[str, Tensor] = {}

    def compute(case: str) -> Tensor:
        if case not in known:
            schedule = case_schedule(case)
            rollout = net_rollout(small_net, small_text, **CASES[case][1])
            known[case] = run_to_end(rollout, list(schedule.ops()), schedule.caches)
        return known[case]

    return compute


@pytest.mark.parametrize("case", CASES)
def test_diagonal_order_of_the_network_gives_the_same_bits(small_net, small_text, expected, case):
    schedule = case_schedule(case)
    rollout = net_rollout(small_net, small_text, **CASES[case][1])
    assert torch.equal(run_to_end(rollout, schedule.ops("diagonal"), schedule.caches), expected(case))


@pytest.mark.parametrize("case", CASES)
@settings(max_examples=2)
@given(random=st.randoms(use_true_random=False))
def test_random_orders_of_the_network_give_the_same_bits(small_net, small_text, expected, case, random):
    schedule = case_schedule(case)
    rollout = net_rollout(small_net, small_text, **CASES[case][1])
    order = random_order(list(schedule.ops()), random)
    assert torch.equal(run_to_end(rollout, order, schedule.caches), expected(case))


@pytest.mark.parametrize("case", ["timestep_first, sink and prefix", "noisy_clean, first frame"])
@pytest.mark.parametrize("stages", [[[0, 1, 2, 3]], *STAGES.values()], ids=["one rank", *STAGES])
def test_ranks_of_the_network_give_the_same_bits(small_net, small_text, expected, stages, case):
    def make(**changes) -> Rollout:
        return net_rollout(small_net, small_text, **CASES[case][1], **changes)

    assert torch.equal(run_ranks(make, case_schedule(case), stages, "diagonal"), expected(case))


@torch.no_grad()
def net_x0(net, text, x: Tensor, sigma: float, first_frame: int, cache) -> Tensor:
    level = net.condition(torch.tensor([1000 * sigma]))
    return x - sigma * net.denoise_block(x.transpose(1, 2), level, text, cache, first_frame).transpose(1, 2)


@torch.no_grad()
def write(net, text, x: Tensor, sigma: float, first_frame: int, cache) -> None:
    net.write_block(x.transpose(1, 2), net.condition(torch.tensor([1000 * sigma])), text, cache, first_frame)


LOOPS = pytest.mark.parametrize(
    ("context_noise", "first", "window"), [(0.0, 0, 4), (0.3, 0, 4), (0.0, 1, 4), (0.3, 1, 6)]
)
"""Context noise, frames of an independent first block, and frames of context."""


def first_frames(first: int, num_blocks: int = BLOCKS) -> list[int]:
    """Return the first frame of each block: blocks of two after `first` frames."""
    return [0, *range(first or 2, 2 * num_blocks, 2)][:num_blocks]


def roll_out(net, text, schedule: Schedule, first: int, window: int) -> Tensor:
    layout = BlockLayout(2, independent_first_frame=bool(first))
    return run_to_end(net_rollout(net, text, layout, window), schedule.ops("diagonal"), schedule.caches)


@LOOPS
def test_block_first_equals_the_loop_of_self_forcing(small_net, small_text, context_noise, first, window):
    """With context noise, a clean block gets fresh noise of that level before it is written at that level."""
    noise = keyed_block_noise(BlockLayout(2, independent_first_frame=bool(first)))
    cache, blocks = small_net.new_cache(1, *FRAME[1:], window, 2), []
    for block, start in enumerate(first_frames(first)):
        x = noise(block, 0)
        assert x.shape[1] == (first if first and block == 0 else 2)
        for step in range(4):
            x0 = net_x0(small_net, small_text, x, SIGMAS[step], start, cache)
            if step < 3:
                x = add_noise(x0, noise(block, step + 1), SIGMAS[step + 1])
        blocks.append(x0)
        context = add_noise(x0, noise(block, 4), context_noise) if context_noise else x0
        write(small_net, small_text, context, context_noise, start, cache)
    schedule = Schedule(4, BLOCKS, "block_first", context_noise=context_noise)
    assert torch.equal(torch.cat(blocks, dim=1), roll_out(small_net, small_text, schedule, first, window))


@LOOPS
@pytest.mark.parametrize("rule", ["output", "clean"])
def test_timestep_first_equals_the_loop_of_hiar(small_net, small_text, rule, context_noise, first, window):
    """Context noise replaces the clean level: at the last step, or with clean context at every step."""
    noise = keyed_block_noise(BlockLayout(2, independent_first_frame=bool(first)))
    blocks = [noise(block, 0) for block in range(BLOCKS)]
    for step in range(4):
        cache = small_net.new_cache(1, *FRAME[1:], window, 2)
        for block, start in enumerate(first_frames(first)):
            x0 = net_x0(small_net, small_text, blocks[block], SIGMAS[step], start, cache)
            blocks[block] = x0 if step == 3 else add_noise(x0, noise(block, step + 1), SIGMAS[step + 1])
            context, level = (blocks[block], SIGMAS[step + 1]) if rule == "output" else (x0, 0.0)
            if level == 0 and context_noise:
                context, level = add_noise(x0, noise(block, 4), context_noise), context_noise
            write(small_net, small_text, context, level, start, cache)
    schedule = Schedule(4, BLOCKS, context=rule, context_noise=context_noise)
    assert torch.equal(torch.cat(blocks, dim=1), roll_out(small_net, small_text, schedule, first, window))


@pytest.mark.parametrize("sink", [0, 2])
@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("variant", ["timestep_first", "input", "clean", "noisy_clean"])
def test_timestep_first_equals_masked_passes_without_a_cache(small_net, small_text, variant, first, sink):
    """Each Denoise equals one block-causal pass over the earlier blocks, at their context level, and this block."""
    layout = BlockLayout(2, num_frames=8 - first, independent_first_frame=bool(first))
    num_blocks, noise = 4, keyed_block_noise(layout)
    now, estimates = [noise(block, 0) for block in range(num_blocks)], [torch.empty(0)] * num_blocks
    for step in range(4):
        level = {"timestep_first": SIGMAS[step + 1], "input": SIGMAS[step], "clean": 0.0, "noisy_clean": 0.2}[variant]
        context: list[Tensor] = []
        for block in range(num_blocks):
            x, start, size = now[block], layout.start(block), layout.frames(block)
            sigmas = torch.tensor([level] * start + [SIGMAS[step]] * size)
            causal = BlockCausalMask(layout.sizes[: block + 1], context_frames=4, sink_frames=sink)
            whole = torch.cat([*context, x], dim=1).transpose(1, 2)
            flow = small_net(whole, 1000 * sigmas[None], small_text, causal=causal)[:, :, -size:].transpose(1, 2)
            x0 = estimates[block] = x - SIGMAS[step] * flow
            now[block] = add_noise(x0, noise(block, step + 1), SIGMAS[step + 1])
            noisy = add_noise(x0, noise(block, 4), 0.2)
            context.append({"timestep_first": now[block], "input": x, "clean": x0, "noisy_clean": noisy}[variant])
    schedule = Schedule(4, num_blocks, **VARIANTS[variant])
    rollout = net_rollout(small_net, small_text, layout, context=4, sink=sink)
    actual = run_to_end(rollout, schedule.ops("diagonal"), schedule.caches)
    torch.testing.assert_close(actual, torch.cat(estimates, dim=1), atol=2e-4, rtol=0)


@pytest.mark.parametrize("order", ["step_major", "diagonal"])
@variants
def test_writes_fused_with_the_next_denoise_give_the_same_latents(variant, order):
    schedule = Schedule(4, BLOCKS, **VARIANTS[variant])
    plain, fused = list(schedule.ops(order)), list(schedule.ops(order, fuse_context=True))
    if variant != "input":  # its writes are fused with their own Denoise in both
        assert len(fused) < len(plain)
    expected = run_to_end(fake_rollout(), plain, schedule.caches)
    assert torch.equal(run_to_end(fake_rollout(), fused, schedule.caches), expected)
    for stages in ([[cache] for cache in schedule.caches], [schedule.caches[:1], schedule.caches[1:]]):
        if all(stages) and order == "diagonal":
            assert torch.equal(run_ranks(fake_rollout, schedule, stages, order, fuse_context=True), expected)


@settings(max_examples=20)
@given(random=st.randoms(use_true_random=False), variant=st.sampled_from(sorted(VARIANTS)))
def test_any_order_of_fused_ops_gives_the_same_latents(variant, random):
    schedule = Schedule(4, BLOCKS, **VARIANTS[variant])
    expected = run_to_end(fake_rollout(), list(schedule.ops()), schedule.caches)
    order = random_order(list(schedule.ops(fuse_context=True)), random)
    assert torch.equal(run_to_end(fake_rollout(), order, schedule.caches), expected)


@pytest.mark.parametrize("case", CASES)
def test_one_pass_over_two_blocks_equals_two_passes(small_net, small_text, expected, case):
    """Up to rounding: the two blocks share matrix products, and rounding depends on the size of a product."""
    schedule = case_schedule(case)
    ops = list(schedule.ops("diagonal", fuse_context=True))
    actual = run_to_end(net_rollout(small_net, small_text, **CASES[case][1]), ops, schedule.caches)
    torch.testing.assert_close(actual, expected(case), atol=2e-4, rtol=0)


def test_a_denoise_fused_with_the_write_of_its_input_gives_the_same_bits(small_net, small_text, expected):
    case = "input, short window"
    schedule = case_schedule(case)
    unfused = list(drop_unread_writes(diagonal(schedule.ops_per_cache())))
    assert len(unfused) > len(list(schedule.ops()))
    actual = run_to_end(net_rollout(small_net, small_text, **CASES[case][1]), unfused, schedule.caches)
    assert torch.equal(actual, expected(case))


def test_a_batch_equals_its_samples_one_by_one(small_net, small_text):
    schedule = Schedule(4, 3)
    wide = type(small_text)(*([x.expand(2, -1, -1, -1) for x in xs] for xs in (small_text.k, small_text.v)))
    both = run_to_end(net_rollout(small_net, wide, samples=(3, 4)), schedule.ops(), schedule.caches)
    for row, sample in enumerate((3, 4)):
        one = run_to_end(net_rollout(small_net, small_text, samples=(sample,)), schedule.ops(), schedule.caches)
        torch.testing.assert_close(both[row : row + 1], one, atol=1e-5, rtol=1e-5)


def test_an_endless_video_passes_frame_1024(make_net):
    """Wan's table of positions ends at 1024. The blocks equal those of a finite video, bit for bit."""
    net = make_net(num_layers=1, in_channels=1, out_channels=1).requires_grad_(False)
    text = net.encode_text(torch.ones(1, 2, 24))
    layout = BlockLayout(64)

    def endless_rollout() -> Rollout:
        noise = keyed_block_noise(layout, frame=(1, 2, 2))
        return Rollout(Denoiser(net, text), [1.0, 0.5, 0.0], noise, lambda: net.new_cache(1, 2, 2, 64, 64), layout)

    num_blocks = 1024 // 64 + 2
    endless = Schedule(2, None).ops("diagonal")
    blocks = list(itertools.islice(endless_rollout().run(endless, [0, 1]), num_blocks))
    assert [block for block, _ in blocks] == list(range(num_blocks))
    ended = run_to_end(endless_rollout(), list(Schedule(2, num_blocks).ops()), [0, 1])
    assert torch.equal(torch.cat([latents for _, latents in blocks], dim=1), ended)
    assert ended[:, 1024:].isfinite().all() and ended[:, 1024:].std() > 0.1


def test_a_rollout_keeps_no_graph(make_net, small_text):
    """This holds even if the caller has gradients enabled."""
    net = make_net(num_layers=2)
    with torch.enable_grad():
        latents = run_to_end(net_rollout(net, small_text), Schedule(4, 2).ops(), range(4))
    assert not latents.requires_grad


def test_ops_of_different_kinds_differ():
    assert Denoise(1, 0, 0) != WriteContext(1, 0, 0)
