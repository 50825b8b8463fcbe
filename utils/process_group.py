"""The torch.distributed process group of a run."""

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from utils.distributed import check_launcher, world_size


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Initialize the default process group inside the `with` block: NCCL for GPUs, gloo for CPUs.

    Without torchrun, the group has one process and uses no port, so one process runs the same code as several. An
    existing group is kept.
    """
    if dist.is_initialized():
        yield
        return
    check_launcher()
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)  # otherwise barriers and FSDP use the first GPU in every process
        backend = "cpu:gloo,cuda:nccl"
    if "RANK" in os.environ:
        die_with_launcher()
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def die_with_launcher() -> None:
    """Make Linux kill this process when its launcher ends, even if the launcher is killed.

    torchrun starts each process in its own session. Without this call, processes of a killed launcher would continue
    beside a new run of the same command.
    """
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)


def sum_over_ranks(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor in place by its sum over all ranks, in one all-reduce; all ranks get the same bits."""
    if world_size() == 1:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(total.view_as(tensor))


def max_over_ranks(number: int, device: torch.device) -> int:
    """Return the maximum of `number` over all ranks."""
    if world_size() == 1:
        return number
    largest = torch.tensor(number, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)
