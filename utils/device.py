"""Which device to run on, and in which type."""

import torch

from utils.distributed import local_rank, local_world_size
from utils.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name: str) -> torch.device:
    """The device `name`; `auto` takes CUDA, then Apple's GPU, then the CPU. Under torchrun, `cuda` is this rank's GPU.

    A GPU becomes the current one, which everything that is told of no device works on.

    Raises:
        UserError: for a name torch does not know, or a device that is not there.
    """
    name = _best() if name == "auto" else name
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


def pick_own_device(name: str) -> torch.device:
    """As `pick_device`, for processes that need a GPU each, as NCCL has it. All of a machine's come to the same answer.

    Raises:
        UserError: also if there are more of torchrun's processes on this machine than GPUs.
    """
    name = _best() if name == "auto" else name
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
    return pick_device(name)


def _best() -> str:
    """What `auto` stands for."""
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
