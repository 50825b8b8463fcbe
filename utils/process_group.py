"""The processes of one run as a torch.distributed group."""

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from utils.distributed import world_size


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the other processes that torchrun started, over NCCL for GPUs and gloo for CPUs.

    Without torchrun it is a group of one, without a port, so that one process takes the same path as many. A group that
    is there already is used.
    """
    if dist.is_initialized():
        yield
        return
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)  # or barriers and FSDP would take the first GPU for every process
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
    """Have Linux end this process when the launcher that started it is gone, even by SIGKILL.

    torchrun gives each process a session of its own, so that nothing else would: it would train on, beside whoever
    runs the same command again.
    """
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)


def sum_over_processes(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor, in place, by its sum over all processes, which get equal bits; one message for them all."""
    if world_size() == 1:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(total.view_as(tensor))


def largest_of_processes(number: int, device: torch.device) -> int:
    """The largest of the numbers that all processes come with."""
    if world_size() == 1:
        return number
    largest = torch.tensor(number, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)
