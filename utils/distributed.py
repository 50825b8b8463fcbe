"""Rank and world size, from torchrun's environment variables. A process without torchrun is rank 0 of 1.

This module does not import torch, so that commands can use it before slow imports.
"""

import os

from utils.errors import UserError


def rank() -> int:
    """Return the number of this process, from 0.

    Raises:
        UserError: as `world_size`, and if the number is not below the world size.
    """
    number, ranks = _count("RANK", 0, 0), world_size()
    if number >= ranks:
        raise UserError(f"RANK={number} must be below WORLD_SIZE={ranks}; {_START_WITH_TORCHRUN}")
    return number


def world_size() -> int:
    """Return the number of processes.

    Raises:
        UserError: if an environment variable of torchrun holds no such number.
    """
    return _count("WORLD_SIZE", 1, 1)


def local_rank() -> int:
    """Return the number of this process on its machine, which is also the number of its GPU."""
    return _count("LOCAL_RANK", 0, 0)


def local_world_size() -> int:
    """Return the number of processes on this machine."""
    return _count("LOCAL_WORLD_SIZE", 1, 1)


def check_launcher() -> None:
    """Check that the environment variables with which ranks find each other are complete.

    Raises:
        UserError: naming those that are missing or no port.
    """
    if world_size() == 1 and "RANK" not in os.environ:
        return
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise UserError(f"the environment has no {' and no '.join(missing)}; {_START_WITH_TORCHRUN}")
    port = os.environ["MASTER_PORT"]
    if not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise UserError(f"MASTER_PORT={port} is no port; {_START_WITH_TORCHRUN}")


def _count(name: str, default: int, lowest: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isascii() or not text.isdigit() or int(text) < lowest:
        raise UserError(f"{name}={text} must be a whole number of at least {lowest}; {_START_WITH_TORCHRUN}")
    return int(text)


_START_WITH_TORCHRUN = "start several processes with torchrun --nproc_per_node=N, or unset these variables"
