"""Which device to run on, and in which type."""

import torch

from utils.distributed import local_rank
from utils.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name: str) -> torch.device:
    """The device `name`; `auto` takes CUDA, then Apple's GPU, then the CPU. Under torchrun, `cuda` is this rank's GPU.

    Raises:
        UserError: for a name torch does not know, or a device that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{local_rank()}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"no device {name!r} here ({str(error).splitlines()[0]}); try --device cpu") from None
    return device
