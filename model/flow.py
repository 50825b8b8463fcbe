"""Flow matching maths: noise levels, adding noise, and turning a predicted flow into x0.

x = (1 - sigma) x0 + sigma noise, and the network predicts flow = noise - x0 (Lipman et al., arXiv 2210.02747).
"""

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

Level = TypeVar("Level", float, Tensor)  # one level or many


def shift_sigma(u: Level, shift: float) -> Level:
    """Warp a position u in [0, 1] of the even grid towards noise (Esser et al., arXiv 2403.03206, equation 23)."""
    return shift * u / (1 + (shift - 1) * u)


def step_sigmas(denoising_step_list: Sequence[float], warp: bool, shift: float) -> list[float]:
    """The levels of few-step sampling: sigma of every step's input, then 0.

    Args:
        denoising_step_list: falling timesteps (1000 sigma) as public YAMLs state them; a trailing 0 is left out.
        warp: the list holds positions 1000 u of the even grid, to be warped; otherwise timesteps as they are.
        shift: of the warp.
    """
    positions = [value / 1000 for value in denoising_step_list if value > 0]
    return [shift_sigma(u, shift) if warp else u for u in positions] + [0.0]


def solver_sigmas(num_steps: int, shift: float) -> list[float]:
    """The levels of many-step sampling: `num_steps` even positions from 1 on, warped, then 0."""
    return [shift_sigma(1 - i / num_steps, shift) for i in range(num_steps)] + [0.0]


def add_noise(x0: Tensor, noise: Tensor, sigma: float | Tensor) -> Tensor:
    """x0 at noise level sigma; a tensor of levels must broadcast."""
    return (1 - sigma) * x0 + sigma * noise


def flow_to_x0(x: Tensor, flow: Tensor, sigma: float | Tensor) -> Tensor:
    """The x0 that a predicted flow means, in float32 at least: x0 = x - sigma flow."""
    return x - sigma * flow.to(torch.promote_types(flow.dtype, torch.float32))


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (arXiv 2207.12598): unconditional + scale (conditional - unconditional)."""
    return unconditional + scale * (conditional - unconditional)
