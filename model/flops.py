"""Floating-point operations of the DiT's passes, counted from shapes: two for every multiplication of a matrix product
or convolution, as torch's `FlopCounterMode` counts them. Nothing else is counted.

All are of one clip. `config` is the network's; D is its width, N tokens of a pass, L text tokens.
"""

from collections.abc import Mapping
from math import prod
from typing import Any


def denoise_flops(config: Mapping[str, Any], frames: int, frame_tokens: int, context_tokens: int, text: int) -> int:
    """A Denoise of a block of `frames` beside `context_tokens` of context, `text` text tokens; also one that writes."""
    tokens = frames * frame_tokens
    layers = config["num_layers"] * layer_flops(config, tokens, context_tokens, text)
    head = 2 * tokens * width(config) * config["out_channels"] * prod(config["patch_size"])
    return embedding_flops(config, frames, frame_tokens) + layers + head


def context_flops(config: Mapping[str, Any], frames: int, frame_tokens: int, context_tokens: int, text: int) -> int:
    """A WriteContext: of the last layer only keys and values, and no head."""
    tokens = frames * frame_tokens
    layers = (config["num_layers"] - 1) * layer_flops(config, tokens, context_tokens, text)
    return embedding_flops(config, frames, frame_tokens) + layers + 2 * 2 * tokens * width(config) ** 2


def bidirectional_flops(config: Mapping[str, Any], frames: int, frame_tokens: int, text: int) -> int:
    """A pass of `WanTransformer3DModel` over a clip, at one timestep, which projects the text anew."""
    once = (frames - 1) * timestep_flops(config)
    return denoise_flops(config, frames, frame_tokens, 0, text) - once + text_flops(config, text)


def text_flops(config: Mapping[str, Any], text: int) -> int:
    """Cross-attention's keys and values of a prompt, for all layers."""
    dim = width(config)
    return 2 * text * dim * (config["text_dim"] + dim) + config["num_layers"] * 2 * 2 * text * dim**2


def layer_flops(config: Mapping[str, Any], tokens: int, context_tokens: int, text: int) -> int:
    """One transformer layer."""
    dim = width(config)
    projections = 2 * tokens * dim**2 * (4 + 2)  # q, k, v, output; the text's q and output
    attention = 2 * 2 * tokens * dim * (context_tokens + tokens + text)
    return projections + attention + 2 * 2 * tokens * dim * config["ffn_dim"]


def embedding_flops(config: Mapping[str, Any], frames: int, frame_tokens: int) -> int:
    """What comes before the layers: patches, and a timestep for every frame."""
    patches = 2 * frames * frame_tokens * config["in_channels"] * prod(config["patch_size"]) * width(config)
    return patches + frames * timestep_flops(config)


def timestep_flops(config: Mapping[str, Any]) -> int:
    """Embedding and modulation of one timestep."""
    dim = width(config)
    return 2 * dim * (config["freq_dim"] + dim + 6 * dim)


def width(config: Mapping[str, Any]) -> int:
    """D."""
    return config["num_attention_heads"] * config["attention_head_dim"]
