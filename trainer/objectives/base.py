"""Base class of objectives that train a single network."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor, nn

from trainer.sharding import sync_gradients
from utils.config import Config


class Objective(Protocol):
    """Networks, and the losses they are trained with."""

    @property
    def nets(self) -> Mapping[str, nn.Module]:
        """What optimizers update, by name. The first is what the run is for: it has the EMA and is exported."""
        ...

    def learning_rate(self, name: str) -> float:
        """AdamW's peak rate for a net."""
        ...

    def networks_to_update(self, iteration: int) -> list[str]:
        """The nets that are updated in an iteration, in their order."""
        ...

    def backward(self, name: str, iteration: int, micro_batch: int, scale: float, last: bool) -> dict[str, float]:
        """Add `scale` times the gradient of a part's loss to a net's gradients; returns the loss and what to log.

        The last pass of the `last` part of this process is the one in which a sharded net's gradients are reduced
        (`sync_gradients`).

        All randomness is a pure function of (seed, iteration, clip of the batch), so that a resumed run goes on
        exactly, and neither the number of processes nor that of parts changes what is trained on.
        """
        ...

    def sample(self, folder: Path) -> None:
        """Write a few videos that the first net makes as it is now, if it makes videos; all processes take part."""
        ...

    def export(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Write finished `weights` of the first net in the diffusers layout."""
        ...


class SingleNet:
    """An objective of one network with one loss."""

    net: Any
    config: Config

    @property
    def nets(self) -> dict[str, nn.Module]:
        """The one network."""
        return {"net": self.net}

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
