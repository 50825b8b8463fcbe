"""Schedules: the order in which the blocks of a video are denoised. A schedule is data; this module imports no torch.

An op is one unit of work on one block: `Denoise` runs one step, `WriteContext` writes context for later blocks. A
`Schedule` has one op sequence per KV cache, in a fixed order. Several sequences run one after another (`step_major`) or
interleaved along anti-diagonals (`diagonal`). Every order that respects the dependencies gives the same latents (law 1,
docs/method.md).

    block_first, 2 steps:        D00 D01 W0   D10 D11 W1   D20 D21 W2  ...
    timestep_first, step_major:  D00 W0 D10 W1 D20 W2 ...  then  D01 W0 D11 W1 D21 W2 ...
    timestep_first, diagonal:    D00 W0   D10 W1 D01 W0   D20 W2 D11 W1   D30 W3 D21 W2 ...

Dbs denoises block b at step s. Wb writes block b into the cache of its sequence. Block-first has one sequence and one
cache. Timestep-first has one of each per step. `pipeline/rollout.py` executes the ops. docs/extend.md shows how to add
a schedule.
"""

import heapq
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Denoise:
    """Predict the x0 of `block` at `step`, attending to `cache`, and move the block to noise index `step + 1`.

    The block enters at noise index `step`. Its x0 is re-noised to the next level; after the last step, x0 is the
    result. The cache does not change.
    """

    block: int
    step: int
    cache: int


@dataclass(frozen=True, slots=True)
class WriteContext:
    """Run `block` at `noise_index` through the network and append its keys and values to `cache`.

    The block does not change. With `context_noise`, the clean block is written at this sigma, with fresh noise. The
    pass has the prompt of `block`, or that of `prompt_block`: then the latents are those that were written before. With
    `read_frames`, the pass attends to as many of the newest frames of the cache only.
    """

    block: int
    noise_index: int
    cache: int
    context_noise: float = 0.0
    prompt_block: int | None = None
    read_frames: int | None = None


@dataclass(frozen=True, slots=True)
class DenoiseAndWrite:
    """Fused pair: one forward pass denoises a block and writes the same input latents as its context."""

    denoise: Denoise
    write: WriteContext

    @property
    def block(self) -> int:
        """The block of both ops."""
        return self.denoise.block

    @property
    def cache(self) -> int:
        """The cache of both ops."""
        return self.denoise.cache


@dataclass(frozen=True, slots=True)
class WriteThenDenoise:
    """Fused pair: one forward pass over two blocks writes the first and denoises the second, which attends to it."""

    write: WriteContext
    denoise: Denoise

    @property
    def block(self) -> int:
        """The block that is denoised."""
        return self.denoise.block

    @property
    def cache(self) -> int:
        """The cache of both ops."""
        return self.denoise.cache


@dataclass(frozen=True, slots=True)
class ForgetContext:
    """Drop all frames of `cache` but the sink and the newest `frames`, before the first op of `block`."""

    block: int
    cache: int
    frames: int


@dataclass(frozen=True, slots=True)
class RewindContext:
    """Drop all frames of `cache` from those of `first_block` on, and all before but the sink.

    The next write is of `first_block`. The first op of `block` follows these writes.
    """

    block: int
    cache: int
    first_block: int


Op = Denoise | WriteContext | DenoiseAndWrite | WriteThenDenoise | ForgetContext | RewindContext
Context = Literal["output", "input", "clean"]


