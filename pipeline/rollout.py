"""The one executor of schedules: nothing else in this repository loops over steps and blocks."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from model.flow import add_noise
from pipeline.schedule import Denoise, DenoiseAndWrite, Op, WriteContext, WriteThenDenoise

Cache = Any  # whatever the denoiser keeps its context in; a KVCache for the real one


class BlockDenoiser(Protocol):
    """What a rollout needs of a network. Blocks are [B, F, C, h, w], sigma is a noise level in [0, 1]."""

    def denoise(self, x: Tensor, sigma: float, first_frame: int, cache: Cache, write: bool = False) -> Tensor:
        """x0 of the block; with `write` the block at this level is appended to the cache by the same pass."""
        ...

    def write_context(self, x: Tensor, sigma: float, first_frame: int, cache: Cache) -> None:
        """Append the block at this level to the cache."""
        ...

    def write_then_denoise(
        self, context: Tensor, context_sigma: float, x: Tensor, sigma: float, first_frame: int, cache: Cache
    ) -> Tensor:
        """`write_context` of a block that starts at `first_frame`, then `denoise` of the next, by one pass."""
        ...


class Transport(Protocol):
    """How a pipeline rank exchanges blocks with its neighbours."""

    def handoff_index(self, block: int) -> int | None:
        """The level at which this rank hands a block on; None on the last rank. See `Schedule.handoff_index`."""
        ...

    def receive(self, block: int) -> tuple[int, Tensor, Tensor]:
        """Level, x and x0 of a block as the rank before has left it."""
        ...

    def send(self, block: int, noise_index: int, x: Tensor, x0: Tensor) -> None:
        """Hand a block on to the rank after."""
        ...


@dataclass
class BlockState:
    """A block under way."""

    noise_index: int
    x: Tensor  # at `level`
    x0: Tensor  # the latest estimate
    before: Tensor  # x at the level before, which context `input` writes


@dataclass(frozen=True)
class Exit:
    """What a block's last Denoise was given."""

    x: Tensor
    sigma: float
    first_frame: int
    cache: Cache


