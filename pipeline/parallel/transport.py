"""Hand-off of blocks between the ranks of a pipeline: point-to-point messages over NCCL or gloo."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.parallel.profile import Recorder
from pipeline.rollout import BlockLayout
from pipeline.schedule import Denoise, DenoiseAndWrite, Op, Schedule, WriteThenDenoise

MAX_IN_FLIGHT = 2
"""Messages in flight between two ranks. The limit bounds the memory of both."""
GROUP_TIMEOUT = timedelta(days=1)
"""Timeout of process groups. `pipeline.parallel.peers` detects dead ranks; slow ranks are allowed."""

MessageSpec = tuple[int, tuple[int, ...], torch.dtype]
"""Sender, shape and dtype of a message."""


def handoff_groups() -> list[dist.ProcessGroup]:
    """Create a process group for blocks from even ranks and one for blocks from odd ranks; call it on all ranks.

    NCCL runs the sends and receives of a rank in one group in order, on one stream. In a single group, a send would
    wait for all receives that were posted before it. Blocks move from a rank to the next one, so with two groups no
    rank both sends and receives in the same group.
    """
    return [dist.new_group(timeout=GROUP_TIMEOUT, group_desc=f"blocks from {kind} ranks") for kind in ("even", "odd")]


class MessageChannel:
    """Point-to-point messages of known shapes in a known order. Receives are posted early; sends do not wait."""

    def __init__(self, device: torch.device, groups: Sequence[dist.ProcessGroup | None] = (None,)):
        """
        Args:
            device: of the messages.
            groups: process groups; a message from rank r uses groups[r % len(groups)]. None is the default group.
        """
        self.device = device
        self.groups = groups
        self._expected: Iterator[MessageSpec] = iter(())
        self._receives: deque[tuple[Tensor, dist.Work]] = deque()
        self._sends: dict[int, deque[tuple[Tensor, dist.Work]]] = {}  # one queue per receiver: speeds differ
        self._free_buffers: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = {}

    def expect(self, messages: Iterable[MessageSpec]) -> None:
        """Set the next messages to receive, in order, and post receives for the first few."""
        self._expected = iter(messages)
        self._post_receives()

    def receive(self) -> Tensor:
        """Return the next message. On a GPU only the current stream waits for it, not the host."""
        buffer, work = self._receives.popleft()
        work.wait()
        message = buffer.clone()
        self._free_buffers.setdefault((buffer.shape, buffer.dtype), []).append(buffer)
        self._post_receives()
        return message

    def send(self, message: Tensor, to: int) -> None:
        """Send a message to a rank; wait only if that rank is far behind. The message must not change afterwards."""
        message = message.contiguous()
        work = dist.isend(message, to, group=self._group(dist.get_rank()))
        assert work is not None
        sends = self._sends.setdefault(to, deque())
        sends.append((message, work))
        while len(sends) > MAX_IN_FLIGHT:
            sends.popleft()[1].wait()

    def wait_for_sends(self) -> None:
        """Wait until all sent messages have arrived."""
        for sends in self._sends.values():
            while sends:
                sends.popleft()[1].wait()

    def _group(self, sender: int) -> dist.ProcessGroup | None:
        return self.groups[sender % len(self.groups)]

    def _post_receives(self) -> None:
        while len(self._receives) < MAX_IN_FLIGHT and (message := next(self._expected, None)) is not None:
            sender, shape, dtype = message
            free = self._free_buffers.get((torch.Size(shape), dtype))
            buffer = free.pop() if free else torch.empty(shape, dtype=dtype, device=self.device)
            work = dist.irecv(buffer, sender, group=self._group(sender))
            assert work is not None
            self._receives.append((buffer, work))


class StageTransport:
    """Transport of one stage for one video: receives blocks from upstream and sends blocks downstream.

    A block is one float32 message: x [1, F, C, h, w]. If a later rank writes clean context from the predicted x0, the
    message holds x and x0, [2, 1, F, C, h, w].
    """

    def __init__(
        self,
        schedule: Schedule,
        caches: tuple[int, ...],
        layout: BlockLayout,
        frame_shape: tuple[int, int, int],
        upstream: int | None,
        downstream: int | None,
        channel: MessageChannel,
        recorder: Recorder,
        send_after_write: bool = False,
    ):
        """
        Args:
            caches: the caches of this rank.
            frame_shape: (C, h, w).
            upstream: rank of the previous stage; None on the first stage.
            downstream: rank of the next stage; None on the last stage.
            send_after_write: send a block only after its context write. Slower; for comparison.
        """
        self.schedule, self.caches, self.layout, self.frame_shape = schedule, caches, layout, frame_shape
        self.downstream, self.channel, self.recorder = downstream, channel, recorder
        self.send_after_write = send_after_write
        self._delayed: tuple[int, Tensor] | None = None
        if upstream is not None:
            earlier = [cache for cache in schedule.caches if cache < caches[0]]
            assert schedule.num_blocks is not None
            blocks = range(schedule.num_blocks)
            self._received_index = {block: schedule.handoff_index(block, earlier) for block in blocks}
            channel.expect(
                (upstream, self._message_shape(block, self._received_index[block]), torch.float32)
                for block in blocks[schedule.prefix_blocks :]
            )

    def handoff_index(self, block: int) -> int | None:
        """Return `Schedule.handoff_index` of this rank."""
        return self.schedule.handoff_index(block, self.caches)

    def receive(self, block: int) -> tuple[int, Tensor, Tensor]:
        """Return noise index, x and x0 of a block from the upstream rank."""
        with self.recorder("receive wait", block):
            message = self.channel.receive()
        noise_index = self._received_index[block]
        assert noise_index is not None
        x, x0 = message if self._includes_x0(noise_index) else (message, message)
        return noise_index, x, x0

    def send(self, block: int, noise_index: int, x: Tensor, x0: Tensor) -> None:
        """Hand a block to the downstream rank."""
        message = torch.stack([x, x0]) if self._includes_x0(noise_index) else x
        if self.send_after_write:
            self.flush()
            self._delayed = block, message
        else:
            self._send(block, message)

    def after_op(self, op: Op) -> None:
        """Send a delayed block if `op` wrote its context. Call this after every op."""
        written = op.write.block if isinstance(op, DenoiseAndWrite | WriteThenDenoise) else op.block
        if self._delayed is not None and not isinstance(op, Denoise) and written == self._delayed[0]:
            self.flush()

    def flush(self) -> None:
        """Send the delayed block, if there is one. Call this after the last op."""
        if self._delayed is not None:
            delayed, self._delayed = self._delayed, None
            self._send(*delayed)

    def _send(self, block: int, message: Tensor) -> None:
        assert self.downstream is not None
        with self.recorder("send", block):
            self.channel.send(message, self.downstream)

    def _includes_x0(self, noise_index: int | None) -> bool:
        return self.schedule.context == "clean" and noise_index != self.schedule.num_steps

    def _message_shape(self, block: int, noise_index: int | None) -> tuple[int, ...]:
        shape = (1, self.layout.frames(block), *self.frame_shape)
        return (2, *shape) if self._includes_x0(noise_index) else shape