@dataclass(frozen=True)
class Schedule:
    """All ops of a video: its blocks, its steps, and the context of each block.

    Raises:
        ValueError: for combinations that have no ops, such as a prefix that fills the video.
    """

    num_steps: int
    """S, the number of denoising steps. Noise indices run from 0 to S; index S is clean."""
    num_blocks: int | None
    """Blocks of the video, prefix included; None for an endless video."""
    method: Literal["timestep_first", "block_first"] = "timestep_first"
    context: Context = "output"
    """Noise level of a timestep-first context: the step's output (HiAR), its input, or clean. Block-first: clean."""
    leading_blocks: int = 0
    """Hybrid: this many blocks after the prefix are denoised block-first. Every step sees them clean."""
    leading_steps: int = 0
    """Hybrid: each block runs this many steps in a row over one shared cache; later steps are timestep-first."""
    prefix_blocks: int = 0
    """Blocks of the prefix. They are not generated; their clean latents are written into every cache."""
    context_noise: float = 0.0
    """Sigma at which generated blocks are written where the context is clean. The prefix has no noise."""
    write_frames: int | None = None
    """Newest frames of context that each WriteContext attends to; None for the whole window."""

    def __post_init__(self) -> None:
        if self.leading_steps > 1 and self.context == "input":
            raise ValueError("leading steps share one cache, so context 'input' allows at most one of them")
        if self.num_blocks is not None and self.num_blocks <= self.prefix_blocks:
            raise ValueError(f"{self.num_blocks} blocks with a prefix of {self.prefix_blocks}: nothing to generate")

    @property
    def steps_per_cache(self) -> list[range]:
        """The steps that read each cache. A cache is numbered by its first step."""
        clean_only = self.num_blocks is not None and self.prefix_blocks + self.leading_blocks >= self.num_blocks
        if self.method == "block_first" or clean_only:
            return [range(self.num_steps)]
        shared = max(1, self.leading_steps)
        return [range(shared), *(range(step, step + 1) for step in range(shared, self.num_steps))]

    @property
    def caches(self) -> list[int]:
        """Numbers of the caches that the ops use, ascending."""
        return [steps[0] for steps in self.steps_per_cache]

    def ops_per_cache(self) -> list[Iterator[Op]]:
        """Return the op sequence of each cache."""
        return [self._cache_ops(steps) for steps in self.steps_per_cache]

    def _cache_ops(self, steps: range) -> Iterator[Op]:
        cache, clean = steps[0], self.num_steps
        leading_end = self.prefix_blocks + self.leading_blocks
        for block in itertools.count() if self.num_blocks is None else range(self.num_blocks):
            if block < self.prefix_blocks:
                yield WriteContext(block, clean, cache, read_frames=self.write_frames)
            elif block < leading_end:
                if cache == 0:  # all steps of a leading block run over the first cache
                    yield from (Denoise(block, step, cache) for step in range(self.num_steps))
                yield self._write(block, clean, cache)
            else:
                yield from (Denoise(block, step, cache) for step in steps)
                yield self._write(block, self._context_index(steps), cache)

    def _write(self, block: int, noise_index: int, cache: int) -> WriteContext:
        noise = self.context_noise if noise_index == self.num_steps else 0.0
        return WriteContext(block, noise_index, cache, noise, read_frames=self.write_frames)

    def _context_index(self, steps: range) -> int:
        if self.method == "block_first" or self.context == "clean":
            return self.num_steps
        return steps[-1] if self.context == "input" else steps[-1] + 1

    def handoff_index(self, block: int, caches: Sequence[int]) -> int | None:
        """Return the noise index at which a rank with `caches` hands `block` to the next rank; None on the last."""
        later = [cache for cache in self.caches if cache > max(caches)]
        if not later:
            return None
        return self.num_steps if block < self.prefix_blocks + self.leading_blocks else later[0]

    def ops(self, order: Literal["step_major", "diagonal"] = "step_major", fuse_context: bool = False) -> Iterator[Op]:
        """Return all ops in one order, without context writes that no later op reads.

        A Denoise is always fused with the write of its own input: one pass gives the same bits as two.

        Args:
            fuse_context: also fuse each context write with the Denoise of the next block: fewer passes, equal up to
                rounding.

        Raises:
            ValueError: for an endless video in step-major order: its second step would never start.
        """
        sequences: Sequence[Iterable[Op]] = self.ops_per_cache()
        if fuse_context:
            sequences = [fuse_write_with_next(fuse_write_of_input(ops)) for ops in sequences]
        if order == "step_major" and len(sequences) > 1 and self.num_blocks is None:
            raise ValueError("an endless video needs the diagonal order: step-major never finishes a block of it")
        ops = step_major(sequences) if order == "step_major" else diagonal(sequences)
        return fuse_write_of_input(ops if self.num_blocks is None else drop_unread_writes(ops))

    def ops_until(self, exit_step: int) -> Iterator[Op]:
        """Return the step-major ops of a training rollout that stops at `exit_step`.

        Contexts at noise indices up to `exit_step + 1` equal those of the whole rollout; higher ones are written at
        `exit_step + 1`. A clean context is the x0 that `exit_step` predicts.
        """
        assert 0 <= exit_step < self.num_steps and self.num_blocks is not None
        ops = (op for op in step_major(self.ops_per_cache()) if op.cache <= exit_step)
        ops = (op for op in ops if not isinstance(op, Denoise) or op.step <= exit_step)
        ops = (self._limit_noise_index(op, exit_step + 1) for op in ops)
        return fuse_write_of_input(drop_unread_writes(ops))

    def _limit_noise_index(self, op: Op, last_index: int) -> Op:
        """Make a WriteContext beyond noise index `last_index` write `last_index`; clean writes stay clean."""
        if isinstance(op, WriteContext) and last_index < op.noise_index < self.num_steps:
            return WriteContext(op.block, last_index, op.cache, read_frames=op.read_frames)
        return op

    def caches_until(self, exit_step: int) -> list[int]:
        """Return the caches that `ops_until` uses."""
        return [cache for cache in self.caches if cache <= exit_step]


