"""Sizes of networks by name: the published Wan2.1 networks and the miniature."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

TRANSFORMERS: dict[str, dict[str, Any]] = {
    "wan-1.3b": dict(num_attention_heads=12, attention_head_dim=128, ffn_dim=8960, num_layers=30, text_dim=4096),
    # Four of its layers, for measurements on a CPU.
    "wan-1.3b-4-layers": dict(
        num_attention_heads=12, attention_head_dim=128, ffn_dim=8960, num_layers=4, text_dim=4096
    ),
    "wan-14b": dict(num_attention_heads=40, attention_head_dim=128, ffn_dim=13824, num_layers=40, text_dim=4096),
    "shapes": dict(num_attention_heads=6, attention_head_dim=32, ffn_dim=768, num_layers=6, text_dim=64),
    # 12x12 latents in patches of 3x3: as many tokens as "shapes" has for 8x8 latents.
    "shapes-96": dict(
        **dict(num_attention_heads=6, attention_head_dim=32, ffn_dim=768, num_layers=6, text_dim=64),
        **dict(patch_size=(1, 3, 3), in_channels=8, out_channels=8),
    ),
}

VAES: dict[str, dict[str, Any]] = {
    "wan": {},  # the defaults of diffusers
    # As in Wan2.1: 8x in space (a 2x2 patch and two stages), 4x in time, 16 channels.
    "shapes": dict(
        base_dim=12,
        decoder_base_dim=16,
        z_dim=16,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=8,
        latents_mean=[0.0] * 16,
        latents_std=[1.0] * 16,
    ),
}
VAES["shapes-96"] = VAES["shapes"] | dict(z_dim=8, latents_mean=[0.0] * 8, latents_std=[1.0] * 8)

TEXT_ENCODERS: dict[str, dict[str, Any]] = {
    "wan": dict(vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64),
    # 384 is the vocabulary of ByT5: bytes, special tokens and unused ids.
    "shapes": dict(vocab_size=384, d_model=64, d_kv=16, d_ff=160, num_layers=3, num_heads=4, dropout_rate=0.0),
}
TEXT_ENCODERS["shapes-96"] = TEXT_ENCODERS["shapes"]

TINY_DECODERS: dict[str, dict[str, Any]] = {
    "wan": dict(widths=(256, 128, 64, 64)),  # of the public weights taew2_1
    "shapes": dict(widths=(48, 24, 12, 8)),
}
TINY_DECODERS["shapes-96"] = TINY_DECODERS["shapes"]

Net = TypeVar("Net", bound=nn.Module)


def random_network(
    net_class: Callable[..., Net], sizes: dict[str, Any], dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Net:
    """Return a network with small random weights, in evaluation mode, for measurements of speed.

    Args:
        sizes: arguments of `net_class`.
        dtype: of the weights; the network's `_keep_in_fp32_modules` stay in float32.
    """
    with torch.device("meta"):
        net = net_class(**sizes)
    fp32 = getattr(net, "_keep_in_fp32_modules", None) or []
    replacements: dict[nn.Parameter, nn.Parameter] = {}  # shared parameters stay shared
    for name, parameter in list(net.named_parameters(remove_duplicate=False)):
        if parameter not in replacements:
            kept = any(part in fp32 for part in name.split("."))
            value = torch.empty(parameter.shape, dtype=torch.float32 if kept else dtype, device=device)
            replacements[parameter] = nn.Parameter(value.normal_(std=0.02), requires_grad=False)
        module, _, leaf = name.rpartition(".")
        setattr(net.get_submodule(module), leaf, replacements[parameter])
    return net.eval()
