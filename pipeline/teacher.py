"""Sampling the bidirectional teacher: many steps over a whole clip, with classifier-free guidance."""

import itertools
from collections.abc import Callable, Sequence

import torch
from diffusers import UniPCMultistepScheduler
from torch import Tensor

from model.causal_wan import CausalWanModel
from model.flow import guide


@torch.no_grad()
def guided_flow(net: CausalWanModel, x: Tensor, sigma: float, text: Tensor, negative: Tensor, scale: float) -> Tensor:
    """The teacher's flow with guidance, float32 [B, F, C, h, w].

    Args:
        x: [B, F, C, h, w] at level sigma.
        text, negative: prompt and negative-prompt embeddings [B, L, text_dim].
        scale: 1 leaves guidance out, and its second forward.
    """
    timestep = torch.full((len(x),), 1000 * sigma, device=x.device)

    def flow(embeddings: Tensor) -> Tensor:
        return net(x.transpose(1, 2), timestep, embeddings).transpose(1, 2).float()

    conditional = flow(text)
    return conditional if scale == 1 else guide(conditional, flow(negative), scale)


def sample_euler(
    flow: Callable[[Tensor, float], Tensor],
    noise: Tensor,
    sigmas: Sequence[float],
    on_step: Callable[[int], None] | None = None,
) -> list[Tensor]:
    """Follow the probability-flow ODE by Euler steps through `sigmas`; returns x at each of them, first to last."""
    points = [noise]
    for index, (sigma, next_sigma) in enumerate(itertools.pairwise(sigmas)):
        x = points[-1]
        points.append(x + (next_sigma - sigma) * flow(x, sigma))
        if on_step is not None:
            on_step(index)
    return points


def sample_unipc(flow: Callable[[Tensor, float], Tensor], noise: Tensor, num_steps: int, shift: float) -> Tensor:
    """Sample with UniPC (arXiv 2302.04867), diffusers' implementation, as Wan's own pipeline does; returns x0."""
    solver = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    solver.set_timesteps(num_steps, device=noise.device)
    x = noise
    for index, timestep in enumerate(solver.timesteps):
        sigma = float(solver.sigmas[index])
        x = solver.step(flow(x, sigma), timestep, x, return_dict=False)[0]
    return x
