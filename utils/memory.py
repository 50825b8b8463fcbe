"""Failures for lack of memory: what was requested, and what is available. Imports no torch."""

import os
import re
import resource

_ALLOCATION_FAILED = re.compile(
    r"DefaultCPUAllocator: (?:can't allocate|not enough) memory"
    r"|out of memory|Unable to allocate|[Cc]annot allocate memory|std::bad_alloc|Storage size calculation overflowed"
)
_REQUESTED = re.compile(r"(?:tried to allocate|Tried to allocate|Unable to allocate) ([\d.]+) ?(\w+)")
_FREE_ON_GPU = re.compile(r"(GPU \d+) has a total capacity of ([\d.]+) GiB of which ([\d.]+) (\w+) is free")
_UNITS = {"bytes": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40, "PiB": 1 << 50}


def memory_shortage(error: BaseException) -> str | None:
    """Return what was requested and what is available after a failed allocation; None for any other error.

    torch raises its own class on a GPU and a RuntimeError on the CPU. NumPy and Python raise MemoryError.
    """
    text = str(error)
    is_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if not is_memory and not (isinstance(error, (RuntimeError, OSError)) and _ALLOCATION_FAILED.search(text)):
        return None
    found = _REQUESTED.search(text)
    requested = _gigabytes(found[1], found[2]) if found else "an unknown amount"
    if gpu := _FREE_ON_GPU.search(text):
        available = f"{_gigabytes(gpu[3], gpu[4])} of {float(gpu[2]):.1f} GiB on {gpu[1]}"
    elif "CUDA" in text:
        available = "too little on the GPU"
    else:
        available = f"{available_bytes() / _UNITS['GiB']:.1f} GiB of the machine's memory"
    return f"out of memory: requested {requested}, available {available}"


def available_bytes() -> int:
    """Return the bytes that this process can still allocate: the machine's free memory, or less if it is limited."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            free = next(int(line.split()[1]) << 10 for line in file if line.startswith("MemAvailable"))
        with open("/proc/self/statm", encoding="ascii") as file:
            used = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, StopIteration):  # not Linux
        return free
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return free if limit == resource.RLIM_INFINITY else max(0, min(free, limit - used))


def _gigabytes(number: str, unit: str) -> str:
    amount = float(number.rstrip(".")) * _UNITS.get(unit, 1) / _UNITS["GiB"]
    return f"{amount:.1f} GiB" if amount >= 0.1 else f"{amount * 1024:.1f} MiB"