@dataclass(frozen=True)
class BlockLayout:
    """Which frames belong to which block. Given frames that fill no whole block make a short first block."""

    block_frames: int
    prefix_frames: int = 0

    @property
    def prefix_blocks(self) -> int:
        """Blocks that are given."""
        return -(-self.prefix_frames // self.block_frames)

    def start(self, block: int) -> int:
        """Absolute index of the block's first frame."""
        if block == 0:
            return 0
        short = self.prefix_frames % self.block_frames
        return block * self.block_frames - (self.block_frames - short if short else 0)

    def block_at(self, frame: int) -> int:
        """The block that starts at a frame."""
        short = self.prefix_frames % self.block_frames
        return (frame + (self.block_frames - short if short and frame else 0)) // self.block_frames

    def frames(self, block: int) -> int:
        """Frames of the block."""
        return self.start(block + 1) - self.start(block)


class Rollout:
    """Executes ops from noise to finished blocks."""

    def __init__(
        self,
        denoiser: BlockDenoiser,
        sigmas: Sequence[float],
        noise: Callable[[int, int], Tensor],
        new_cache: Callable[[], Cache],
        layout: BlockLayout,
        prefix: Tensor | None = None,
        deterministic: bool = False,
        transport: Transport | None = None,
        observe: Callable[[Op], None] | None = None,
        exit_step: int | None = None,
        with_grad: Callable[[int], bool] | None = None,
    ):
        """
        Args:
            sigmas: noise levels 0..S, falling from the start to 0.
            noise: (block, step) to the noise [B, F, C, h, w] that the block enters the step with.
            new_cache: makes an empty cache; called when a schedule first touches one, and as few times as possible.
            given: clean latents [B, given frames, C, h, w] of the blocks that are not generated.
            deterministic: between steps go along the predicted flow (an Euler step) instead of drawing fresh noise.
            transport: for a rank that owns some caches only: where blocks come from and go to.
            observe: called after every op, for progress and profiles.
            exit_step: for training, with ops that are cut there (`Schedule.until`): the step whose x0 finishes a block.
                What `denoise_again` needs is then kept, the cache included. Default: the last step, and nothing is
                kept.
            with_grad: blocks whose x0 is wanted with its graph. Only the exit step's Denoise runs under autograd; what
                goes on into the context and to later steps is detached (Self-Forcing, arXiv 2506.08009, section 3.2).
        """
        self.denoiser = denoiser
        self.sigmas = list(sigmas)
        self.noise = noise
        self.new_cache = new_cache
        self.layout = layout
        self.prefix = prefix
        self.deterministic = deterministic
        self.transport = transport
        self.observe = observe or (lambda op: None)
        self.exit_step = exit_step
        self.with_grad = with_grad or (lambda block: False)
        self.exits: dict[int, Exit] = {}
        self.blocks: dict[int, BlockState] = {}
        self.caches: dict[int, Cache] = {}
        self._free_caches: list[Cache] = []
        self._finished: list[tuple[int, Tensor]] = []  # and not yielded yet
        self._reached: dict[int, int] = {}  # the block that each cache has come to

    @property
    def num_steps(self) -> int:
        """S."""
        return len(self.sigmas) - 1

    def run(self, ops: Iterable[Op], caches: Iterable[int]) -> Iterator[tuple[int, Tensor]]:
        """Execute ops in the order given; yield (block, latents [B, F, C, h, w]) as blocks are finished.

        Of the ranks of a pipeline only the last yields blocks, all of them.


        Args:
            ops: a list, or an iterator that may be endless. Caches of a list are reused after their last op.
            caches: all the caches that the ops touch.
        """
        self._reached = dict.fromkeys(caches, -1)
        last_use = {op.cache: index for index, op in enumerate(ops)} if isinstance(ops, Sequence) else {}
        for index, op in enumerate(ops):
            self.execute(op)
            self.observe(op)
            yield from self._finished
            self._finished.clear()
            needed = any(exit.cache is self.caches[op.cache] for exit in self.exits.values())
            if last_use.get(op.cache) == index and not needed:
                self._release_cache(op.cache)

    @torch.no_grad()
    def execute(self, op: Op) -> None:
        """Execute one op."""
        cache = self._cache(op.cache)
        if isinstance(op, WriteContext):
            x, sigma = self._context(op)
            self.denoiser.write_context(x, sigma, self.layout.start(op.block), cache)
        elif isinstance(op, DenoiseAndWrite):
            assert op.write.noise_index == op.denoise.step, op
            if self._wants_graph(op.denoise):  # a context has none: it is written by a pass of its own
                self._denoise(op.denoise, cache)
                x, sigma = self._context(op.write)
                self.denoiser.write_context(x, sigma, self.layout.start(op.block), cache)
            else:
                self._denoise(op.denoise, cache, write=True)
        elif isinstance(op, WriteThenDenoise):
            self._denoise(op.denoise, cache, after=op.write)
        else:
            self._denoise(op, cache)
        self._leave_behind(op)

    def _denoise(self, op: Denoise, cache: Cache, write: bool = False, after: WriteContext | None = None) -> None:
        context = None if after is None else self._context(after)  # first: it comes from the rank before first
        state = self._state(op.block, op.step)
        assert state.noise_index == op.step, f"block {op.block} is at level {state.noise_index}, not ready for {op}"
        sigma, next_sigma = self.sigmas[op.step : op.step + 2]
        first_frame = self.layout.start(op.block)
        leaves = self._leaves(op)
        with torch.set_grad_enabled(self._wants_graph(op)):
            if after is None or context is None:
                result = self.denoiser.denoise(state.x, sigma, first_frame, cache, write)
            else:
                start = self.layout.start(after.block)
                result = self.denoiser.write_then_denoise(*context, state.x, sigma, start, cache)
        x0 = result.detach()
        if self.exit_step is not None and leaves:
            self.exits[op.block] = Exit(state.x, sigma, first_frame, cache)
        noise_index = op.step + 1
        if noise_index == self.num_steps:
            x = x0
        elif self.deterministic:
            x = x0 + (next_sigma / sigma) * (state.x - x0)
        else:
            x = add_noise(x0, self.noise(op.block, noise_index), next_sigma)
        self.blocks[op.block] = BlockState(noise_index, x, x0, before=state.x)
        self._hand_on(op.block, result if leaves else None)

    def _leaves(self, op: Denoise) -> bool:
        """Whether this is the Denoise that finishes a block."""
        return op.step == (self.num_steps - 1 if self.exit_step is None else self.exit_step)

    def _wants_graph(self, op: Denoise) -> bool:
        return self._leaves(op) and self.with_grad(op.block)

    def denoise_again(self, block: int) -> Tensor:
        """x0 of a block once more when all are finished, with its graph: the exit step's Denoise beside the cache as it
        was then.

        Given the gradient at the output, blocks do not depend on each other, so that their graphs need not exist at the
        same time. The cache's history must reach back to the block.
        """
        exit = self.exits[block]
        exit.cache.close()
        with torch.enable_grad():
            return self.denoiser.denoise(exit.x, exit.sigma, exit.first_frame, exit.cache)

    def _context(self, op: WriteContext) -> tuple[Tensor, float]:
        """What a write takes: the block at the op's level, and that level's sigma."""
        state = self._state(op.block, op.noise_index)
        if op.noise_index == state.noise_index:
            x = state.x
        elif op.noise_index == self.num_steps:
            x = state.x0
        else:
            assert op.noise_index == state.noise_index - 1, (
                f"block {op.block} is at level {state.noise_index}, too late for {op}"
            )
            x = state.before
        return x, self.sigmas[op.noise_index]

    def _state(self, block: int, noise_index: int) -> BlockState:
        """The block as it is; one that is not here yet is given, or received, or starts from noise."""
        if block not in self.blocks:
            if block < self.layout.prefix_blocks:
                assert self.prefix is not None
                start = self.layout.start(block)
                x = self.prefix[:, start : start + self.layout.frames(block)]
                self.blocks[block] = BlockState(self.num_steps, x, x, before=x)
            elif 0 in self._reached:  # this rank owns the first cache
                assert noise_index == 0, f"block {block} is needed at level {noise_index} before it is there"
                x = self.noise(block, 0)
                self.blocks[block] = BlockState(0, x, x, before=x)
            else:
                assert self.transport is not None, f"block {block} is needed at level {noise_index} before it is there"
                came_at, x, x0 = self.transport.receive(block)
                self.blocks[block] = BlockState(came_at, x, x0, before=x)
                self._hand_on(block, x if came_at == self.num_steps else None)
        return self.blocks[block]

    def _hand_on(self, block: int, finished: Tensor | None) -> None:
        """Send a block to the rank after as soon as this rank will not change it: before its context is written.

        finished: its latents, if it is; then the last rank yields it.
        """
        state = self.blocks[block]
        handoff_index = None if self.transport is None else self.transport.handoff_index(block)
        if handoff_index is not None and state.noise_index == handoff_index:
            assert self.transport is not None
            self.transport.send(block, state.noise_index, state.x, state.x0)
        if handoff_index is None and finished is not None:
            self._finished.append((block, finished))

    def _cache(self, number: int) -> Cache:
        if number not in self.caches:
            self.caches[number] = self._free_caches.pop() if self._free_caches else self.new_cache()
        return self.caches[number]

    def _release_cache(self, number: int) -> None:
        cache = self.caches.pop(number)
        cache.reset()
        self._free_caches.append(cache)

    def _leave_behind(self, op: Op) -> None:
        """Drop the blocks that every cache has gone past: no op on them can come any more."""
        self._reached[op.cache] = op.block
        passed = min(self._reached.values())
        for block in [b for b in self.blocks if b < passed]:
            del self.blocks[block]
