"""Randomness as a pure function of names: order, batch size, rank count, device and resume never change it."""

import hashlib
import operator

import torch
from torch import Tensor


def keyed_generator(*key: int | str) -> torch.Generator:
    """A CPU generator whose stream depends on `key` alone."""
    plain = tuple(part if isinstance(part, str) else operator.index(part) for part in key)  # of NumPy's integers too
    digest = hashlib.blake2b(repr(plain).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def keyed_noise(seed: int, sample: int, block: int, step: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise, float32 on the CPU: the noise that block `block` of sample `sample` holds when it enters
    step `step` (step 0: the noise it starts from)."""
    return torch.randn(shape, generator=keyed_generator("noise", seed, sample, block, step))
