"""The baseline of the rollout benchmark: diffusers' own network with the same weights and no KV cache.

Each pass runs bidirectionally over the whole window, at one noise level.
"""

import dataclasses
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from torch import Tensor

from model.compilation import compiles
from model.flow import flow_to_x0
from pipeline.build import choose_attention_backend
from pipeline.text_to_video import TextToVideo
from utils.config import Config


def baseline_config(config: Config) -> Config:
    """Return the configuration with the only schedule that needs no cache: block-first with a clean context."""
    rollout = dataclasses.replace(config.rollout, schedule="block_first", fuse_context=False, leading_blocks=0, sink=0)
    rollout.write_window, rollout.moving_sink = 0, False  # of a cache
    return dataclasses.replace(config, rollout=rollout)


def baseline_network(pipeline: TextToVideo) -> WanTransformer3DModel:
    """Return diffusers' network, which shares its weights with the pipeline's network."""
    config, net = pipeline.config.model, pipeline.net
    with torch.device("meta"):
        baseline = WanTransformer3DModel.from_config(net.config)
    baseline.load_state_dict(net.state_dict(), assign=True)
    # The rotary tables are not in the state dict.
    sizes = net.config
    baseline.rope = WanRotaryPosEmbed(sizes.attention_head_dim, sizes.patch_size, sizes.rope_max_seq_len).to(net.device)
    baseline.eval().requires_grad_(False)
    choose_attention_backend(baseline, config.attention_backend)
    if compiles(config.compile, net.device):
        baseline.compile_repeated_blocks()
    return baseline


class CleanBlocks(list[Tensor]):
    """Cache of `BaselineDenoiser`: the clean latents of all blocks so far."""

    reset = list.clear


class BaselineDenoiser:
    """A `BlockDenoiser` that runs the whole window through the network in each pass.

    Its speed is comparable with that of `Denoiser`. Its results differ from the second block on, because the whole
    window gets the noise level of the current block.
    """

    def __init__(self, net: WanTransformer3DModel, embeddings: Tensor, context_frames: int):
        """
        Args:
            embeddings: prompt embeddings [B, L, text_dim].
            context_frames: largest number of earlier frames in the window.
        """
        self.net, self.embeddings, self.context_frames = net, embeddings, context_frames

    def denoise(self, x: Tensor, sigma: float, first_frame: int, cache: CleanBlocks, write: bool = False) -> Tensor:
        """See `Denoiser.denoise`."""
        window = torch.cat([*cache, x], dim=1)[:, -(self.context_frames + x.shape[1]) :]
        timestep = torch.full(x.shape[:1], 1000 * sigma, device=x.device)
        clip = window.transpose(1, 2).to(self.net.dtype)
        flow = self.net(clip, timestep, self.embeddings, return_dict=False)[0]
        return flow_to_x0(x, flow.transpose(1, 2)[:, -x.shape[1] :], sigma)

    def write_context(self, x: Tensor, sigma: float, first_frame: int, cache: CleanBlocks, **options: Any) -> None:
        """Append the block to the cache."""
        assert not options, "the baseline has no rollout.write_window"
        cache.append(x)

    def write_then_denoise(
        self,
        context: Tensor,
        context_sigma: float,
        x: Tensor,
        sigma: float,
        first_frame: int,
        cache: CleanBlocks,
        **options: Any,
    ) -> Tensor:
        """See `Denoiser.write_then_denoise`."""
        self.write_context(context, context_sigma, first_frame, cache, **options)
        return self.denoise(x, sigma, first_frame + context.shape[1], cache)