# ---- Orders ----


def step_major(sequences: Sequence[Iterable[Op]]) -> Iterator[Op]:
    """Chain op sequences: all ops of one cache, then all ops of the next."""
    return itertools.chain.from_iterable(sequences)


def diagonal(sequences: Sequence[Iterable[Op]]) -> Iterator[Op]:
    """Interleave op sequences; each runs one block behind the previous sequence.

    Blocks finish early, and only a few are in progress at a time.
    """

    def with_keys(index: int, ops: Iterable[Op]) -> Iterator[tuple[int, int, Op]]:
        return ((op.block + index, index, op) for op in ops)

    merged = heapq.merge(*(with_keys(i, ops) for i, ops in enumerate(sequences)), key=lambda item: item[:2])
    return (op for _, _, op in merged)


def for_stage(ops: Iterable[Op], caches: Iterable[int]) -> Iterator[Op]:
    """Return the ops of the rank that owns `caches`, in their order."""
    owned = frozenset(caches)
    return (op for op in ops if op.cache in owned)


# ---- Fewer passes ----


def drop_unread_writes(ops: Iterable[Op]) -> Iterator[Op]:
    """Drop each WriteContext after the last Denoise on its cache, such as that of the last block."""
    ops = list(ops)
    last_read = {op.cache: i for i, op in enumerate(ops) if not isinstance(op, WriteContext)}
    return (op for i, op in enumerate(ops) if not isinstance(op, WriteContext) or i < last_read.get(op.cache, -1))


def fuse_write_of_input(ops: Iterable[Op]) -> Iterator[Op]:
    """Fuse a Denoise with a directly following write of its own input (context `input`)."""

    def fuse(first: Op, second: Op) -> Op | None:
        if not (isinstance(first, Denoise) and isinstance(second, WriteContext)) or second.read_frames is not None:
            return None  # the passes attend to different frames
        same_input = (first.block, first.step, first.cache) == (second.block, second.noise_index, second.cache)
        return DenoiseAndWrite(first, second) if same_input else None

    return _fuse_neighbours(ops, fuse)


def fuse_write_with_next(ops: Iterable[Op]) -> Iterator[Op]:
    """Fuse a WriteContext with a directly following Denoise. `ops` is the sequence of one cache."""

    def fuse(first: Op, second: Op) -> Op | None:
        if isinstance(first, WriteContext) and isinstance(second, Denoise):
            return WriteThenDenoise(first, second)
        return None

    return _fuse_neighbours(ops, fuse)


def _fuse_neighbours(ops: Iterable[Op], fuse: Callable[[Op, Op], Op | None]) -> Iterator[Op]:
    """Replace two neighbours by `fuse(first, second)` unless that is None. Reads one op ahead."""
    pending: Op | None = None
    for op in ops:
        fused = None if pending is None else fuse(pending, op)
        if fused is None and pending is not None:
            yield pending
        pending = op if fused is None else fused
    if pending is not None:
        yield pending


# ---- Dependencies ----


def dependencies(ops: Sequence[Op]) -> list[set[int]]:
    """Return, for every op, the indices of the earlier ops that must precede it in any order.

    A Denoise reads its cache and changes its block. A WriteContext reads its block and changes its cache. Ops that drop
    context only change their cache. So do those that write a block again, except for the block before the switch, which
    may not have been written before. Each read must stay between the same two changes as in `ops`.
    """
    last_change: dict[tuple[str, int], int] = {}
    readers: dict[tuple[str, int], set[int]] = {}  # since the last change
    result: list[set[int]] = []
    for index, op in enumerate(ops):
        block, cache = ("block", op.block), ("cache", op.cache)
        changes = {block, cache} if isinstance(op, DenoiseAndWrite | WriteThenDenoise) else {cache}
        touches = [block, cache]
        if isinstance(op, Denoise):
            changes = {block}
        elif isinstance(op, ForgetContext | RewindContext) or (
            isinstance(op, WriteContext) and op.prompt_block is not None and op.block < op.prompt_block - 1
        ):
            touches = [cache]
        if isinstance(op, WriteThenDenoise):
            touches.append(("block", op.write.block))
        before: set[int] = set()
        for resource in touches:
            if resource in last_change:
                before.add(last_change[resource])
            if resource in changes:
                before |= readers.pop(resource, set())
                last_change[resource] = index
            else:
                readers.setdefault(resource, set()).add(index)
        result.append(before)
    return result
