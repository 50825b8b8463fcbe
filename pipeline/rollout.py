"""Execute the ops of a schedule. No other module of this repository loops over steps and blocks.

`Rollout` serves inference. Two subclasses extend it:

- `TrainingRollout` (pipeline/training_rollout.py) stops at an exit step and provides gradients.
- `StageRollout` (pipeline/parallel/stage_rollout.py) exchanges blocks with other ranks.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from model.block_pass import BlockPass
from model.flow import add_noise
from pipeline.batching import Batch, unbatched
from pipeline.schedule import (
    Denoise,
    DenoiseAndWrite,
    ForgetContext,
    Op,
    RewindContext,
    WriteContext,
    WriteThenDenoise,
)

Cache = Any  # the denoiser's context store: a KVCache for the causal DiT, None for a bidirectional network


class BlockDenoiser(Protocol):
    """Interface of the network. Blocks are [B, F, C, h, w]; sigma is a noise level in [0, 1]."""

    def denoise(self, x: Tensor, sigma: float, first_frame: int, cache: Cache, write: bool = False) -> Tensor:
        """Predict the block's x0. With `write`, the same pass appends the block at this level to the cache."""
        ...

    def write_context(
        self, x: Tensor, sigma: float, first_frame: int, cache: Cache, *, read_frames: int | None = None
    ) -> None:
        """Append the block at this level to the cache. `read_frames`, see `WriteContext`, is passed if it is set."""
        ...

    def write_then_denoise(
        self,
        context: Tensor,
        context_sigma: float,
        x: Tensor,
        sigma: float,
        first_frame: int,
        cache: Cache,
        *,
        read_frames: int | None = None,
    ) -> Tensor:
        """Write a block that starts at `first_frame`, then denoise the next block, in one pass."""
        ...


@runtime_checkable
class BatchDenoiser(Protocol):
    """Interface of a network that serves several caches in one pass. The other networks run batches op by op."""

    def run_batch(self, passes: Sequence[BlockPass]) -> list[Tensor]:
        """Run all passes in one; return the x0 of the blocks that are denoised, in their order."""
        ...


@dataclass
class BlockState:
    """The latents of a block in progress, [B, F, C, h, w] each."""

    noise_index: int
    x: Tensor  # at `noise_index`
    x0: Tensor  # the latest prediction
    previous_x: Tensor  # at `noise_index - 1`: the context rule `input` writes it


@dataclass(frozen=True)
class BlockLayout:
    """Assignment of frames to blocks.

    All blocks have `block_frames` frames, except for: an independent first frame, which is a block of its own; the
    first block after it, if the prefix does not fill whole blocks; and the last block of a video of `num_frames`.
    """

    block_frames: int
    prefix_frames: int = 0
    num_frames: int | None = None  # of the video; None: no end
    independent_first_frame: bool = False

    @property
    def prefix_blocks(self) -> int:
        """Number of blocks that the prefix fills."""
        return self.block_at(self.prefix_frames - 1) + 1 if self.prefix_frames else 0

    @property
    def num_blocks(self) -> int:
        """Number of blocks of a video of `num_frames` frames."""
        assert self.num_frames is not None
        return self.block_at(self.num_frames - 1) + 1

    @property
    def sizes(self) -> tuple[int, ...]:
        """Frames of each block of a video of `num_frames` frames."""
        return tuple(self.frames(block) for block in range(self.num_blocks))

    @property
    def is_whole(self) -> bool:
        """Whether the last block of a video of `num_frames` frames is as long as the others."""
        return self.start(self.num_blocks) == self.num_frames

    @property
    def _shift(self) -> int:
        """Frames by which block b starts before frame b * block_frames, for b > 1."""
        first = self.independent_first_frame
        missing = -(self.prefix_frames - first) % self.block_frames if self.prefix_frames else 0
        return missing + (self.block_frames - 1) * first

    def start(self, block: int) -> int:
        """Return the index of the block's first frame in the video."""
        if block <= self.independent_first_frame:
            return block
        return block * self.block_frames - self._shift

    def block_at(self, frame: int) -> int:
        """Return the block that holds a frame."""
        if frame <= self.independent_first_frame:
            return frame
        return (frame + self._shift) // self.block_frames

    def frames(self, block: int) -> int:
        """Return the number of frames of a block."""
        end = self.start(block + 1)
        return (end if self.num_frames is None else min(end, self.num_frames)) - self.start(block)


