"""Selection of the device, and the names of dtypes."""

import torch

from utils.distributed import local_rank, local_world_size
from utils.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CACHE_DTYPES = {"float8_e4m3fn": torch.float8_e4m3fn, "int8": torch.int8}


def pick_device(name: str, threads: int = 0) -> torch.device:
    """Return the device `name`; if it is a CUDA GPU, make it the current device.

    Args:
        name: a torch device, or `auto`: CUDA, else Apple's GPU, else the CPU. Under torchrun, `cuda` is the GPU of
            this rank.
        threads: CPU threads of torch from now on; 0 changes nothing. The number changes results by rounding.

    Raises:
        UserError: for an unknown or missing device.
    """
    if threads:
        torch.set_num_threads(threads)
    name = _best_device() if name == "auto" else name
    if name == "cuda":
        name = f"cuda:{local_rank()}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"no device {name!r} here ({str(error).splitlines()[0]}); try --device cpu") from None
    return device


def pick_own_device(name: str, threads: int = 0) -> torch.device:
    """Return a device as `pick_device` does, but never share a GPU between processes, because NCCL does not allow it.

    Raises:
        UserError: for an unknown device, or if this machine has fewer GPUs than processes. All processes raise it.
    """
    name = _best_device() if name == "auto" else name
    processes, gpus = local_world_size(), torch.cuda.device_count() if name == "cuda" else 0
    if 0 < gpus < processes:
        raise UserError(
            f"{processes} processes on this machine need a GPU each, but there are {gpus}: "
            f"start {gpus}, or use --device cpu"
        )
    if name.startswith("cuda:") and processes > 1:
        raise UserError(
            f"--device {name} is one GPU, and {processes} processes on this machine need one each: use --device cuda"
        )
    return pick_device(name, threads)


def _best_device() -> str:
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
