"""benchmark/measure.py: claims about what its numbers mean."""

import time
import warnings

import pytest
import torch
import torch.nn.functional as F

from benchmark import measure
from benchmark.measure import (
    Effort,
    Spread,
    counted_flops,
    durations,
    host_syncs,
    matmul_peak,
    peak_memory,
    reset_peak_memory,
    waits,
)

CPU = torch.device("cpu")


def test_durations_leave_the_warm_up_out():
    waiting = iter([0.2, 0.01, 0.02, 0.03])
    times = durations(lambda: time.sleep(next(waiting)), CPU, Effort(1, 3))
    assert len(times) == 3 and all(0.01 <= t < 0.2 for t in times)
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0)


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.sum() > 0),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.numpy(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: torch.equal(x, x),
        lambda x: float(x[0]),
    ],
)
def test_reading_a_value_is_a_sync(read):
    with host_syncs(CPU) as found:
        read(torch.ones(3))
    assert len(found) == 1


def test_computing_is_none():
    with host_syncs(CPU) as found:
        x = torch.randn(4, 4).to(torch.float64) @ torch.full((4, 4), 2.0, dtype=torch.float64)
        x[torch.tensor([1, 2])] += 1
        F.scaled_dot_product_attention(x[None], x[None], x[None]).clone().copy_(x)
    assert found == []


def test_what_cuda_says_of_its_own_detection_is_no_sync(monkeypatch):
    """torch's own words; the first are a warning of every process's first `set_sync_debug_mode`."""

    def set_mode(mode):
        if mode == "warn":
            warnings.warn(
                "Synchronization debug mode is a prototype feature and does not yet detect all "
                "synchronizing operations (Triggered internally at torch/csrc/cuda/Module.cpp:1)",
                stacklevel=1,
            )

    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    with host_syncs(torch.device("cuda")) as found:
        warnings.warn("synchronizing is deprecated", stacklevel=1)
    assert found == []
    with host_syncs(torch.device("cuda")) as found:
        for _ in range(2):
            warnings.warn(
                "called a synchronizing CUDA operation (Triggered internally at CUDAFunctions.cpp:1)", stacklevel=1
            )
    assert len(found) == 2


def test_copies_between_devices_wait_unless_they_are_queued():
    there, here = torch.empty(2, device="meta"), torch.empty(2)
    aten = torch.ops.aten
    for args, result in ((lambda *more: (here, there, *more), here), (lambda *more: (there, here, *more), there)):
        assert waits(aten.copy_.default, args(), {}, result) and waits(aten.copy_.default, args(False), {}, result)
        assert not waits(aten.copy_.default, args(True), {}, result)
    assert waits(aten._to_copy.default, (there,), {}, here)
    assert not waits(aten._to_copy.default, (there,), {"non_blocking": True}, here)
    assert not waits(aten._to_copy.default, (here,), {}, here) and not waits(
        aten.copy_.default, (there, there), {}, there
    )


def test_peak_memory_sees_what_is_gone_again():
    reset_peak_memory(CPU)
    before = peak_memory(CPU)
    torch.ones(25_000_000)
    assert 90e6 < peak_memory(CPU) - before < 200e6


def test_attention_is_counted_on_a_cpu_too_and_compiled_code():
    x = torch.randn(1, 2, 16, 8)
    attention = torch.compile(lambda: F.scaled_dot_product_attention(x, x, x))
    assert counted_flops(attention) == 2 * 2 * 2 * 16 * 16 * 8


def test_the_peak_is_that_of_a_product_which_takes_long_enough(monkeypatch):
    taken = iter([[0.001] * 5, [0.01] * 5, [0.2, 0.3, 0.4, 0.5, 9.0]])
    monkeypatch.setattr(measure, "durations", lambda *_: next(taken))
    assert matmul_peak(CPU, torch.float32) == 2 * 1024**3 / 0.4
