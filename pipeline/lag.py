"""Lag of live prompts, in forward passes on one device. This module counts ops and imports no torch."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from pipeline.batching import Batch, Order, arrange, unbatched
from pipeline.prompt_switch import PromptSwitch, add_switch_ops
from pipeline.prompt_track import LivePrompts
from pipeline.schedule import Denoise, ForgetContext, Op, RewindContext, Schedule


@dataclass(frozen=True)
class Lag:
    """Forward passes until blocks are finished, in diagonal or batched order."""

    first_block: int
    """From the start to the end of the first block."""
    shortest: int
    """From a new prompt to the end of its first block, if the prompt comes just before that block starts."""
    longest: int
    """The same, if the prompt comes just after a block has started."""

    def __str__(self) -> str:
        lag = f"{self.shortest} to {self.longest}" if self.longest > self.shortest else f"{self.shortest}"
        return f"first block after {self.first_block} passes; a new prompt shows after {lag} passes"


def prompt_lag(
    schedule: Schedule,
    fuse_context: bool,
    rule: PromptSwitch,
    first_context_block: Callable[[int], int],
    order: Order = "diagonal",
) -> Lag:
    """Count the passes of a live video with this schedule. A batch is one pass.

    Args:
        fuse_context: see `Schedule.ops`.
        rule, first_context_block: see `add_switch_ops`.
        order: see `arrange`.
    """
    endless = replace(schedule, num_blocks=None)
    steady = 0
    while first_context_block(steady) <= schedule.prefix_blocks + schedule.leading_blocks + 2 * schedule.num_steps:
        steady += 1

    def ops(live: LivePrompts) -> Iterator[Op | Batch]:
        return add_switch_ops(arrange(endless, order, fuse_context), live, rule, first_context_block)

    lags: list[int] = []
    first_block = passes_before = 0
    for op in ops(LivePrompts("old")):
        passes_before += _is_pass(op)
        if not first_block and _finishes(op, endless.num_steps) is not None:
            first_block = passes_before
        if op.block > steady and _starts(op):
            break
        if lags or (op.block == steady and _starts(op)):
            lags.append(_lag_after(ops, passes_before, endless.num_steps))
    return Lag(first_block, min(lags), max(lags))


def _lag_after(ops: Callable[[LivePrompts], Iterator[Op | Batch]], typed: int, num_steps: int) -> int:
    """Return the passes from pass `typed`, after which the prompt changes, to the end of the first changed block."""
    live, passes = LivePrompts("old"), 0
    for op in ops(live):
        passes += _is_pass(op)
        live.prompt_at(op.block)
        if passes == typed:
            live.prompt = "new"
        block = _finishes(op, num_steps)
        if block is not None and live.prompt_at(block) == "new":
            return passes - typed
    raise AssertionError("an endless video has another block")


def _is_pass(op: Op | Batch) -> bool:
    return not isinstance(op, ForgetContext | RewindContext)


def _denoises(item: Op | Batch) -> Iterator[Denoise]:
    for op in unbatched(item):
        denoise = op if isinstance(op, Denoise) else getattr(op, "denoise", None)
        if denoise is not None:
            yield denoise


def _starts(op: Op | Batch) -> bool:
    return any(denoise.step == 0 for denoise in _denoises(op))


def _finishes(op: Op | Batch, num_steps: int) -> int | None:
    """Return the block that an op finishes, if it does."""
    return next((denoise.block for denoise in _denoises(op) if denoise.step == num_steps - 1), None)
