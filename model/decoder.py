"""The interface of decoders, from latents to pixels, and the streaming decoder of one video."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

LATENTS_PER_CALL = 20_000
"""Positions (B F h w) that a decoder runs at once; a block of three frames has 18 720 at 480x832 pixels."""


class Decoder(ABC):
    """Decodes normalised latents [B, F, C, h, w] to pixels [B, T, 3, H, W] in [-1, 1], piece by piece.

    Attributes:
        max_frames: most latent frames of a piece; 0: as many as `LATENTS_PER_CALL` allows.
    """

    max_frames = 0

    @property
    @abstractmethod
    def channels(self) -> int:
        """Latent channels C."""

    @property
    @abstractmethod
    def spatial_stride(self) -> int:
        """Pixels per latent in height and width."""

    @property
    @abstractmethod
    def temporal_stride(self) -> int:
        """Pixel frames per latent frame after the first."""

    @abstractmethod
    def decode_piece(self, latents: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Decode the next latent frames of a video.

        Args:
            latents: [B, F, C, h, w].
            state: the second result of the piece before; None at the start of a video.

        Returns:
            Pixels [B, T, 3, H, W], float32, and the state for the next piece. A video's first latent frame decodes to
            one pixel frame, each later one to `temporal_stride` pixel frames.
        """

    def to(self, device: torch.device | str) -> Any:
        """Move the weights, if there are any, and return the decoder."""
        return self

    def num_pixel_frames(self, num_latent_frames: int) -> int:
        """Return the number of pixel frames that `num_latent_frames` latent frames decode to."""
        return self.temporal_stride * (num_latent_frames - 1) + 1

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Return (C, h, w) of a latent frame, for a video of height x width pixels."""
        return self.channels, height // self.spatial_stride, width // self.spatial_stride

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Return the pixels [B, T, 3, H, W] in [-1, 1], float32, of a whole video's latents [B, F, C, h, w]."""
        return self.stream().push(latents)

    def stream(self, keep: int = 0) -> "StreamingDecoder":
        """Return a decoder for one video's latents, piece by piece and in order; see `StreamingDecoder`."""
        return StreamingDecoder(self, keep)


class StreamingDecoder:
    """Decodes one video block by block in constant memory, with the same result as decoding it whole.

    Decoders are causal in time and need features of the latest frames. Each stream keeps its own, so that one network
    can decode several videos alternately.
    """

    def __init__(self, decoder: Decoder, keep: int = 0):
        """
        Args:
            keep: number of latest pixel frames to keep in `latest`.
        """
        self._decoder, self._keep = decoder, keep
        self._state: Any = None
        self.latest: Tensor | None = None  # [B, up to `keep`, 3, H, W], in [-1, 1]

    @torch.no_grad()
    def push(self, latents: Tensor) -> Tensor:
        """Decode the next latents [B, F, C, h, w] and return their pixels [B, T, 3, H, W] in [-1, 1], float32.

        The video's first latent frame decodes to one pixel frame, each later one to `temporal_stride` pixel frames.
        """
        pieces = []
        for piece in latents.split(_frames_per_call(latents, self._decoder.max_frames), dim=1):
            pixels, self._state = self._decoder.decode_piece(piece, self._state)
            pieces.append(pixels)
        decoded = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)
        if self._keep:
            kept = decoded if self.latest is None else torch.cat([self.latest, decoded], dim=1)
            self.latest = kept[:, -self._keep :].clone()  # a view would keep all frames in memory
        return decoded


def _frames_per_call(latents: Tensor, limit: int) -> int:
    """Return how many frames of latents [B, F, C, h, w] to decode at once, so that memory is bounded."""
    batch, _, _, height, width = latents.shape
    frames = max(1, LATENTS_PER_CALL // (batch * height * width))
    return min(frames, limit or frames)
