"""Long videos by repeated rollouts (CausVid, arXiv 2412.07772): each rollout continues the end of the previous one."""

from typing import Protocol

import torch
from torch import Tensor

from model.vae import WanVAE
from pipeline.build import num_pixel_frames


class FrameKeeper(Protocol):
    """A decoder that keeps the latest pixel frames: a `StreamingDecoder`, or a `DecodingThread`."""

    @property
    def latest(self) -> Tensor | None:
        """Pixel frames [B, T, 3, H, W] in [-1, 1], of all latents so far."""
        ...


class Overlap:
    """The last frames of a video's rollouts, from which the next rollout starts.

    A network that is trained on clips expects a first latent frame of one pixel frame, but later latent frames hold
    four. So the overlap's first frame is decoded, and its last pixel frame is encoded again on its own.
    """

    def __init__(self, vae: WanVAE, num_frames: int, decoder: FrameKeeper | None = None):
        """
        Args:
            num_frames: latent frames of the overlap.
            decoder: decoder that the caller pushes all latents to. It keeps the pixel frames of the overlap. Default:
                one of its own.
        """
        self._vae, self._num_frames = vae, num_frames
        self._own_decoder = vae.stream(num_pixel_frames(num_frames)) if decoder is None else None
        self._decoder: FrameKeeper | None = decoder or self._own_decoder
        self._latents: Tensor | None = None

    def add(self, latents: Tensor) -> None:
        """Add the next latents of the video, [B, F, C, h, w]."""
        if self._own_decoder is not None:
            self._own_decoder.push(latents)
        kept = latents if self._latents is None else torch.cat([self._latents, latents], dim=1)
        self._latents = kept[:, -self._num_frames :].clone()  # a view would keep all frames in memory

    def prefix(self) -> Tensor:
        """Return the prefix of the next rollout, [B, num_frames, C, h, w]."""
        assert self._decoder is not None and self._latents is not None
        latest, pixels = self._decoder.latest, num_pixel_frames(self._num_frames)
        assert latest is not None and latest.shape[1] == pixels, "the decoder keeps other frames than the overlap's"
        image = self._vae.encode(latest[:, :1])
        return torch.cat([image.to(self._latents), self._latents[:, 1:]], dim=1)