class Rollout:
    """Executes the ops of one batch of videos, from noise to finished blocks."""

    def __init__(
        self,
        denoiser: BlockDenoiser,
        sigmas: Sequence[float],
        noise: Callable[[int, int], Tensor],
        new_cache: Callable[[], Cache],
        layout: BlockLayout,
        prefix: Tensor | None = None,
        source: Callable[[int], Tensor] | None = None,
        deterministic: bool = False,
        on_op: Callable[[Op], None] | None = None,
        denoiser_at: Callable[[int], BlockDenoiser] | None = None,
        retained_frames: int = 0,
    ):
        """
        Args:
            denoiser: network and prompt of all blocks.
            sigmas: noise levels 0..S, from the first step's input down to 0.
            noise: maps (block, step) to the noise [B, F, C, h, w] in the block's input to that step. Step S is the
                noise of a context that is written with `context_noise`.
            new_cache: returns an empty cache; called only if no released cache can be reused.
            prefix: clean latents [B, prefix frames, C, h, w] that the videos continue.
            source: maps a block to the clean latents [B, F, C, h, w] that video-to-video starts it from. It is called
                once per block, in ascending order. None: blocks start from pure noise.
            deterministic: take Euler steps along the predicted flow instead of drawing fresh noise between steps.
            on_op: called after every op, for progress bars and profiles.
            denoiser_at: maps a block to the denoiser with its prompt; replaces `denoiser`.
            retained_frames: frames of context that a cache can be written with again; needed for `RewindContext`.
        """
        self.denoiser = denoiser
        self.denoiser_at = denoiser_at
        self.retained_frames = retained_frames
        self.sigmas = list(sigmas)
        self.noise = noise
        self.new_cache = new_cache
        self.layout = layout
        self.prefix = prefix
        self.source = source
        self.deterministic = deterministic
        self.on_op = on_op or (lambda op: None)
        self.num_steps = len(self.sigmas) - 1
        self.final_step = self.num_steps - 1  # the step that finishes a block
        self.blocks: dict[int, BlockState] = {}
        self.caches: dict[int, Cache] = {}
        self._free_caches: list[Cache] = []
        self._finished: list[tuple[int, Tensor]] = []  # not yielded yet
        self._next_block = layout.prefix_blocks  # the first block that is not yielded
        self._last_block: dict[int, int] = {}  # of each cache: the block of its last op
        self._written: dict[int, dict[int, tuple[Tensor, float]]] = {}  # of each cache: latents and sigma by block

    def run(self, ops: Iterable[Op | Batch], caches: Iterable[int]) -> Iterator[tuple[int, Tensor]]:
        """Execute ops in order; yield (block, latents [B, F, C, h, w]) as blocks finish.

        Args:
            ops: a list, or an iterator that may be endless. A list allows caches to be reused after their last op.
            caches: all caches that the ops use.
        """
        self._last_block = dict.fromkeys(caches, -1)
        known = enumerate(ops) if isinstance(ops, Sequence) else ()
        last_use = {op.cache: index for index, item in known for op in unbatched(item)}
        for index, item in enumerate(ops):
            self.execute(item)
            for op in unbatched(item):
                self.on_op(op)
            yield from self._finished
            if self._finished:
                self._next_block = self._finished[-1][0] + 1
            self._finished.clear()
            for op in unbatched(item):
                if last_use.get(op.cache) == index:
                    self._release_cache(op.cache)

    @torch.no_grad()
    def execute(self, op: Op | Batch) -> None:
        """Execute one op, or the ops of a batch."""
        match op:
            case Batch():
                self._run_batch(op)
            case ForgetContext():
                self._cache(op.cache).forget(op.frames)
            case RewindContext():
                self._cache(op.cache).rewind(self.layout.start(op.first_block))
            case _:
                self._run_op(op)
        for member in unbatched(op):
            self._drop_passed_blocks(member)

    def replace_latents(self, block: int, latents: Tensor) -> None:
        """Replace the latents of a block that `on_op` reports as just denoised, at the block's noise index.

        Later steps and context writes of the block use the new latents. If the block is finished, so does the result.
        A clean context that is written before the last step still holds the x0 that the network predicted.
        """
        state = self.blocks[block]
        state.x = latents.to(state.x)
        if state.noise_index == self.num_steps:
            state.x0 = state.x
            self._finished = [(b, state.x if b == block else result) for b, result in self._finished]

    def unfinished_blocks(self) -> list[Tensor]:
        """Return the latents [B, F, C, h, w] of the blocks that have started but were not yielded, in order."""
        return [self.blocks[block].x for block in sorted(self.blocks) if block >= self._next_block]

    # ---- Ops ----

    def _run_op(self, op: Op) -> None:
        """Run the forward pass of one op."""
        denoiser, (first, *second) = self._denoiser_of(op), self._passes(op)
        level, place = (first.x, first.sigma), (first.first_frame, first.cache)
        options: Any = {} if first.read_frames is None else {"read_frames": first.read_frames}
        if isinstance(op, WriteContext):
            denoiser.write_context(*level, *place, **options)
        elif second:
            x0 = denoiser.write_then_denoise(*level, second[0].x, second[0].sigma, *place, **options)
            self._finish_step(_denoise_of(op), x0)
        else:
            self._finish_step(_denoise_of(op), denoiser.denoise(*level, *place, first.write))

    def _run_batch(self, batch: Batch) -> None:
        """Run one forward pass per denoiser. All blocks are read before one of them changes."""
        denoisers = [self._denoiser_of(op) for op in batch.ops]
        if not all(isinstance(denoiser, BatchDenoiser) for denoiser in denoisers):
            for op in batch.ops:
                self._run_op(op)
            return
        passes = [self._passes(op) for op in batch.ops]
        groups: dict[int, list[int]] = {}  # the ops of each denoiser
        for index, denoiser in enumerate(denoisers):
            groups.setdefault(id(denoiser), []).append(index)
        for group in groups.values():
            batch_denoiser = cast(BatchDenoiser, denoisers[group[0]])
            moved = [batch.ops[index] for index in group if not isinstance(batch.ops[index], WriteContext)]
            results = batch_denoiser.run_batch([block_pass for index in group for block_pass in passes[index]])
            for op, x0 in zip(moved, results, strict=True):
                self._finish_step(_denoise_of(op), x0)

    def _passes(self, op: Op) -> list[BlockPass]:
        """Return the inputs of an op's forward pass: one block, or two for `WriteThenDenoise`."""
        if isinstance(op, WriteThenDenoise):  # the write first: ranks receive the earlier block first
            return [*self._passes(op.write), *self._passes(op.denoise)]
        cache, start = self._cache(op.cache), self.layout.start(op.block)
        if isinstance(op, WriteContext):
            retained = self._written.get(op.cache, {}).get(op.block) if op.prompt_block is not None else None
            x, sigma = retained or self._context(op)
            self._retain(op.block, op.cache, x, sigma)
            return [BlockPass(x, sigma, start, cache, denoise=False, write=True, read_frames=op.read_frames)]
        x, sigma = self._input(_denoise_of(op))
        if isinstance(op, DenoiseAndWrite):
            self._retain(op.block, op.cache, x, sigma)
        return [BlockPass(x, sigma, start, cache, denoise=True, write=isinstance(op, DenoiseAndWrite))]

    def _denoiser_of(self, op: Op) -> BlockDenoiser:
        if self.denoiser_at is None:
            return self.denoiser
        prompt_block = op.prompt_block if isinstance(op, WriteContext) else None
        return self.denoiser_at(op.block if prompt_block is None else prompt_block)

    def _retain(self, block: int, cache: int, x: Tensor, sigma: float) -> None:
        """Keep the latents that a cache is written with, as long as the context of a later block holds them."""
        if not self.retained_frames:
            return
        written = self._written.setdefault(cache, {})
        written[block] = x, sigma
        oldest = self.layout.start(max(written) + 1) - self.retained_frames
        for passed in [b for b in written if self.layout.start(b + 1) <= oldest]:
            del written[passed]

    def _input(self, op: Denoise) -> tuple[Tensor, float]:
        """Return x of the block that `op` denoises, and its sigma."""
        state = self._state(op.block, op.step)
        assert state.noise_index == op.step, f"block {op.block} is at noise index {state.noise_index}, not ready: {op}"
        return state.x, self.sigmas[op.step]

    def _context(self, op: WriteContext) -> tuple[Tensor, float]:
        """Return the block at the noise index that `op` writes, and its sigma."""
        state = self._state(op.block, op.noise_index)
        if op.noise_index == state.noise_index:
            x = state.x
        elif op.noise_index == self.num_steps:
            x = state.x0
        else:
            late = f"block {op.block} is at noise index {state.noise_index}, too late: {op}"
            assert op.noise_index == state.noise_index - 1, late
            x = state.previous_x
        if op.context_noise:  # the clean noise index has no noise of its own yet, so it keys this one
            return add_noise(x, self.noise(op.block, op.noise_index), op.context_noise), op.context_noise
        return x, self.sigmas[op.noise_index]

    def _finish_step(self, op: Denoise, result: Tensor) -> None:
        """Move a block to the next noise index, given the x0 that its Denoise predicted."""
        x, x0 = self.blocks[op.block].x, result.detach()
        noise_index = op.step + 1
        if noise_index == self.num_steps:
            next_x = x0
        elif self.deterministic:
            next_x = x0 + (self.sigmas[noise_index] / self.sigmas[op.step]) * (x - x0)
        else:
            next_x = add_noise(x0, self.noise(op.block, noise_index), self.sigmas[noise_index])
        self.blocks[op.block] = BlockState(noise_index, next_x, x0, previous_x=x)
        self._block_moved(op.block, result if op.step == self.final_step else None)

    # ---- Blocks and caches ----

    def _state(self, block: int, noise_index: int) -> BlockState:
        """Return a block's state; start the block if it is new. The caller needs it at `noise_index`."""
        if block not in self.blocks:
            self._start_block(block, noise_index)
        return self.blocks[block]

    def _start_block(self, block: int, noise_index: int) -> None:
        if block < self.layout.prefix_blocks:
            assert self.prefix is not None
            start = self.layout.start(block)
            x = self.prefix[:, start : start + self.layout.frames(block)]
            self.blocks[block] = BlockState(self.num_steps, x, x, previous_x=x)
        else:
            assert noise_index == 0, f"block {block} has not reached noise index {noise_index} yet"
            x = self.noise(block, 0)
            if self.source is not None:
                x = add_noise(self.source(block), x, self.sigmas[0])
            self.blocks[block] = BlockState(0, x, x, previous_x=x)

    def _block_moved(self, block: int, finished: Tensor | None) -> None:
        """Collect a block's final latents `finished`, if it has them. Called whenever a block's noise index changes."""
        if finished is not None:
            self._finished.append((block, finished))

    def _drop_passed_blocks(self, op: Op) -> None:
        """Drop the blocks that the ops of all caches have passed: no later op uses them."""
        if isinstance(op, ForgetContext | RewindContext):  # writes of earlier blocks may follow
            return
        self._last_block[op.cache] = op.block
        passed = min(self._last_block.values())
        for block in [block for block in self.blocks if block < passed]:
            del self.blocks[block]

    def _cache(self, number: int) -> Cache:
        if number not in self.caches:
            self.caches[number] = self._free_caches.pop() if self._free_caches else self.new_cache()
        return self.caches[number]

    def _release_cache(self, number: int) -> None:
        cache = self.caches.pop(number)
        self._written.pop(number, None)
        if cache is not None:
            cache.reset()
        self._free_caches.append(cache)


def _denoise_of(op: Op) -> Denoise:
    """Return the Denoise of a fused pair, or the op itself."""
    if isinstance(op, DenoiseAndWrite | WriteThenDenoise):
        return op.denoise
    assert isinstance(op, Denoise)
    return op
