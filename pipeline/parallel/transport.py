"""How the ranks of a pipeline hand blocks to each other: torch.distributed, over NCCL or gloo."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.parallel.profile import Recorder
from pipeline.rollout import BlockLayout
from pipeline.schedule import Denoise, DenoiseAndWrite, Op, Schedule, WriteThenDenoise

AHEAD = 2  # messages that may be on their way from a rank to another; what bounds its memory
PATIENCE = timedelta(
    days=1
)  # of process groups: who is dead is found out by `pipeline.parallel.peers`; who is slow may be


def edge_groups() -> list[dist.ProcessGroup]:
    """Process groups of all ranks, which make them together: one for blocks from even ranks, one for those from odd.

    NCCL does what a rank sends and receives in one group in one order, on one stream: a block would wait to be sent
    until all that were awaited before it, further blocks included, have come. Blocks go from a rank to the next, so
    that with these no rank both sends and receives in a group.
    """
    return [dist.new_group(timeout=PATIENCE, group_desc=f"blocks from {kind} ranks") for kind in ("even", "odd")]


class Mail:
    """Messages of known shapes in a known order between ranks, received ahead and sent without waiting."""

    def __init__(self, device: torch.device, groups: Sequence[dist.ProcessGroup | None] = (None,)):
        """
        Args:
            groups: a message goes by that of its sender's number, modulo how many there are; None is the default group.
        """
        self.device = device
        self.groups = groups
        self._expected: Iterator[tuple[int, tuple[int, ...], torch.dtype]] = iter(())
        self._posted: deque[tuple[Tensor, dist.Work]] = deque()
        self._sent: dict[int, deque[tuple[Tensor, dist.Work]]] = {}  # by receiver: one may be far behind another
        self._buffers: dict[tuple, list[Tensor]] = {}

    def expect(self, messages: Iterable[tuple[int, tuple[int, ...], torch.dtype]]) -> None:
        """Say from whom, of what shape and type the coming messages are; the first few are awaited at once."""
        self._expected = iter(messages)
        self._post()

    def receive(self) -> Tensor:
        """The next message. On a GPU only its stream waits for it."""
        buffer, work = self._posted.popleft()
        work.wait()
        message = buffer.clone()
        self._buffers.setdefault((buffer.shape, buffer.dtype), []).append(buffer)
        self._post()
        return message

    def send(self, message: Tensor, to: int) -> None:
        """Send a message, which must not be changed any more; waits only if the receiver is far behind."""
        message = message.contiguous()
        work = dist.isend(message, to, group=self._group_of(dist.get_rank()))
        assert work is not None
        sent = self._sent.setdefault(to, deque())
        sent.append((message, work))
        while len(sent) > AHEAD:
            sent.popleft()[1].wait()

    def finish(self) -> None:
        """Wait until everything that was sent has arrived."""
        for sent in self._sent.values():
            while sent:
                sent.popleft()[1].wait()

    def _group_of(self, sender: int) -> dist.ProcessGroup | None:
        return self.groups[sender % len(self.groups)]

    def _post(self) -> None:
        while len(self._posted) < AHEAD and (message := next(self._expected, None)) is not None:
            sender, shape, dtype = message
            free = self._buffers.get((torch.Size(shape), dtype))
            buffer = free.pop() if free else torch.empty(shape, dtype=dtype, device=self.device)
            work = dist.irecv(buffer, sender, group=self._group_of(sender))
            assert work is not None
            self._posted.append((buffer, work))


class Neighbours:
    """A stage's transport (`pipeline.rollout.Transport`) for one video: blocks from the rank before to the rank after.

    A block is one message: x, or x and the estimate of x0 where a context of level `clean` is still to be written.
    """

    def __init__(
        self,
        schedule: Schedule,
        caches: tuple[int, ...],
        layout: BlockLayout,
        frame: tuple[int, int, int],
        before: int | None,
        after: int | None,
        mail: Mail,
        record: Recorder,
        late: bool = False,
    ):
        """
        Args:
            caches: those of this rank.
            frame: (C, h, w).
            before, after: ranks, as far as there are any that denoise.
            late: send a block only after its context has been written: slower, for comparison.
        """
        self.schedule, self.caches, self.layout, self.frame = schedule, caches, layout, frame
        self.after, self.mail, self.record, self.late = after, mail, record, late
        self._held: tuple[int, Tensor] | None = None
        if before is not None:
            earlier = [cache for cache in schedule.caches if cache < caches[0]]
            assert schedule.num_blocks is not None
            self._levels = {block: schedule.handoff_index(block, earlier) for block in range(schedule.num_blocks)}
            blocks = range(schedule.prefix_blocks, schedule.num_blocks)
            mail.expect((before, self._shape(block, self._levels[block]), torch.float32) for block in blocks)

    def handoff_index(self, block: int) -> int | None:
        """See `Schedule.handoff_index`."""
        return self.schedule.handoff_index(block, self.caches)

    def receive(self, block: int) -> tuple[int, Tensor, Tensor]:
        """Level, x and x0 of a block as the rank before has left it."""
        with self.record("receive wait", block):
            message = self.mail.receive()
        noise_index = self._levels[block]
        assert noise_index is not None
        x, x0 = message if self._has_estimate(noise_index) else (message, message)
        return noise_index, x, x0

    def send(self, block: int, noise_index: int, x: Tensor, x0: Tensor) -> None:
        """Hand a block on to the rank after."""
        message = torch.stack([x, x0]) if self._has_estimate(noise_index) else x
        if self.late:
            self._flush()
            self._held = block, message
        else:
            self._send(block, message)

    def after_op(self, op: Op) -> None:
        """To be told of every op that is done: what is held back waits for its block's context."""
        written = op.write.block if isinstance(op, DenoiseAndWrite | WriteThenDenoise) else op.block
        if self._held is not None and not isinstance(op, Denoise) and written == self._held[0]:
            self._flush()

    def finish(self) -> None:
        """Send what is still held back."""
        self._flush()

    def _flush(self) -> None:
        if self._held is not None:
            held, self._held = self._held, None
            self._send(*held)

    def _send(self, block: int, message: Tensor) -> None:
        assert self.after is not None
        with self.record("send", block):
            self.mail.send(message, self.after)

    def _has_estimate(self, noise_index: int | None) -> bool:
        return self.schedule.context == "clean" and noise_index != self.schedule.num_steps

    def _shape(self, block: int, noise_index: int | None) -> tuple[int, ...]:
        shape = (1, self.layout.frames(block), *self.frame)
        return (2, *shape) if self._has_estimate(noise_index) else shape
