"""Flow matching: noise levels, the noising of x0, and the x0 that a predicted flow implies.

x = (1 - sigma) x0 + sigma noise, and the network predicts flow = noise - x0 (Lipman et al., arXiv 2210.02747).
"""

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

Sigma = TypeVar("Sigma", float, Tensor)


def shift_sigma(u: Sigma, shift: float) -> Sigma:
    """Return the unshifted sigma u in [0, 1], shifted towards noise (Esser et al., arXiv 2403.03206, equation 23)."""
    return shift * u / (1 + (shift - 1) * u)


def step_sigmas(denoising_step_list: Sequence[float], warp: bool, shift: float) -> list[float]:
    """Return the sigmas of few-step sampling: one for the input of every step, then 0.

    Args:
        denoising_step_list: falling timesteps (1000 sigma) as in public YAML files; a trailing 0 is ignored.
        warp: true: the list holds 1000 u for unshifted sigmas u, which are then shifted. false: its timesteps are used
            unchanged.
        shift: see `shift_sigma`.
    """
    positions = [value / 1000 for value in denoising_step_list if value > 0]
    return [shift_sigma(u, shift) if warp else u for u in positions] + [0.0]


def solver_sigmas(num_steps: int, shift: float) -> list[float]:
    """Return the sigmas of many-step sampling: `num_steps` even values from 1 down, shifted, then 0."""
    return [shift_sigma(1 - i / num_steps, shift) for i in range(num_steps)] + [0.0]


def add_noise(x0: Tensor, noise: Tensor, sigma: float | Tensor) -> Tensor:
    """Return (1 - sigma) x0 + sigma noise; a tensor of sigmas must broadcast to x0."""
    return (1 - sigma) * x0 + sigma * noise


def flow_to_x0(x: Tensor, flow: Tensor, sigma: float | Tensor) -> Tensor:
    """Return x0 = x - sigma flow, in float32 or a wider dtype."""
    return x - sigma * flow.to(torch.promote_types(flow.dtype, torch.float32))


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Return unconditional + scale (conditional - unconditional): classifier-free guidance (arXiv 2207.12598)."""
    return unconditional + scale * (conditional - unconditional)
