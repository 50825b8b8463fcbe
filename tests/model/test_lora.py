"""LoRA files in diffusers' and in Wan's names change the weights by scale * B A, and nothing else fits by accident."""

import pytest
import torch
from safetensors.torch import save_file

from model.causal_wan import CausalWanModel
from model.lora import fuse_lora
from utils.errors import UserError

SIZES = dict(num_attention_heads=2, attention_head_dim=16, ffn_dim=64, num_layers=2, text_dim=24)
TARGETS = {  # diffusers name: Wan's own
    "blocks.0.attn1.to_q": "blocks.0.self_attn.q",
    "blocks.0.attn1.to_k": "blocks.0.self_attn.k",
    "blocks.0.attn1.to_v": "blocks.0.self_attn.v",
    "blocks.0.attn1.to_out.0": "blocks.0.self_attn.o",
    "blocks.0.attn2.to_q": "blocks.0.cross_attn.q",
    "blocks.0.attn2.to_k": "blocks.0.cross_attn.k",
    "blocks.0.attn2.to_v": "blocks.0.cross_attn.v",
    "blocks.0.attn2.to_out.0": "blocks.0.cross_attn.o",
    "blocks.0.ffn.net.0.proj": "blocks.0.ffn.0",
    "blocks.0.ffn.net.2": "blocks.0.ffn.2",
}


def lora_pairs(net: CausalWanModel) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Random rank-4 factors (A, B) for every target."""
    pairs = {}
    for name in TARGETS:
        out_features, in_features = net.get_submodule(name).weight.shape
        pairs[name] = (torch.randn(4, in_features), torch.randn(out_features, 4))
    return pairs


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_diffusers_names(tmp_path, prefix):
    net = CausalWanModel(**SIZES)
    pairs = lora_pairs(net)
    state = {}
    for name, (a, b) in pairs.items():
        state |= {f"{prefix}{name}.lora_A.weight": a, f"{prefix}{name}.lora_B.weight": b}
    check_fused(net, pairs, state, tmp_path)


def test_wan_names(tmp_path):
    net = CausalWanModel(**SIZES)
    pairs = lora_pairs(net)
    state = {}
    for name, (a, b) in pairs.items():
        wan = f"diffusion_model.{TARGETS[name]}"
        state |= {f"{wan}.lora_A.weight": a, f"{wan}.lora_B.weight": b}
    check_fused(net, pairs, state, tmp_path)


def check_fused(net, pairs, state, folder):
    before = {name: value.clone() for name, value in net.state_dict().items()}
    save_file(state, folder / "lora.safetensors")
    fuse_lora(net, str(folder / "lora.safetensors"), scale=0.5)
    after = net.state_dict()
    assert after.keys() == before.keys()
    for name, value in before.items():
        layer = name.removesuffix(".weight")
        expected = value + 0.5 * pairs[layer][1] @ pairs[layer][0] if layer in pairs else value
        torch.testing.assert_close(after[name], expected)


def test_other_network_is_refused(tmp_path):
    net = CausalWanModel(**SIZES)
    save_file({"transformer.blocks.9.attn1.to_q.lora_A.weight": torch.zeros(4, 8)}, tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match=r"no layer blocks\.9\.attn1\.to_q"):
        fuse_lora(net, str(tmp_path / "lora.safetensors"))


def test_other_width_is_refused(tmp_path):
    net = CausalWanModel(**SIZES)
    name = "transformer.blocks.0.attn1.to_q"
    state = {f"{name}.lora_A.weight": torch.zeros(4, 8), f"{name}.lora_B.weight": torch.zeros(8, 4)}
    save_file(state, tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match="does not fit"):
        fuse_lora(net, str(tmp_path / "lora.safetensors"))


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match="cannot read LoRA"):
        fuse_lora(CausalWanModel(**SIZES), str(tmp_path / "none.safetensors"))
