"""Base class of objectives that train a single network."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor, nn

from trainer.sharding import sync_gradients
from utils.config import Config


class Objective(Protocol):
    """The networks of a training run and the losses that train them."""

    @property
    def nets(self) -> Mapping[str, nn.Module]:
        """The trained networks by name. The first one has the EMA and is exported."""
        ...

    @property
    def frozen_nets(self) -> Mapping[str, nn.Module]:
        """The networks that only provide targets, by name."""
        ...

    def data_summary(self) -> str:
        """Return the kind and the number of training items in one line."""
        ...

    def learning_rate(self, name: str) -> float:
        """Return AdamW's peak learning rate for a network."""
        ...

    def networks_to_update(self, iteration: int) -> list[str]:
        """Return the names of the networks that an iteration updates, in order."""
        ...

    def backward(self, name: str, iteration: int, micro_batch: int, scale: float, last: bool) -> dict[str, float]:
        """Add `scale` times the gradient of a micro-batch's loss to a network's gradients, and return the metrics.

        All randomness depends only on (seed, iteration, clip of the batch). So a resumed run continues exactly, and
        neither the world size nor the micro-batch size changes the training data.

        Args:
            last: whether this is the rank's last micro-batch of the iteration. A sharded network reduces its gradients
                in the last backward pass of that micro-batch (`sync_gradients`).
        """
        ...

    def sample(self, folder: Path) -> None:
        """Write a few videos with the first network's current weights. All ranks take part."""
        ...

    def export(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Write `weights` of the first network to `folder` in the diffusers layout."""
        ...


class SingleNet:
    """An objective of one network with one loss."""

    net: Any
    config: Config

    @property
    def nets(self) -> dict[str, nn.Module]:
        """The one network."""
        return {"net": self.net}

    @property
    def frozen_nets(self) -> dict[str, nn.Module]:
        """None."""
        return {}

    def data_summary(self) -> str:
        """Return where the data comes from."""
        return "rendered during training"

    def learning_rate(self, name: str) -> float:
        """The configuration's."""
        return self.config.train.learning_rate

    def networks_to_update(self, iteration: int) -> list[str]:
        """Always the one."""
        return ["net"]

    def loss(self, iteration: int, micro_batch: int) -> tuple[Tensor, dict[str, float]]:
        """The loss of a part of the batch, and what to log beside it."""
        raise NotImplementedError

    def sample(self, folder: Path) -> None:
        """It makes no videos by itself."""

    def backward(self, name: str, iteration: int, micro_batch: int, scale: float, last: bool) -> dict[str, float]:
        """Backward through `loss`."""
        loss, metrics = self.loss(iteration, micro_batch)
        sync_gradients(self.net, last)
        (loss * scale).backward()
        return {"loss": loss.item()} | metrics


def draw_length(config: Config, iteration: int) -> tuple[int, int]:
    """How many clips of how many pixel frames a part of iteration `iteration`'s batch holds: about as many pixels
    whatever the length, which is the same for all parts, so that no process waits for another."""
    train = config.train
    rng = np.random.default_rng([config.runtime.seed, iteration])
    num_frames = int(rng.choice(train.clip_frames))
    return max(1, train.batch_size * min(train.clip_frames) // num_frames), num_frames
