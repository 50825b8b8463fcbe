"""The interface of clip sources: where score distillation gets the generator's clips from.

self_rollout.py generates them from noise (Self-Forcing, HiAR), data_latents.py from noised training data (CausVid).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor

ROLES = ("generator", "critic")
"""The networks that a clip can train; each has its own noise, steps and captions."""


@dataclass(frozen=True)
class ClipBatch:
    """The clips of one micro-batch that a source generates."""

    role: str  # the network to train, "generator" or "critic"
    iteration: int
    positions: range  # the clips' positions in the order of captions; they key the noise
    items: Tensor  # indices of their captions [B]
    embeddings: Tensor  # of their captions, [B, L, text_dim]


Generated = TypeVar("Generated")


class ClipSource(ABC, Generic[Generated]):
    """Generates clips with the generator, and propagates gradients at the clips back into it.

    A generated clip is a value of the source's own type. Its random numbers are functions of (seed, role, position) or
    (seed, role, iteration), so neither micro-batches nor ranks change them.
    """

    @abstractmethod
    def run(self, batch: ClipBatch, trained: bool = True) -> Generated:
        """Generate the clips of a micro-batch.

        Args:
            trained: whether `backward` follows.
        """

    @abstractmethod
    def training_window(self, clip: Generated) -> tuple[Tensor, Tensor | None]:
        """Return the frames that the losses read, [B, F, C, h, w] without a graph, and their mask [B, F] or None."""

    @abstractmethod
    def backward(self, clip: Generated, gradient: Tensor, embeddings: Tensor, last: bool) -> None:
        """Propagate the gradient at the training window, [B, F, C, h, w], back into the generator.

        Args:
            last: whether the generator's gradients are complete afterwards, see `Objective.backward`.
        """

    @abstractmethod
    def noise(self, clip: Generated) -> Tensor:
        """Return noise [B, F, C, h, w] of the training window at noise level 1."""

    @abstractmethod
    def metrics(self, clip: Generated) -> dict[str, float]:
        """Return values to log."""
