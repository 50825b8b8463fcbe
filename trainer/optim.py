"""Optimizers, their state, and the learning-rate schedule."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from utils.config import TrainConfig

FINAL_RATE = 0.05
"""Factor on the peak learning rate at the end of a cosine decay."""


class Muon(torch.optim.Optimizer):
    """Momentum SGD with orthogonalised updates (Jordan et al. 2024, "Muon").

    Each update is replaced by its nearest semi-orthogonal matrix. A convolution weight [out, in, ...] is treated as a
    matrix [out, in * ...]; torch.optim.Muon supports matrices only. The step size is scaled so that one learning rate
    suits every shape.
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
                # Every rank orthogonalises the full matrix and keeps its shard.
                full = nesterov.full_tensor() if isinstance(nesterov, DTensor) else nesterov
                update = orthogonalise(full.flatten(1)).view(p.shape)
                if isinstance(p, DTensor):
                    update = distribute_tensor(update, p.device_mesh, p.placements, src_data_rank=None)
                rows, columns = p.shape[0], math.prod(p.shape[1:])
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)


def orthogonalise(matrix: Tensor, iterations: int = 5) -> Tensor:
    """Return a matrix with the same singular vectors and all singular values near one, float32.

    Args:
        iterations: Newton-Schulz iterations, with Muon's quintic coefficients.
    """
    x = matrix.float()
    x = x / (x.norm() + 1e-7)
    is_tall = x.shape[0] > x.shape[1]
    if is_tall:
        x = x.T
    for _ in range(iterations):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if is_tall else x


def build_optimizers(net: nn.Module, config: TrainConfig, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Return AdamW for all parameters, or AdamW and Muon.

    Muon updates the inner matrices and convolutions; embeddings, input and output layers and vectors stay with AdamW.
    Each parameter group stores its peak rate as `peak`. The state is allocated at once, so that a checkpoint can be
    loaded into it.

    Args:
        learning_rate: AdamW's peak rate. Muon's is `train.muon_learning_rate`.
    """
    named = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
    inner = [p for name, p in named if config.optimizer == "muon" and is_inner_matrix(name, p)]
    inner_ids = {id(p) for p in inner}
    others = [p for _, p in named if id(p) not in inner_ids]
    beta1, beta2 = config.betas
    group: dict[str, Any] = {"params": others, "peak": learning_rate}
    adamw = torch.optim.AdamW([group], lr=learning_rate, betas=(beta1, beta2), weight_decay=config.weight_decay)
    for p in others:
        adamw.state[p] = {"step": torch.zeros(()), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    optimizers: list[torch.optim.Optimizer] = [adamw]
    if inner:
        rate = config.muon_learning_rate
        group = {"params": inner, "peak": rate}
        muon = Muon([group], lr=rate, weight_decay=config.weight_decay)
        for p in inner:
            muon.state[p] = {"momentum": torch.zeros_like(p)}
        optimizers.append(muon)
    return optimizers


def is_inner_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Return whether a parameter is a weight matrix or convolution kernel between two hidden layers."""
    outer = ("conv_in.", "conv_out.", "patch_embedding.", "proj_out.", "condition_embedder.", "heads.", "shared.")
    is_kernel = name.endswith(".weight") and parameter.ndim >= 2
    return is_kernel and not any(word in f"{name}." for word in outer)


def optimizer_state(optimizer: torch.optim.Optimizer, net: nn.Module) -> dict[str, Tensor]:
    """Return the state tensors of an optimizer as `PARAMETER/KEY`. They are not copied."""
    names: dict[Any, str] = {parameter: name for name, parameter in net.named_parameters()}
    return {
        f"{names[parameter]}/{key}": value
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
    }


def set_learning_rate(optimizer: torch.optim.Optimizer, scale: float) -> None:
    """Set every parameter group's rate to `scale` times its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * scale


def learning_rate_scale(iteration: int, config: TrainConfig) -> float:
    """Return the factor on the peak learning rate: a linear warm-up, then constant or a cosine to `FINAL_RATE`."""
    if iteration < config.warmup:
        return (iteration + 1) / config.warmup
    if config.decay == "constant":
        return 1.0
    progress = (iteration - config.warmup) / max(1, config.max_iterations - config.warmup)
    return FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
