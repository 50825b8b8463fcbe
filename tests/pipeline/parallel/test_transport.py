"""pipeline/parallel/transport.py: what is sent never waits behind what is awaited, nor one receiver behind another."""

import pytest
import torch
import torch.distributed as dist

from pipeline.parallel import transport
from pipeline.parallel.stages import plan_pipelines
from pipeline.parallel.transport import AHEAD, Mail
from pipeline.schedule import Schedule


class Wire:
    """torch.distributed as seen by one rank at a time: notes operations, and what was waited for."""

    def __init__(self) -> None:
        self.rank = 0
        self.groups: list[str] = []
        self.sent: list[tuple[int, int, str]] = []  # from, to, group
        self.awaited: list[tuple[int, int, str]] = []
        self.waits: list[int] = []  # receivers

    def isend(self, message, to, group=None):
        self.sent.append((self.rank, to, group))
        return self._work(to)

    def irecv(self, buffer, sender, group=None):
        self.awaited.append((sender, self.rank, group))
        return self._work(self.rank)

    def new_group(self, **_):
        self.groups.append(f"group {len(self.groups)}")
        return self.groups[-1]

    def _work(self, to):
        class Work:
            def wait(work):
                self.waits.append(to)

        return Work()


@pytest.fixture
def wire(monkeypatch) -> Wire:
    wire = Wire()
    for name in ("isend", "irecv", "new_group"):
        monkeypatch.setattr(dist, name, getattr(wire, name))
    monkeypatch.setattr(dist, "get_rank", lambda: wire.rank)
    return wire


@pytest.mark.parametrize("num_ranks", [2, 3, 4, 5, 6, 13])
def test_no_rank_sends_in_a_group_in_which_it_awaits(wire, num_ranks):
    """NCCL does the operations of one rank and group in order: those posted ahead would come first."""
    groups = transport.edge_groups()
    message = torch.zeros(1)
    for pipeline in plan_pipelines(num_ranks, Schedule(num_steps=4, num_blocks=5)):
        for wire.rank, _ in pipeline.stages:
            before, after = pipeline.neighbours(wire.rank)
            mail = Mail(torch.device("cpu"), groups)
            if before is not None:
                mail.expect([(before, (1,), torch.float32)] * 3)
            if after is not None:
                mail.send(message, after)
        decoder = wire.rank = pipeline.decoder
        if decoder not in dict(pipeline.stages):
            Mail(torch.device("cpu"), groups).expect([(pipeline.stages[-1][0], (1,), torch.float32)] * 3)
    assert set(wire.sent) == set(wire.awaited) and wire.sent  # both ends take the same group
    for rank in range(num_ranks):
        assert not {g for s, _, g in wire.sent if s == rank} & {g for _, to, g in wire.awaited if to == rank}


def test_a_sender_waits_for_the_receiver_that_is_behind_only(wire):
    mail = Mail(torch.device("cpu"))
    for video in range(AHEAD + 1):
        assert wire.waits == []
        for receiver in (1, 2, 3) if video < AHEAD else (2,):
            mail.send(torch.zeros(1), receiver)
    assert wire.waits == [2]
    mail.finish()
    assert sorted(wire.waits) == [1] * AHEAD + [2] * (AHEAD + 1) + [3] * AHEAD
    assert {group for _, _, group in wire.sent} == {None}  # texts go by the default group
