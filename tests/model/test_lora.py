"""model/lora.py: LoRA files under all public names add scale * B A to the weights; other files are refused."""

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from model.lora import fuse_lora
from utils.errors import UserError

RANK = 4
LAYERS = {  # diffusers' name: Wan's own
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


def names_of(layer: str, layout: str) -> tuple[str, str]:
    """Return the names of the factors A and B of a layer."""
    wan = LAYERS[layer]
    if layout == "musubi":
        return tuple(f"lora_unet_{wan.replace('.', '_')}.lora_{which}.weight" for which in ("down", "up"))
    stems = {"diffusers": f"transformer.{layer}", "bare": layer, "wan": f"diffusion_model.{wan}", "bare wan": wan}
    return tuple(f"{stems[layout]}.lora_{which}.weight" for which in "AB")


@pytest.mark.parametrize("layout", ["diffusers", "bare", "wan", "bare wan", "musubi"])
def test_factors_are_added(make_net, tmp_path, layout):
    net = make_net(num_layers=1)
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    state = {}
    for layer in LAYERS:
        out_features, in_features = net.get_submodule(layer).weight.shape
        factors[layer] = torch.randn(RANK, in_features), torch.randn(out_features, RANK)
        state |= dict(zip(names_of(layer, layout), factors[layer], strict=True))
        if layout == "musubi":  # it always has alpha, which scales by alpha / rank
            state[f"lora_unet_{LAYERS[layer].replace('.', '_')}.alpha"] = torch.tensor(RANK)  # a whole number
    save_file(state, tmp_path / "lora.safetensors")
    before = {name: value.clone() for name, value in net.state_dict().items()}
    fuse_lora(net, str(tmp_path / "lora.safetensors"), scale=0.5)
    after = net.state_dict()
    assert after.keys() == before.keys()
    for name, value in before.items():
        layer = name.removesuffix(".weight")
        expected = value + 0.5 * factors[layer][1] @ factors[layer][0] if layer in factors else value
        torch.testing.assert_close(after[name], expected)


@pytest.mark.parametrize(
    ("layer", "message"),
    [("blocks.9.attn1.to_q", r"no layer blocks\.9\.attn1\.to_q"), ("blocks.0.attn1.to_q", "does not fit")],
    ids=["another depth", "another width"],
)
def test_weights_of_another_network_are_refused(make_net, tmp_path, layer, message):
    name = f"transformer.{layer}"
    state = {f"{name}.lora_A.weight": torch.zeros(4, 8), f"{name}.lora_B.weight": torch.zeros(8, 4)}
    save_file(state, tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match=message):
        fuse_lora(make_net(num_layers=1), str(tmp_path / "lora.safetensors"))


@pytest.mark.parametrize("prefix", ["", "base_model.model.", "model.base_model.model."])
def test_torch_files_are_read(make_net, tmp_path, prefix):
    net = make_net(num_layers=1)
    before = net.get_submodule("blocks.0.attn1.to_q").weight.clone()
    down, up = torch.randn(RANK, before.shape[1]), torch.randn(before.shape[0], RANK)
    name = f"{prefix}blocks.0.self_attn.q"
    state = {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    torch.save({"generator_lora": state, "critic_lora": {}} if prefix else state, tmp_path / "lora.pt")
    fuse_lora(net, str(tmp_path / "lora.pt"))
    torch.testing.assert_close(net.get_submodule("blocks.0.attn1.to_q").weight, before + up @ down)


def test_a_file_with_nan_is_refused_and_named(make_net, tmp_path):
    name = "transformer.blocks.0.attn1.to_q"
    state = {f"{name}.lora_A.weight": torch.full((4, 8), float("nan")), f"{name}.lora_B.weight": torch.zeros(8, 4)}
    save_file(state, tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match=r"lora\.safetensors.*attn1\.to_q\.lora_A\.weight"):
        fuse_lora(make_net(num_layers=1), str(tmp_path / "lora.safetensors"))


def test_a_missing_file_is_refused(net, tmp_path):
    with pytest.raises(UserError, match="cannot read LoRA"):
        fuse_lora(net, str(tmp_path / "none.safetensors"))
