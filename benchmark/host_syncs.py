"""Detection of host syncs: calls that make the host wait for the device."""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


@contextlib.contextmanager
def host_syncs(device: torch.device) -> Iterator[list[str]]:
    """Yield a list that is complete after the body has run: one entry per host sync in the body.

    On CUDA, torch reports the syncs. On other devices, the list holds the calls that would sync on a GPU: reading a
    value, a shape that depends on values, a blocking copy between devices, and conversion to Python or NumPy.
    """
    found: list[str] = []
    if device.type != "cuda":
        with _SyncDispatchMode(found), _ReadFunctionMode(found):
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
    # The first use in a process also warns that the detection is a prototype; this warning does not report a sync.
    found += [str(warning.message) for warning in caught if "called a synchronizing" in str(warning.message)]


class _SyncDispatchMode(TorchDispatchMode):
    """Records operations that sync."""

    def __init__(self, found: list[str]):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if is_sync(func, args, kwargs or {}, result):
            self.found.append(str(func))
        return result


class _ReadFunctionMode(TorchFunctionMode):
    """Records reads of CPU tensors, because these run no operation that `_SyncDispatchMode` could record."""

    def __init__(self, found: list[str]):
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.cpu, Tensor.numpy, Tensor.tolist):
            self.found.append(func.__name__)
        return func(*args, **(kwargs or {}))


def is_sync(func: Any, args: tuple, kwargs: dict, result: Any) -> bool:
    """Return whether this call of an aten operation would make the host wait for a GPU."""
    aten = torch.ops.aten
    if func in (aten._to_copy.default, aten.copy_.default):
        source, target = (args[1], args[0]) if func is aten.copy_.default else (args[0], result)
        crosses = (source.device.type == "cpu") != (target.device.type == "cpu")
        return crosses and not (kwargs.get("non_blocking") or args[2:3] == (True,))
    if func is aten.index.Tensor:  # an index of numbers does not sync; a mask does
        return any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags
