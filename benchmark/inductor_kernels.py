"""Counts of the kernels that Inductor makes of compiled code for CUDA, without a GPU and without Triton.

Inductor lowers and fuses each graph as it does for an H100, and stops before it writes code. The graph then runs
uncompiled on fake tensors, and the kernels found are counted in place of its operations.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch._inductor.compile_fx as compile_fx
from torch import Tensor
from torch._dynamo import device_interface
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch._inductor import ir
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.scheduler import BaseSchedulerNode, FusedSchedulerNode, NopKernelSchedulerNode

from benchmark.kernels import Kernel, compiled_graph, is_matrix_operation

_H100 = SimpleNamespace(
    name="NVIDIA H100", major=9, minor=0, multi_processor_count=132, total_memory=80 << 30, warp_size=32,
    regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, max_threads_per_block=1024,
    shared_memory_per_block=49152, shared_memory_per_block_optin=232448, L2_cache_size=50 << 20, gcnArchName="",
)  # fmt: skip


class _H100Interface(device_interface.CudaInterface):
    """What Inductor reads of a CUDA device."""

    class Worker(device_interface.CudaInterface.Worker):
        current_device = staticmethod(lambda: 0)
        get_device_properties = staticmethod(lambda device=None: _H100)

    current_device = staticmethod(lambda: 0)
    device_count = staticmethod(lambda: 1)
    get_device_properties = staticmethod(lambda device=None: _H100)  # type: ignore[assignment]
    get_compute_capability = staticmethod(lambda device=None: 90)
    is_bf16_supported = staticmethod(lambda including_emulation=False: True)


class _Fused(Exception):
    """Carries the kernels of a graph out of Inductor."""

    def __init__(self, kernels: list[Kernel]):
        super().__init__("the graph's kernels are counted")
        self.kernels = kernels


@contextlib.contextmanager
def inductor_counts() -> Iterator[list[list[Kernel]]]:
    """Let `torch.compile` count kernels instead of writing code; yield the kernels of each graph compiled so far.

    Compiled code reports its kernels to the `KernelCounter` that is active when it runs.
    """
    graphs: list[list[Kernel]] = []
    count: Any = partial(_count, compile_fx.compile_fx_inner, graphs)
    replacements: dict[str, Any] = {
        "torch.cuda.get_device_properties": lambda device=None: _H100,
        "torch.cuda.get_device_capability": lambda device=None: (9, 0),
        "torch.cuda.current_device": lambda: 0,
        "torch._inductor.scheduler.has_triton": lambda: True,
        "torch._inductor.compile_fx.compile_fx": partial(compile_fx.compile_fx, inner_compile=count),
    }
    device_interface.get_registered_device_interfaces()  # registers the interfaces that the next lines replace
    with contextlib.ExitStack() as stack:
        for name, replacement in replacements.items():
            stack.enter_context(mock.patch(name, replacement))
        stack.enter_context(mock.patch.dict(device_interface.device_interfaces, {"cuda": _H100Interface}))
        stack.enter_context(mock.patch.object(GraphLowering, "_update_scheduler", _raise_kernels))
        stack.enter_context(inductor_config.patch(fx_graph_cache=False, compile_threads=1))
        stack.enter_context(functorch_config.patch(enable_autograd_cache=False))
        DeviceProperties.create.cache_clear()
        torch.compiler.reset()
        try:
            yield graphs
        finally:
            DeviceProperties.create.cache_clear()
            torch.compiler.reset()


def _count(
    compile_inner: Callable[..., Any],
    graphs: list[list[Kernel]],
    graph: torch.fx.GraphModule,
    inputs: Any,
    **options: Any,
) -> Callable[[list[Tensor]], Any]:
    """Return a function that runs the graph uncompiled; append its kernels to `graphs`."""
    try:
        compile_inner(graph, inputs, **options)
        kernels: list[Kernel] = []  # the graph has no operations
    except Exception as error:
        kernels = _found(error)
    graphs.append(kernels)

    def run(arguments: list[Tensor]) -> Any:
        with compiled_graph(kernels):
            return torch.fx.Interpreter(graph).run(*arguments)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def _found(error: BaseException) -> list[Kernel]:
    """Return the kernels that an error of Inductor carries; raise any other error again."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, _Fused):
            return cause.kernels
        cause = getattr(cause, "inner_exception", None) or cause.__cause__ or cause.__context__
    raise error


_update_scheduler = GraphLowering._update_scheduler


def _raise_kernels(lowering: GraphLowering) -> None:
    """Fuse the graph's nodes, and stop Inductor there."""
    _update_scheduler(lowering)
    nodes = [node for node in lowering.scheduler.nodes if _launches(node)]
    raise _Fused([Kernel(_traffic(node), not _is_matrix(node)) for node in nodes])


def _traffic(node: BaseSchedulerNode) -> int:
    """Return the bytes that a kernel reads and writes, as Inductor counts them.

    For a fused kernel that writes to a part of a buffer, Inductor counts the whole buffer. The nodes of the kernel
    count their parts.
    """
    accesses = node.get_read_write_buffer_accesses(include_reads=True, include_writes=True)
    if not isinstance(node, FusedSchedulerNode):
        return sum(accesses.values())
    parts: Counter[str] = Counter()
    for part in node.snodes:
        parts.update(part.get_read_write_buffer_accesses(include_reads=True, include_writes=True))
    return sum(min(num_bytes, parts[name]) for name, num_bytes in accesses.items())


def _launches(node: BaseSchedulerNode) -> bool:
    """Return whether a node is a kernel. Allocations, and parts of an extern kernel's result, are none."""
    return not (isinstance(node, NopKernelSchedulerNode) or isinstance(node.node, ir.MultiOutput))


def _is_matrix(node: BaseSchedulerNode) -> bool:
    operation = getattr(node.node, "op_overload", None)
    return operation is not None and is_matrix_operation(operation)
