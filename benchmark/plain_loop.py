"""The second baseline: a rollout with `PlainNetwork`, one pass per op and nothing fused."""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from benchmark.plain_network import LayerCache, PlainCache, PlainNetwork
from pipeline.build import context_frames, tokens_per_frame
from pipeline.rollout import Rollout
from pipeline.text_to_video import TextToVideo
from utils.config import Config


def plain_config(config: Config) -> Config:
    """Return the configuration without the options that the public code does not have."""
    rollout = dataclasses.replace(config.rollout, fuse_context=False, order="step_major")
    rollout.write_window, rollout.moving_sink = 0, False
    return dataclasses.replace(config, rollout=rollout)


class PlainDenoiser:
    """A `BlockDenoiser` of a `PlainNetwork`."""

    def __init__(self, net: PlainNetwork, embeddings: Tensor):
        """
        Args:
            embeddings: prompt embeddings [B, L, text_dim].
        """
        self.net, self.embeddings = net, embeddings
        self.text_cache: list[LayerCache] = [{} for _ in net.blocks]

    def denoise(self, x: Tensor, sigma: float, first_frame: int, cache: PlainCache, write: bool = False) -> Tensor:
        """See `Denoiser.denoise`. Every pass writes the block into the cache; a later pass of it overwrites it."""
        flow = self._flow(x, sigma, first_frame, cache)
        return (x.double() - sigma * flow.double()).float()

    def write_context(self, x: Tensor, sigma: float, first_frame: int, cache: PlainCache, **options: Any) -> None:
        """See `Denoiser.write_context`. The whole network runs, and its prediction is not used."""
        assert not options, "the plain loop has no rollout.write_window"
        self._flow(x, sigma, first_frame, cache)

    def write_then_denoise(
        self,
        context: Tensor,
        context_sigma: float,
        x: Tensor,
        sigma: float,
        first_frame: int,
        cache: PlainCache,
        **options: Any,
    ) -> Tensor:
        """See `Denoiser.write_then_denoise`; two passes."""
        self.write_context(context, context_sigma, first_frame, cache, **options)
        return self.denoise(x, sigma, first_frame + context.shape[1], cache)

    def _flow(self, x: Tensor, sigma: float, first_frame: int, cache: PlainCache) -> Tensor:
        timestep = torch.ones(x.shape[:2], device=x.device) * (1000 * sigma)
        _, rows, columns = self.net.patch_size
        start = first_frame * (x.shape[3] // rows) * (x.shape[4] // columns)
        clip = x.permute(0, 2, 1, 3, 4).to(self.net.dtype)
        flow = self.net(clip, timestep, self.embeddings, cache, self.text_cache, start)
        return flow.permute(0, 2, 1, 3, 4)


def use_plain_network(rollout: Rollout, net: PlainNetwork, pipeline: TextToVideo, prompts: list[str]) -> None:
    """Make a rollout of `pipeline` run with the plain network and its cache."""
    config = pipeline.config
    embeddings = pipeline.embeddings.of(prompts).to(net.device, net.dtype)
    context, sink = context_frames(config.rollout, config.video.num_output_frames)
    sizes = len(prompts), tokens_per_frame(config.video, net.patch_size), context + config.rollout.block_frames, sink
    rollout.denoiser = PlainDenoiser(net, embeddings)
    rollout.new_cache = lambda: PlainCache(net, *sizes)
