"""benchmark/measure.py and host_syncs.py: times, memory, operations and syncs are measured correctly."""

import time
import warnings

import pytest
import torch
import torch.nn.functional as F

from benchmark import measure
from benchmark.host_syncs import host_syncs, is_sync
from benchmark.measure import (
    Measurement,
    Repeats,
    counted_flops,
    durations,
    matmul_peak,
    peak_memory,
    reset_peak_memory,
)

CPU = torch.device("cpu")


def test_durations_exclude_the_warm_up():
    waiting = iter([0.2, 0.01, 0.02, 0.03])
    times = durations(lambda: time.sleep(next(waiting)), CPU, Repeats(1, 3))
    assert len(times) == 3 and all(0.01 <= t < 0.2 for t in times)
    assert Measurement.of([3.0, 1.0, 2.0]) == Measurement(2.0, 1.0, 3.0)


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


def test_computation_is_no_sync():
    with host_syncs(CPU) as found:
        x = torch.randn(4, 4).to(torch.float64) @ torch.full((4, 4), 2.0, dtype=torch.float64)
        x[torch.tensor([1, 2])] += 1
        F.scaled_dot_product_attention(x[None], x[None], x[None]).clone().copy_(x)
    assert found == []


def test_the_warning_about_the_detection_itself_is_no_sync(monkeypatch):
    """The warnings have torch's texts. The first one appears at the first `set_sync_debug_mode` of a process."""

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
        assert is_sync(aten.copy_.default, args(), {}, result) and is_sync(aten.copy_.default, args(False), {}, result)
        assert not is_sync(aten.copy_.default, args(True), {}, result)
    assert is_sync(aten._to_copy.default, (there,), {}, here)
    assert not is_sync(aten._to_copy.default, (there,), {"non_blocking": True}, here)
    assert not is_sync(aten._to_copy.default, (here,), {}, here) and not is_sync(
        aten.copy_.default, (there, there), {}, there
    )


def test_peak_memory_includes_freed_memory():
    reset_peak_memory(CPU)
    before = peak_memory(CPU)
    torch.ones(25_000_000)
    assert 90e6 < peak_memory(CPU) - before < 200e6


def test_attention_and_compiled_code_are_counted_on_a_cpu():
    x = torch.randn(1, 2, 16, 8)
    attention = torch.compile(lambda: F.scaled_dot_product_attention(x, x, x))
    assert counted_flops(attention) == 2 * 2 * 2 * 16 * 16 * 8


def test_the_peak_is_measured_with_a_product_that_takes_long_enough(monkeypatch):
    taken = iter([[0.001] * 5, [0.01] * 5, [0.2, 0.3, 0.4, 0.5, 9.0]])
    monkeypatch.setattr(measure, "durations", lambda *_: next(taken))
    assert matmul_peak(CPU, torch.float32) == 2 * 1024**3 / 0.4
