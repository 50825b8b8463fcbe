"""Rollouts for training: they stop at an exit step and provide gradients there."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.batching import Batch
from pipeline.rollout import Cache, Rollout
from pipeline.schedule import Denoise, DenoiseAndWrite, Op


@dataclass(frozen=True)
class ExitInput:
    """The input of a block's Denoise at the exit step."""

    x: Tensor  # [B, F, C, h, w]
    sigma: float
    first_frame: int
    cache: Cache


class TrainingRollout(Rollout):
    """A rollout that stops at an exit step. The x0 predicted at that step is a block's result.

    Run it with the ops of `Schedule.ops_until(exit_step)`. Only the exit step's Denoise may run under autograd.
    Contexts are detached, so gradients do not cross blocks (Self-Forcing, arXiv 2506.08009, section 3.2);
    pipeline/history_replay.py provides those that do.
    """

    def __init__(
        self,
        *args: Any,
        exit_step: int,
        with_grad: Callable[[int], bool] = lambda block: False,
        keep_contexts: bool = False,
        **kwargs: Any,
    ):
        """
        Args:
            exit_step: the step that finishes a block.
            with_grad: maps a block to whether its result keeps its graph.
            keep_contexts: keep the latents of all contexts in `contexts`, for `replay_exit_step`, instead of caches.
            args, kwargs: see `Rollout`.
        """
        super().__init__(*args, **kwargs)
        self.final_step = exit_step
        self.with_grad = with_grad
        self.keep_contexts = keep_contexts
        self.exit_inputs: dict[int, ExitInput] = {}
        self.contexts: dict[tuple[int, int], tuple[Tensor, float]] = {}  # (cache, block) -> latents and sigma

    def replay(self, block: int) -> Tensor:
        """Repeat a block's Denoise at the exit step after the rollout; return its x0 [B, F, C, h, w] with a graph.

        Each block's gradient depends only on the gradient at its own output, so one graph at a time is enough. The
        cache must still hold the block's context (`history_frames` of `build_rollout`).
        """
        inputs = self.exit_inputs[block]
        if inputs.cache is not None:
            inputs.cache.freeze()
        with torch.enable_grad():
            return self.denoiser.denoise(inputs.x, inputs.sigma, inputs.first_frame, inputs.cache)

    def execute(self, op: Op | Batch) -> None:
        """Execute one op. A fused pair with a graph runs as two passes, because contexts carry no graph."""
        if isinstance(op, DenoiseAndWrite) and op.denoise.step == self.final_step and self.with_grad(op.block):
            super().execute(op.denoise)
            super().execute(op.write)
        else:
            super().execute(op)

    def _run_op(self, op: Op) -> None:
        denoise = op.denoise if isinstance(op, DenoiseAndWrite) else op
        if not isinstance(denoise, Denoise) or denoise.step < self.final_step:
            super()._run_op(op)
            return
        x, sigma = self._input(denoise)
        kept_cache = None if self.keep_contexts else self._cache(op.cache)
        self.exit_inputs[op.block] = ExitInput(x, sigma, self.layout.start(op.block), kept_cache)
        with torch.set_grad_enabled(self.with_grad(op.block)):
            super()._run_op(op)

    def _retain(self, block: int, cache: int, x: Tensor, sigma: float) -> None:
        super()._retain(block, cache, x, sigma)
        if self.keep_contexts:
            self.contexts[cache, block] = x, sigma

    def _release_cache(self, number: int) -> None:
        """Keep the caches that `replay` reads."""
        if self.keep_contexts or all(inputs.cache is not self.caches[number] for inputs in self.exit_inputs.values()):
            super()._release_cache(number)
