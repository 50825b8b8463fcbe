"""As much of torch as scripts/vbench_worker.py touches, so that starting it takes no seconds."""

from types import SimpleNamespace

cuda = SimpleNamespace(is_available=lambda: False)


def device(name: str) -> str:
    """A device is its name."""
    return name
