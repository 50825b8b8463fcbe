"""The work of decoding a block, compared with a denoising pass. No weights are loaded."""

import contextlib
from collections.abc import Mapping
from math import prod
from typing import Any

from model.presets import TRANSFORMERS, VAES
from model.weight_files import read_model_json
from model.weights import ModelDirectory
from pipeline.build import context_frames, frames_per_block, latent_size
from utils.config import Config
from utils.errors import UserError

_WAN_DECODER = 8.5e6
"""Floating-point operations per pixel of Wan2.1's decoder, counted by `benchmark.measure.counted_flops`."""
_TINY_DECODER = 3.3e5
"""The same of the tiny decoder with the widths of TAEHV."""
_CONVOLUTION_COST = 2.0
"""Time of an operation of the decoder, relative to one of the DiT: its convolutions reach about half the speed of large
matrix products, and its elementwise operations move more bytes per operation. docs/pipeline.md has the arithmetic."""


def decode_passes(config: Config) -> float:
    """Estimate the time to decode a block, relative to that of a denoising pass with a full window.

    The estimate is the ratio of their operations (matrix products and convolutions), times `_CONVOLUTION_COST`. A model
    that is not on this machine counts as Wan2.1-1.3B.
    """
    net, vae = TRANSFORMERS["wan-1.3b"], VAES["wan"]
    with contextlib.suppress(UserError):  # of a missing model; a run reports it later
        directory = ModelDirectory.open(config.model.base)
        net = directory.transformer_config()
        vae = read_model_json(directory.path / "vae/config.json") if directory.layout == "diffusers" else vae
    frames = frames_per_block(config.rollout, config.video.num_output_frames)
    context, _ = context_frames(config.rollout, config.video.num_output_frames)
    flops = pass_flops(net, latent_size(config.video), frames, context, config.model.text_length)
    pixels = 4 * frames * config.video.height * config.video.width
    per_pixel = _TINY_DECODER if config.model.decoder == "tiny" else decoder_flops_per_pixel(vae)
    return _CONVOLUTION_COST * pixels * per_pixel / flops


def pass_flops(net: Mapping[str, Any], size: tuple[int, int], frames: int, context: int, text_length: int) -> float:
    """Return the operations of one denoising pass over a block.

    Args:
        net: arguments of the network.
        size: height and width of the latents.
        context: frames of context.
    """
    dim = net.get("num_attention_heads", 40) * net.get("attention_head_dim", 128)
    tokens = frames * prod(size) / prod(net.get("patch_size", (1, 2, 2)))
    keys = tokens * (frames + context) / frames + text_length
    linear = 2 * (6 * dim**2 + 2 * dim * net.get("ffn_dim", 13824))  # q, k, v, out; q and out of cross-attention
    return net.get("num_layers", 40) * tokens * (linear + 4 * dim * keys)


def decoder_flops_per_pixel(vae: Mapping[str, Any]) -> float:
    """Return the operations per pixel of a decoder with Wan's layout, by its width, depth and patches."""
    width = vae.get("decoder_base_dim") or vae.get("base_dim", 96)
    layers = (vae.get("num_res_blocks", 2) + 1) / 3
    return _WAN_DECODER * (width / 96) ** 2 * layers / (vae.get("patch_size") or 1) ** 2
