"""One block in a forward pass that serves several blocks."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class BlockPass:
    """One block in a forward pass: its latents, its place, and the work on it.

    A pass may hold a block that is written and the next block, which is denoised against it, on the same cache.
    """

    x: Tensor
    """Latents [B, F, C, h, w] at level `sigma`."""
    sigma: float
    first_frame: int
    """Absolute index of the block's first frame."""
    cache: Any
    """Context of the block: a `KVCache` for the causal DiT."""
    denoise: bool
    """Predict x0."""
    write: bool
    """Append the block to the cache."""
    read_frames: int | None = None
    """Newest frames of the context that a written block attends to; None for all and the sink."""

    @property
    def num_frames(self) -> int:
        """Frames of the block."""
        return self.x.shape[1]
