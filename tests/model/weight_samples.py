"""Small networks with random weights in public layouts, for tests of names, files and model folders."""

from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import nn
from transformers import UMT5Config, UMT5EncoderModel

from model.weight_names import UMT5_NAMES, State, inverse, rename

CONFIG: dict[str, Any] = dict(
    patch_size=(1, 2, 2),
    num_attention_heads=2,
    attention_head_dim=12,
    in_channels=4,
    out_channels=4,
    text_dim=16,
    freq_dim=8,
    ffn_dim=20,
    num_layers=2,
    cross_attn_norm=True,
    qk_norm="rms_norm_across_heads",
    eps=1e-6,
)
TEXT_CONFIG: dict[str, Any] = dict(vocab_size=259, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=3)


def tiny_dit(seed: int = 0, **changes: Any) -> WanTransformer3DModel:
    torch.manual_seed(seed)
    return randomized(WanTransformer3DModel(**CONFIG | changes))


def tiny_text_encoder() -> UMT5EncoderModel:
    torch.manual_seed(2)
    return randomized(UMT5EncoderModel(UMT5Config(**TEXT_CONFIG)))


def tiny_vae() -> AutoencoderKLWan:
    torch.manual_seed(3)
    return randomized(AutoencoderKLWan(base_dim=4))


def randomized(net: Any) -> Any:
    """Fill all weights with different values. The equal initial norms and biases would hide swapped names."""
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.5)
    return net.eval()


def assert_same(actual: State, expected: State) -> None:
    """Assert that two state dicts have the same names and values."""
    assert set(actual) == set(expected)
    assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []


def native_text_state(encoder: UMT5EncoderModel) -> State:
    state = rename(encoder.state_dict(), inverse(UMT5_NAMES))
    del state["encoder.embed_tokens.weight"]
    return state


def native_vae_state(vae: AutoencoderKLWan) -> State:
    """Return a VAE's weights under Wan's own names: the inverse of diffusers' single-file loader."""
    inside = {"norm1": "residual.0", "conv1": "residual.2", "norm2": "residual.3", "conv2": "residual.6"}
    native = {}
    for name, tensor in vae.state_dict().items():
        name = name.replace("post_quant_conv.", "conv2.") if name.startswith("post") else name
        name = name.replace("quant_conv.", "conv1.") if name.startswith("quant") else name
        for coder in ("encoder", "decoder"):
            name = name.replace(f"{coder}.conv_in.", f"{coder}.conv1.").replace(
                f"{coder}.conv_out.", f"{coder}.head.2."
            )
            name = name.replace(f"{coder}.norm_out.", f"{coder}.head.0.")
            name = name.replace("mid_block.attentions.0.", "middle.1.")
            name = name.replace("mid_block.resnets.0.", "middle.0.").replace("mid_block.resnets.1.", "middle.2.")
        name = name.replace("encoder.down_blocks.", "encoder.downsamples.")
        if name.startswith("decoder.up_blocks."):
            _, _, stage, kind, index, rest = name.split(".", 5)
            name = f"decoder.upsamples.{4 * int(stage) + (3 if kind == 'upsamplers' else int(index))}.{rest}"
        if "middle.1." not in name and ("middle" in name or "samples" in name):
            for ours, theirs in inside.items():
                name = name.replace(f".{ours}.", f".{theirs}.")
            name = name.replace(".conv_shortcut.", ".shortcut.")
        native[name] = tensor
    return native
