"""Base classes of objectives: the interface to the training loop, and a base for objectives with one network."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from trainer.networks import export_transformer
from trainer.sampling import VideoSampler
from trainer.sharding import sync_gradients
from utils.config import Config


class Objective(ABC):
    """Networks and the losses that train them. The loop (trainer/trainer.py) owns optimizers, EMA and checkpoints.

    To add an objective, subclass this or `SingleNetObjective` and register the class in trainer/objectives/__init__.py.
    """

    config: Config
    sampler: VideoSampler | None = None  # writes the sample videos; None for objectives without any

    @property
    @abstractmethod
    def nets(self) -> Mapping[str, nn.Module]:
        """The trained networks by name. The first has the EMA and is exported."""

    @property
    def frozen_nets(self) -> Mapping[str, nn.Module]:
        """The networks that only provide targets, by name."""
        return {}

    def data_summary(self) -> str:
        """Return the kind and the number of training items in one line."""
        return "rendered during training"

    def learning_rate(self, name: str) -> float:
        """Return AdamW's peak learning rate for a network."""
        return self.config.train.learning_rate

    @abstractmethod
    def networks_to_update(self, iteration: int) -> list[str]:
        """Return the names of the networks that an iteration updates, in order."""

    @abstractmethod
    def backward(self, name: str, iteration: int, micro_batch: int, scale: float, last: bool) -> dict[str, float]:
        """Add `scale` times the gradient of one micro-batch's loss to a network's gradients.

        All random numbers must be functions of (seed, iteration, clip of the batch). Then a resumed run continues
        exactly, and neither the number of ranks nor the micro-batch size changes the batch.

        Args:
            name: key of `nets`.
            micro_batch: index of the micro-batch in the whole batch.
            last: whether this is the rank's last micro-batch of the iteration. Before the last backward pass of that
                micro-batch, call `sync_gradients(net, True)`, so that a sharded network's gradients are reduced.

        Returns:
            The loss and other values to log.
        """

    def sample(self, folder: Path) -> None:
        """Write a few videos of the first network with its current weights; all ranks must call this."""
        if self.sampler is not None:
            self.sampler.write(folder)

    def export(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Write `weights` of the first network, a DiT by default, to `folder` in the diffusers layout."""
        net: Any = next(iter(self.nets.values()))
        export_transformer(net, folder, weights)


class SingleNetObjective(Objective):
    """An objective with one network and one loss: subclasses set `net` and define `loss`."""

    net: Any

    @property
    def nets(self) -> dict[str, nn.Module]:
        return {"net": self.net}

    def networks_to_update(self, iteration: int) -> list[str]:
        return ["net"]

    @abstractmethod
    def loss(self, iteration: int, micro_batch: int) -> tuple[Tensor, dict[str, float]]:
        """Return the loss of one micro-batch, and other values to log."""

    def backward(self, name: str, iteration: int, micro_batch: int, scale: float, last: bool) -> dict[str, float]:
        loss, metrics = self.loss(iteration, micro_batch)
        sync_gradients(self.net, last)
        (loss * scale).backward()
        return {"loss": loss.item()} | metrics
