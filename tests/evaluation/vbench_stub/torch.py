"""The part of torch that scripts/vbench_worker.py uses, without torch's import time."""

from types import SimpleNamespace

cuda = SimpleNamespace(is_available=lambda: False)


def device(name: str) -> str:
    """Return the device's name."""
    return name
