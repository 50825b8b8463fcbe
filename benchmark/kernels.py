"""Counts of kernels, operations and bytes of code that runs on fake CUDA tensors.

A kernel is an aten operation that launches work on the device: views and allocations are none. `elementwise` kernels
are all kernels except for matrix products, convolutions and attention. Bytes are those that each kernel reads and
writes, as if no cache held them between two kernels.
"""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from benchmark.host_syncs import is_sync

_aten = torch.ops.aten
_NO_LAUNCH = {
    _aten.empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty, _aten.new_empty_strided,
    _aten._unsafe_view, _aten.lift_fresh, _aten._local_scalar_dense,
}  # fmt: skip
_COPIES = {_aten._to_copy, _aten.copy_}
_OVERWRITES = {_aten.copy_, _aten.fill_, _aten.zero_, _aten.normal_, _aten.uniform_, _aten.random_}
_GATHERS = {_aten.index, _aten.index_select, _aten.gather, _aten.embedding}
_SCATTERS = {_aten.index_copy_, _aten.index_put_, _aten.scatter_, _aten._unsafe_index_put}

_active: list["KernelCounter"] = []


@dataclass
class KernelCount:
    """Work of a piece of code on the device, and the calls in it that a GPU would not run well or at all."""

    kernels: int = 0
    elementwise_kernels: int = 0
    flops: int = 0
    bytes: int = 0
    elementwise_bytes: int = 0
    host_syncs: int = 0
    device_mismatches: int = 0

    def add_kernel(self, num_bytes: int, elementwise: bool) -> None:
        """Count one kernel."""
        self.kernels += 1
        self.bytes += num_bytes
        if elementwise:
            self.elementwise_kernels += 1
            self.elementwise_bytes += num_bytes


class Kernel(NamedTuple):
    """A kernel of a compiled graph."""

    num_bytes: int
    elementwise: bool


class KernelCounter(TorchDispatchMode):
    """Counts the kernels of all code that runs in this context, on fake CUDA tensors or on the meta device."""

    def __init__(self, device_type: str = "cuda"):
        """
        Args:
            device_type: only the kernels of devices of this type count.
        """
        super().__init__()
        self.device_type, self.count = device_type, KernelCount()
        self.problems: list[str] = []  # names of the operations that sync or mix devices
        self._compiled = False  # a compiled graph runs: its operations are not its kernels

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Return true: torch.compile then runs compiled code in this context."""
        return True

    def __enter__(self) -> "KernelCounter":
        _active.append(self)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        _active.remove(self)
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _aten._local_scalar_dense.default and args[0].device.type == self.device_type:
            self._sync(func)
            return 0.0 if args[0].is_floating_point() else 0  # any value
        args, kwargs = self._on_one_device(func, args, kwargs)
        result = func(*args, **kwargs)
        if func is _aten.convolution.default and args[0].is_contiguous(memory_format=torch.channels_last_3d):
            # cuDNN keeps this layout. A build without cuDNN would count copies into it.
            result = torch.empty_like(result, memory_format=torch.channels_last_3d)
        self._record(func, args, kwargs, result)
        return result

    def _on_one_device(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Return the arguments on the counted device; count a mismatch if they are on several."""
        devices = {
            x.device.type for x in _tensors((args, kwargs)) if x.ndim
        }  # a CPU tensor of 0 dimensions is a number
        if func.overloadpacket in _COPIES or len(devices) < 2 or self.device_type not in devices:
            return args, kwargs
        self.count.device_mismatches += 1
        self.problems.append(str(func))
        move = partial(torch.Tensor.to, device=f"{self.device_type}:0")
        return tree_map_only(Tensor, move, (args, kwargs))

    def _sync(self, func: Any) -> None:
        self.count.host_syncs += 1
        self.problems.append(str(func))

    def _record(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        inputs, outputs = _tensors((args, kwargs)), _tensors(result)
        devices = {x.device.type for x in inputs + outputs}
        if self.device_type not in devices:
            return
        if is_sync(func, args, kwargs, result):
            self._sync(func)
        crosses = func.overloadpacket in _COPIES and len(devices) > 1
        if crosses or func.is_view or func.overloadpacket in _NO_LAUNCH or not outputs:
            return
        flops = flop_registry.get(func.overloadpacket)
        if flops is not None:
            self.count.flops += flops(*args, **kwargs, out_val=result)
        if not self._compiled:
            self.count.add_kernel(_traffic(func, args, inputs, outputs), elementwise=flops is None)


@contextlib.contextmanager
def compiled_graph(kernels: Iterable[Kernel]) -> Iterator[None]:
    """Let all active counters count these kernels instead of the operations that the body runs."""
    counters = list(_active)
    for counter in counters:
        counter._compiled = True
        for kernel in kernels:
            counter.count.add_kernel(*kernel)
    yield
    for counter in counters:
        counter._compiled = False


def is_matrix_operation(func: Any) -> bool:
    """Return whether an aten operation is a matrix product, a convolution or attention."""
    return func.overloadpacket in flop_registry


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _traffic(func: Any, args: Any, inputs: list[Tensor], outputs: list[Tensor]) -> int:
    """Return the bytes that a kernel reads and writes."""
    packet = func.overloadpacket
    written = sum(map(_num_bytes, outputs))
    if packet in _GATHERS:
        return 2 * written
    if packet in _SCATTERS:
        return 2 * _num_bytes(next(x for x in reversed(inputs)))
    # An argument `out` follows all others; it is written, not read.
    read = inputs[1:] if packet in _OVERWRITES else inputs[:-1] if func._overloadname == "out" else inputs
    return written + sum(map(_num_bytes, read))


def _num_bytes(x: Tensor) -> int:
    """Return the bytes of the elements of x in memory; expanded dimensions count once."""
    count = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        count *= size if stride else 1
    return count * x.element_size()
