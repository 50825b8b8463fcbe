"""In which order blocks are denoised: schedules as data. Knows no tensors.

A schedule is a few *streams* of ops, one per cache: each stream is in order by itself, and the streams together are
interleaved step by step (`step_major`) or along anti-diagonals (`diagonal`). Any other interleaving that keeps the
dependencies gives the same latents.

    block_first, 2 steps:        D00 D01 W0   D10 D11 W1   D20 D21 W2  ...
    timestep_first, step_major:  D00 W0 D10 W1 D20 W2 ...  then  D01 W0 D11 W1 D21 W2 ...
    timestep_first, diagonal:    D00 W0   D10 W1 D01 W0   D20 W2 D11 W1   D30 W3 D21 W2 ...

(Dbs is Denoise of block b at step s; W is a WriteContext into the cache of that stream.)
"""

import heapq
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Denoise:
    """Take `block` from level `step` to level `step + 1`, attending to `cache`."""

    block: int
    step: int
    cache: int


@dataclass(frozen=True, slots=True)
class WriteContext:
    """Append `block` at `level` to `cache`."""

    block: int
    noise_index: int
    cache: int


@dataclass(frozen=True, slots=True)
class Fused:
    """A Denoise and the WriteContext of the very same latents, by one forward pass."""

    denoise: Denoise
    write: WriteContext

    @property
    def block(self) -> int:
        """The block of both."""
        return self.denoise.block

    @property
    def cache(self) -> int:
        """The cache of both."""
        return self.denoise.cache


@dataclass(frozen=True, slots=True)
class WriteThenDenoise:
    """A WriteContext of one block and the Denoise of the next beside it, by one forward pass over both."""

    write: WriteContext
    denoise: Denoise

    @property
    def block(self) -> int:
        """The block that is denoised."""
        return self.denoise.block

    @property
    def cache(self) -> int:
        """The cache of both."""
        return self.denoise.cache


Op = Denoise | WriteContext | Fused | WriteThenDenoise
Context = Literal["output", "input", "clean"]


@dataclass(frozen=True)
class Schedule:
    """Everything that fixes the ops: the method, the number of blocks and steps, and what blocks see of their past."""

    num_steps: int
    num_blocks: int | None
    """Blocks of the video, given ones included; None for a video without an end."""
    method: Literal["timestep_first", "block_first"] = "timestep_first"
    context: Context = "output"
    """Level of a timestep-first context: the step's output (HiAR), its input, or clean. Block-first is always clean."""
    leading_blocks: int = 0
    """Generated blocks at the start that are denoised block-first and seen clean by every later step."""
    leading_steps: int = 0
    """Steps that each block takes at once, over one cache, before the rest goes timestep-first."""
    prefix_blocks: int = 0
    """Blocks at the start that are not generated: their clean latents are written into every cache."""

    def __post_init__(self) -> None:
        if self.leading_steps > 1 and self.context == "input":
            raise ValueError("leading steps share one cache, so they cannot each see their own input level")
        if self.num_blocks is not None and self.num_blocks <= self.prefix_blocks:
            raise ValueError(f"{self.num_blocks} blocks, of which {self.prefix_blocks} are given: nothing to generate")

    @property
    def phases(self) -> list[range]:
        """Steps that share a cache; the cache has the number of its first step."""
        all_leading = self.num_blocks is not None and self.prefix_blocks + self.leading_blocks >= self.num_blocks
        if self.method == "block_first" or all_leading:
            return [range(self.num_steps)]
        together = max(1, self.leading_steps)
        return [range(together), *(range(step, step + 1) for step in range(together, self.num_steps))]

    @property
    def caches(self) -> list[int]:
        """The caches that the ops use."""
        return [phase[0] for phase in self.phases]

    def ops_per_cache(self) -> list[Iterator[Op]]:
        """The ops, one ordered stream per cache."""
        return [self._cache_ops(phase[0], phase, first=phase[0] == 0) for phase in self.phases]

    def _cache_ops(self, cache: int, steps: range, first: bool) -> Iterator[Op]:
        """All ops on one cache, which serves `steps`."""
        clean = self.num_steps
        leading_end = self.prefix_blocks + self.leading_blocks
        for block in itertools.count() if self.num_blocks is None else range(self.num_blocks):
            if block < self.prefix_blocks:
                yield WriteContext(block, clean, cache)
            elif block < leading_end:
                if first:
                    yield from (Denoise(block, step, cache) for step in range(self.num_steps))
                yield WriteContext(block, clean, cache)
            else:
                yield from (Denoise(block, step, cache) for step in steps)
                yield WriteContext(block, self._context_index(steps), cache)

    def _context_index(self, steps: range) -> int:
        if self.method == "block_first" or self.context == "clean":
            return self.num_steps
        return steps[-1] if self.context == "input" else steps[-1] + 1

    def handoff_index(self, block: int, caches: Sequence[int]) -> int | None:
        """The level at which a rank that owns `caches` hands a block on to the rank after it; None if there is none."""
        later = [cache for cache in self.caches if cache > max(caches)]
        if not later:
            return None
        return self.num_steps if block < self.prefix_blocks + self.leading_blocks else later[0]

    def caches_until(self, exit_step: int) -> list[int]:
        """The caches that the ops of `until` use."""
        return [cache for cache in self.caches if cache <= exit_step]

    def until(self, exit_step: int) -> Iterator[Op]:
        """The ops of a rollout of which only the x0 predicted at `exit_step` is wanted, as training does; step-major.

        Contexts are those of the whole rollout as far as they exist by then: clean ones are written from that x0.
        """
        assert 0 <= exit_step < self.num_steps and self.num_blocks is not None
        ops = (op for op in step_major(self.ops_per_cache()) if op.cache <= exit_step)
        kept = (op for op in ops if not isinstance(op, Denoise) or op.step <= exit_step)
        return fuse(drop_unread_writes(_reachable(op, exit_step, self.num_steps) for op in kept))

    def ops(self, order: Literal["step_major", "diagonal"] = "step_major", fuse_context: bool = False) -> Iterator[Op]:
        """All ops in one order, without writes that nobody reads, with those fused that one forward can serve.

        Args:
            fuse_context: also join a context write with the denoising of the next block on the same cache.

        Raises:
            ValueError: for step_major order of a video without an end: its second step would never come.
        """
        streams: Sequence[Iterable[Op]] = self.ops_per_cache()
        if fuse_context:
            streams = [join_writes(fuse(stream)) for stream in streams]
        if order == "step_major" and len(streams) > 1 and self.num_blocks is None:
            raise ValueError("a video without an end needs the diagonal order: step-major finishes no block of it")
        ops = step_major(streams) if order == "step_major" else diagonal(streams)
        return fuse(ops if self.num_blocks is None else drop_unread_writes(ops))


