"""Measurements of time, memory and floating-point operations, and the peak speed of the machine."""

import contextlib
import gc
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pipeline.parallel.profile import Recorder


@dataclass(frozen=True)
class Measurement:
    """Median (`median`), smallest (`low`) and largest (`high`) value of repeated measurements."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Measurement":
        """Summarize the values of repeated measurements."""
        values = sorted(values)
        return cls(statistics.median(values), values[0], values[-1])


def ratios(slow: Sequence[float], fast: Sequence[float]) -> Measurement:
    """Summarize how many times as long the first of two interleaved series of runs took."""
    return Measurement.of(a / b for a, b in zip(slow, fast, strict=True))


Results = dict[str, Measurement | float | None]
"""Results of one benchmark by name. None: not measured in this case."""


CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
"""Clocks of a CPU. On a machine with other work, CPU seconds vary less than the wall clock."""


@dataclass(frozen=True)
class Repeats:
    """Number of runs before timing starts, number of timed runs, and the clock of a CPU."""

    warmup: int = 1
    timed: int = 3
    clock: Callable[[], float] = time.perf_counter

    @property
    def total(self) -> int:
        """Number of all runs."""
        return self.warmup + self.timed


def durations(work: Callable[[], object], device: torch.device, repeats: Repeats) -> list[float]:
    """Run `work` repeatedly and return the seconds of each timed run on the device."""
    return interleaved_durations([work], device, repeats)[0]


def interleaved_durations(
    works: Sequence[Callable[[], object]], device: torch.device, repeats: Repeats
) -> list[list[float]]:
    """Run all works one after the other, repeatedly; return the seconds of the timed runs of each.

    A slow phase of the machine thus affects all works alike.
    """
    recorder = Recorder(device, clock=repeats.clock)
    for _ in range(repeats.total):
        for number, work in enumerate(works):
            with recorder("work", number):
                work()
    timed = recorder.spans()[repeats.warmup * len(works) :]
    return [[span.seconds for span in timed if span.block == number] for number in range(len(works))]


@torch.no_grad()
def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s of a large square matrix product (median of 5): the practical peak of the device."""
    size = 256
    while True:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        seconds = statistics.median(durations(partial(torch.matmul, a, b), device, Repeats(1, 5)))
        if seconds > 0.1 or size == 16384:
            return 2 * size**3 / seconds
        size *= 2


def counted_flops(work: Callable[[], object]) -> int:
    """Run `work` and return its number of floating-point operations, as torch counts them."""
    # FlopCounterMode does not count the CPU's fused attention kernel, nor the operations of compiled code.
    with sdpa_kernel(SDPBackend.MATH), torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as mode:
        work()
    return mode.get_total_flops()


def reset_peak_memory(device: torch.device) -> None:
    """Restart the measurement of `peak_memory`, if the system supports it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):  # Linux only
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int:
    """Return the peak memory since `reset_peak_memory`, in bytes.

    On a GPU, it is the memory that torch allocated. Otherwise, it is the resident memory of the process.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
