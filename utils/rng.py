"""Random numbers that depend only on a key, not on the order of draws, batch size, ranks, device or resuming.

All are drawn on the CPU (law 2, docs/method.md).
"""

import hashlib
import operator

import torch
from torch import Tensor


def keyed_generator(*key: int | str) -> torch.Generator:
    """Return a CPU generator that is seeded by a hash of `key`.

    Raises:
        TypeError: if a part of the key is neither an integer nor a string.
    """
    plain = tuple(part if isinstance(part, str) else operator.index(part) for part in key)  # accepts NumPy integers
    digest = hashlib.blake2b(repr(plain).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def keyed_noise(seed: int, sample: int, block: int, step: int, shape: tuple[int, ...]) -> Tensor:
    """Return the standard normal noise, float32 on the CPU, that is added to a block at the input of a step.

    The noise of step 0 is the block's initial latents. That of step S, the number of steps, is added to its context
    (`rollout.context_noise`).
    """
    return torch.randn(shape, generator=keyed_generator("noise", seed, sample, block, step))