def step_major(streams: Sequence[Iterable[Op]]) -> Iterator[Op]:
    """One stream after the other: a step over all blocks before the next."""
    return itertools.chain.from_iterable(streams)


def diagonal(streams: Sequence[Iterable[Op]]) -> Iterator[Op]:
    """Streams in parallel, each one block behind the one before: blocks finish early, few are under way at a time."""

    def numbered(index: int, stream: Iterable[Op]) -> Iterator[tuple[int, int, Op]]:
        return ((op.block + index, index, op) for op in stream)

    merged = heapq.merge(*(numbered(i, s) for i, s in enumerate(streams)), key=lambda item: item[:2])
    return (op for _, _, op in merged)


def _reachable(op: Op, exit_step: int, clean: int) -> Op:
    """A write of a level that a cut rollout never comes to writes the last one that it does."""
    if isinstance(op, WriteContext) and exit_step + 1 < op.noise_index < clean:
        return WriteContext(op.block, exit_step + 1, op.cache)
    return op


def drop_unread_writes(ops: Iterable[Op]) -> Iterator[Op]:
    """Leave out the writes into a cache after its last Denoise: the last block's context."""
    ops = list(ops)
    last_read = {op.cache: i for i, op in enumerate(ops) if not isinstance(op, WriteContext)}
    return (op for i, op in enumerate(ops) if not isinstance(op, WriteContext) or i < last_read.get(op.cache, -1))


def fuse(ops: Iterable[Op]) -> Iterator[Op]:
    """Join a Denoise with the write of its own input that follows it (context `input`): one pass does both."""
    held: Op | None = None
    for op in ops:
        if (
            isinstance(held, Denoise)
            and isinstance(op, WriteContext)
            and (held.block, held.step, held.cache) == (op.block, op.noise_index, op.cache)
        ):
            held = Fused(held, op)
            continue
        if held is not None:
            yield held
        held = op
    if held is not None:
        yield held


def join_writes(stream: Iterable[Op]) -> Iterator[Op]:
    """Join every write on a cache with the Denoise of the next block that follows it: one pass over both blocks."""
    held: Op | None = None
    for op in stream:
        if isinstance(held, WriteContext) and isinstance(op, Denoise):
            held = WriteThenDenoise(held, op)
            continue
        if held is not None:
            yield held
        held = op
    if held is not None:
        yield held


def for_stage(ops: Iterable[Op], caches: Iterable[int]) -> Iterator[Op]:
    """Only the ops of the rank that owns `caches`, in their order."""
    owned = frozenset(caches)
    return (op for op in ops if op.cache in owned)


def dependencies(ops: Sequence[Op]) -> list[set[int]]:
    """For every op the indices of earlier ops that must come before it in any order.

    A Denoise reads its cache and changes its block; a WriteContext reads its block and its cache, and changes the
    cache.
    Whatever reads a thing stays between the changes that it stood between.
    """
    changed: dict[tuple[str, int], int] = {}
    readers: dict[tuple[str, int], set[int]] = {}
    result: list[set[int]] = []
    for index, op in enumerate(ops):
        block, cache = ("block", op.block), ("cache", op.cache)
        changes = {block} if isinstance(op, Denoise) else {cache} if isinstance(op, WriteContext) else {block, cache}
        things = [block, cache]
        if isinstance(op, WriteThenDenoise):
            things.append(("block", op.write.block))  # which it reads
        before: set[int] = set()
        for thing in things:
            if thing in changed:
                before.add(changed[thing])
            if thing in changes:
                before |= readers.pop(thing, set())
                changed[thing] = index
            else:
                readers.setdefault(thing, set()).add(index)
        result.append(before)
    return result
