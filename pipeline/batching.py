"""Batches: ops of one anti-diagonal that one forward pass executes. This module imports no torch.

The ops of a diagonal are on different caches and different blocks, so none of them reads what another one changes. One
pass over all their blocks costs less than one pass each, if a pass is too small to fill the device.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.schedule import Op, Schedule

Order = Literal["step_major", "diagonal", "batched"]


@dataclass(frozen=True, slots=True)
class Batch:
    """Ops that run in one forward pass, each on its own cache. All blocks are read before one of them changes."""

    ops: tuple[Op, ...]

    @property
    def block(self) -> int:
        """The newest block of the ops."""
        return max(op.block for op in self.ops)


def unbatched(op: Op | Batch) -> tuple[Op, ...]:
    """Return the ops of a batch, or the op itself."""
    return op.ops if isinstance(op, Batch) else (op,)


def count_ops(ops: Iterable[Op | Batch]) -> int:
    """Return the number of ops, those in batches included."""
    return sum(len(unbatched(op)) for op in ops)


def streaming_order(order: Order) -> Order:
    """Return the order that finishes blocks early in place of `order`: diagonal instead of step_major."""
    return "diagonal" if order == "step_major" else order


def arrange(schedule: Schedule, order: Order, fuse_context: bool = False) -> Iterator[Op | Batch]:
    """Return all ops of a schedule in the order of `rollout.order`; see `Schedule.ops`."""
    ops = schedule.ops("diagonal" if order == "batched" else order, fuse_context)
    return batch_diagonals(ops, schedule.caches) if order == "batched" and len(schedule.caches) > 1 else ops


def batch_diagonals(ops: Iterable[Op], caches: Sequence[int]) -> Iterator[Op | Batch]:
    """Batch the ops of each diagonal: the first ops of all caches, then the second ops, and so on.

    A batch may have a single op, so that all ops of the video run in passes of one kind.

    Args:
        ops: in diagonal order.
        caches: the caches of the schedule.
    """
    position = {cache: index for index, cache in enumerate(caches)}
    for _, diagonal in itertools.groupby(ops, key=lambda op: op.block + position[op.cache]):
        of_caches: dict[int, list[Op]] = {}
        for op in diagonal:
            of_caches.setdefault(op.cache, []).append(op)
        for batch in itertools.zip_longest(*of_caches.values()):
            yield Batch(tuple(op for op in batch if op is not None))
