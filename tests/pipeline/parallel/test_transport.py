"""pipeline/parallel/transport.py: a send never waits for a posted receive, or for another receiver."""

import pytest
import torch
import torch.distributed as dist

from pipeline.parallel import transport
from pipeline.parallel.stages import plan_pipelines
from pipeline.parallel.transport import MAX_IN_FLIGHT, MessageChannel
from pipeline.schedule import Schedule

CPU = torch.device("cpu")


class FakeNetwork:
    """A fake torch.distributed for one rank at a time: records operations and waits, transfers nothing."""

    def __init__(self) -> None:
        self.rank = 0
        self.groups: list[str] = []
        self.sends: list[tuple[int, int, str]] = []  # sender, receiver, group
        self.receives: list[tuple[int, int, str]] = []  # sender, receiver, group
        self.waits: list[int] = []  # receivers

    def isend(self, message, to, group=None):
        self.sends.append((self.rank, to, group))
        return self._work(to)

    def irecv(self, buffer, sender, group=None):
        self.receives.append((sender, self.rank, group))
        return self._work(self.rank)

    def new_group(self, **_):
        self.groups.append(f"group {len(self.groups)}")
        return self.groups[-1]

    def _work(self, receiver):
        class Work:
            def wait(work):
                self.waits.append(receiver)

        return Work()


@pytest.fixture
def network(monkeypatch) -> FakeNetwork:
    network = FakeNetwork()
    for name in ("isend", "irecv", "new_group"):
        monkeypatch.setattr(dist, name, getattr(network, name))
    monkeypatch.setattr(dist, "get_rank", lambda: network.rank)
    return network


@pytest.mark.parametrize("num_ranks", [2, 3, 4, 5, 6, 13])
def test_no_rank_sends_and_receives_in_the_same_group(network, num_ranks):
    """NCCL runs the operations of one rank and group in order, so posted receives would delay a send."""
    groups = transport.handoff_groups()
    message = torch.zeros(1)
    for pipeline in plan_pipelines(num_ranks, Schedule(num_steps=4, num_blocks=5)):
        for network.rank in pipeline.stage_ranks:
            upstream, downstream = pipeline.upstream(network.rank), pipeline.downstream(network.rank)
            channel = MessageChannel(CPU, groups)
            if upstream is not None:
                channel.expect([(upstream, (1,), torch.float32)] * 3)
            if downstream is not None:
                channel.send(message, downstream)
        decoder = network.rank = pipeline.decoder_rank
        if decoder not in pipeline.stage_ranks:
            MessageChannel(CPU, groups).expect([(pipeline.stage_ranks[-1], (1,), torch.float32)] * 3)
    assert set(network.sends) == set(network.receives) and network.sends  # both ends use the same group
    for rank in range(num_ranks):
        groups_sent = {group for sender, _, group in network.sends if sender == rank}
        groups_received = {group for _, receiver, group in network.receives if receiver == rank}
        assert not groups_sent & groups_received


def test_a_sender_waits_only_for_the_receiver_that_is_behind(network):
    channel = MessageChannel(CPU)
    for video in range(MAX_IN_FLIGHT + 1):
        assert network.waits == []
        for receiver in (1, 2, 3) if video < MAX_IN_FLIGHT else (2,):
            channel.send(torch.zeros(1), receiver)
    assert network.waits == [2]
    channel.wait_for_sends()
    assert sorted(network.waits) == [1] * MAX_IN_FLIGHT + [2] * (MAX_IN_FLIGHT + 1) + [3] * MAX_IN_FLIGHT
    assert {group for _, _, group in network.sends} == {None}  # embeddings use the default group
