"""A toy objective for tests of the training loop, and helpers to interrupt and compare runs."""

from pathlib import Path

import torch
from torch import Tensor, nn

from trainer.objectives.base import SingleNetObjective
from trainer.trainer import Trainer
from utils.config import Config
from utils.rng import keyed_generator


class Toy(SingleNetObjective):
    """Fit a linear map with a small network of matrices, vectors and an integer buffer."""

    def __init__(self, width: int = 6):
        self.config = Config()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(width, 8), nn.Tanh(), nn.Linear(8, 1), CallCounter())
        self.iterations: list[int] = []
        self.exported: tuple[Path, dict[str, Tensor]] | None = None

    def loss(self, iteration: int, micro_batch: int) -> tuple[Tensor, dict[str, float]]:
        self.iterations.append(iteration)
        x = torch.randn(16, self.net[0].in_features, generator=keyed_generator("toy", iteration, micro_batch))
        loss = (self.net(x) - x.sum(1, keepdim=True)).square().mean()
        return loss, {"twice": 2.0 * iteration}

    def export(self, folder: Path, weights: dict[str, Tensor]) -> None:
        self.exported = folder, {name: weight.clone() for name, weight in weights.items()}


class CallCounter(nn.Module):
    """Count forward passes in an integer buffer, such as batch norm has."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x


class Killed(Exception):
    """Ends a run without saving, as a kill would."""


def change_loss(objective, iteration: int, factor: float = 1.0, error: BaseException | None = None) -> None:
    """Scale the objective's loss in one iteration, or raise `error` there."""
    loss = objective.loss

    def changed_loss(number: int, micro_batch: int):
        if number != iteration:
            return loss(number, micro_batch)
        if error is not None:
            raise error
        value, metrics = loss(number, micro_batch)
        return value * factor, metrics

    objective.loss = changed_loss


def state_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Return copies of all tensors of a run: weights, EMA, optimizer state."""
    return {name: tensor.clone() for name, tensor in trainer.state().items()}


def assert_same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def gradients(net: nn.Module) -> dict[str, Tensor]:
    """Return and clear the gradients of a network."""
    result = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    return result
