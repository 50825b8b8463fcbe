"""The rollout of one rank of a pipeline: execute the ops of its stage, receive blocks and hand them on."""

from typing import Any, Protocol

from torch import Tensor

from pipeline.rollout import BlockState, Rollout


class Transport(Protocol):
    """Receives blocks from the upstream rank and sends blocks to the downstream rank."""

    def handoff_index(self, block: int) -> int | None:
        """Return the noise index at which this rank hands a block on; None on the last rank."""
        ...

    def receive(self, block: int) -> tuple[int, Tensor, Tensor]:
        """Return noise index, x and x0 of a block from the upstream rank."""
        ...

    def send(self, block: int, noise_index: int, x: Tensor, x0: Tensor) -> None:
        """Hand a block to the downstream rank."""
        ...


class StageRollout(Rollout):
    """Executes the ops of one rank. Only the last rank yields blocks, and it yields all of them."""

    def __init__(self, *args: Any, transport: Transport, **kwargs: Any):
        """
        Args:
            transport: receives and sends blocks.
            args, kwargs: see `Rollout`.
        """
        super().__init__(*args, **kwargs)
        self.transport = transport

    def _start_block(self, block: int, noise_index: int) -> None:
        """Receive a block, unless it belongs to the prefix or this rank owns the first cache."""
        if block < self.layout.prefix_blocks or 0 in self._last_block:
            super()._start_block(block, noise_index)
            return
        received_index, x, x0 = self.transport.receive(block)
        self.blocks[block] = BlockState(received_index, x, x0, previous_x=x)
        self._block_moved(block, x if received_index == self.num_steps else None)

    def _block_moved(self, block: int, finished: Tensor | None) -> None:
        """Send a block as soon as this rank no longer changes it, before its context is written."""
        handoff_index = self.transport.handoff_index(block)
        state = self.blocks[block]
        if handoff_index is None:
            super()._block_moved(block, finished)
        elif state.noise_index == handoff_index:
            self.transport.send(block, state.noise_index, state.x, state.x0)
