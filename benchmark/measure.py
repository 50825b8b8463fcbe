"""How benchmarks measure: time, memory, waits for the device, and what the machine could do at best."""

import contextlib
import gc
import resource
import statistics
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from pipeline.parallel.profile import Recorder


@dataclass(frozen=True)
class Spread:
    """What several measurements of one thing gave."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        """Median, smallest and largest."""
        values = sorted(values)
        return cls(statistics.median(values), values[0], values[-1])


Figure = Spread | float | None
"""None: could not be measured here."""
Figures = dict[str, Figure]


@dataclass(frozen=True)
class Effort:
    """How often something is done: first without being timed, then timed."""

    warmup: int = 1
    repeats: int = 3


def durations(work: Callable[[], object], device: torch.device, effort: Effort) -> list[float]:
    """Seconds that `work()` takes on the device, each time."""
    record = Recorder(device)
    for _ in range(effort.warmup + effort.repeats):
        with record("work"):
            work()
    return [span.end - span.start for span in record.spans()[effort.warmup :]]


@torch.no_grad()
def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product, the median of several: what the hardware gives at best."""
    size = 256
    while True:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        seconds = statistics.median(durations(partial(torch.matmul, a, b), device, Effort(1, 5)))
        if seconds > 0.1 or size == 16384:
            return 2 * size**3 / seconds
        size *= 2


def counted_flops(work: Callable[[], object]) -> int:
    """Floating-point operations of `work()` as torch counts them."""
    # The counter does not know the attention kernel of CPUs; of plain matrix products it sees all. Compiled code would
    # not show its operations.
    with sdpa_kernel(SDPBackend.MATH), torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as mode:
        work()
    return mode.get_total_flops()


# ---- Memory ----


def reset_peak_memory(device: torch.device) -> None:
    """Have `peak_memory` count from now on, where that can be done."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):  # Linux only
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int:
    """Most bytes held since the reset: by torch's allocator on a GPU, resident in the process otherwise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ---- Waits ----


@contextlib.contextmanager
def host_syncs(device: torch.device) -> Iterator[list[str]]:
    """A list that afterwards names the calls within that made, or on a GPU would make, the host wait for the device.

    On CUDA the driver's side says so itself. Elsewhere it is what operations are: reading a value, a shape that depends
    on values, a blocking copy between devices, a tensor's way to Python or NumPy.
    """
    found: list[str] = []
    if device.type != "cuda":
        with _SyncFinder(found), _ReadFinder(found):
            yield found
        return
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode(before)
    # Its first warning in a process only says of itself that it may not see all synchronizing operations.
    found += [str(warning.message) for warning in caught if "called a synchronizing" in str(warning.message)]


class _SyncFinder(TorchDispatchMode):
    def __init__(self, found: list[str]):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if waits(func, args, kwargs or {}, result):
            self.found.append(str(func))
        return result


class _ReadFinder(TorchFunctionMode):
    """Sees what is no operation where tensors are on the host already."""

    def __init__(self, found: list[str]):
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.cpu, Tensor.numpy, Tensor.tolist):
            self.found.append(func.__name__)
        return func(*args, **(kwargs or {}))


def waits(func: Any, args: tuple, kwargs: dict, result: Any) -> bool:
    """Whether a GPU's host would wait for this call of an aten operation."""
    aten = torch.ops.aten
    if func in (aten._to_copy.default, aten.copy_.default):
        source, target = (args[1], args[0]) if func is aten.copy_.default else (args[0], result)
        crosses = (source.device.type == "cpu") != (target.device.type == "cpu")
        return crosses and not (kwargs.get("non_blocking") or args[2:3] == (True,))
    if func is aten.index.Tensor:  # by numbers, no; by a mask, yes
        return any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags
