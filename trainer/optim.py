"""Muon for matrices and convolutions. torch.optim.Muon takes matrices only; the VAE is made of convolutions."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


class Muon(torch.optim.Optimizer):
    """Momentum whose every update is replaced by the nearest orthogonal matrix (Jordan et al. 2024, "Muon").

    A convolution's weight [out, in, ...] counts as a matrix [out, in ...]. Steps are scaled so that a learning rate
    means the same for every shape.
    """

    def __init__(self, params: Iterable[Any], lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                buffer = state["momentum"].mul_(group["momentum"]).add_(p.grad)
                nesterov = p.grad.add(buffer, alpha=group["momentum"])
                # Of a sharded matrix every process makes the whole update, and keeps its part.
                whole = nesterov.full_tensor() if isinstance(nesterov, DTensor) else nesterov
                update = orthogonalise(whole.flatten(1)).view(p.shape)
                if isinstance(p, DTensor):
                    update = distribute_tensor(update, p.device_mesh, p.placements, src_data_rank=None)
                rows, columns = p.shape[0], math.prod(p.shape[1:])
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)


def orthogonalise(matrix: Tensor, iterations: int = 5) -> Tensor:
    """Bring the singular values of a matrix near one: Newton-Schulz with Muon's quintic coefficients, in float32."""
    x = matrix.float()
    x = x / (x.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    if tall:
        x = x.T
    for _ in range(iterations):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if tall else x
