"""Inputs of the tiny causal network that the tests of model/ share."""

import torch
from torch import Tensor

TEXT_DIM, CHANNELS = 24, 4
CLOSE = dict(atol=2e-5, rtol=1e-4)  # float32, sums in another order


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def clip(frames: int = 4, height: int = 4, width: int = 6, batch: int = 1, seed: int = 0) -> Tensor:
    return randn(batch, CHANNELS, frames, height, width, seed=seed)


def per_frame(timestep: float, frames: int = 2) -> Tensor:
    return torch.full((1, frames), timestep)


PROMPT = randn(1, 5, TEXT_DIM, seed=9)
CLIP_TIMESTEP = torch.tensor([500.0])


def filled_cache(net, text, frames: int = 4, context: int = 4, first_frame: int = 0):
    cache = net.new_cache(1, 4, 6, context, 2)
    for start in range(0, frames, 2):
        with torch.no_grad():
            net.write_block(clip(2, seed=3 + start), per_frame(300.0), text, cache, first_frame + start)
    return cache
