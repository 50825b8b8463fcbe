"""Optimizers and the learning-rate schedule."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from utils.config import TrainConfig


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


def learning_rate_scale(iteration: int, config: TrainConfig) -> float:
    """Factor on the peak learning rate: linear warm-up, then constant or a cosine down to a twentieth."""
    if iteration < config.warmup:
        return (iteration + 1) / config.warmup
    if config.decay == "constant":
        return 1.0
    progress = (iteration - config.warmup) / max(1, config.max_iterations - config.warmup)
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def build_optimizers(net: nn.Module, config: TrainConfig, learning_rate: float) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the matrices and convolutions inside and AdamW for the rest.

    Muon is not meant for embeddings, inputs and outputs, nor for vectors. Each group keeps its rate as `peak`. All
    state exists from the start, so that a checkpoint can be loaded into it.
    """
    named = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
    inside = [p for name, p in named if config.optimizer == "muon" and is_inner_matrix(name, p)]
    chosen = {id(p) for p in inside}
    others = [p for _, p in named if id(p) not in chosen]
    beta1, beta2 = config.betas
    group: dict[str, Any] = {"params": others, "peak": learning_rate}
    adamw = torch.optim.AdamW([group], lr=learning_rate, betas=(beta1, beta2), weight_decay=config.weight_decay)
    for p in others:
        adamw.state[p] = {"step": torch.zeros(()), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    optimizers: list[torch.optim.Optimizer] = [adamw]
    if inside:
        rate = config.muon_learning_rate
        group = {"params": inside, "peak": rate}
        muon = Muon([group], lr=rate, weight_decay=config.weight_decay)
        for p in inside:
            muon.state[p] = {"momentum": torch.zeros_like(p)}
        optimizers.append(muon)
    return optimizers


def is_inner_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter is a weight matrix or convolution kernel between two hidden layers."""
    outer = ("conv_in.", "conv_out.", "patch_embedding.", "proj_out.", "condition_embedder.", "heads.", "shared.")
    is_kernel = name.endswith(".weight") and parameter.ndim >= 2
    return is_kernel and not any(word in f"{name}." for word in outer)
