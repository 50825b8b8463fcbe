"""model/weight_names.py: names of all public layouts are translated to diffusers' and transformers' names, and back."""

import math

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from torch import Tensor, nn
from weight_samples import TEXT_CONFIG, assert_same, native_text_state, tiny_text_encoder

from model.weight_names import DIT_NAMES, UMT5_NAMES, WRAPPERS, State, export_state, inverse, join_names, rename
from model.weights import infer_umt5_config
from utils.errors import UserError


def test_long_lists_of_names_are_cut():
    assert join_names(["a", "b", "c"]) == "a, b, c" and join_names(iter("abcd")) == "a, b, c, ..."
    assert join_names("abcd", 2) == "a, b, ..." and join_names([]) == ""


def test_dit_names_agree_with_diffusers(state, native):
    assert_same(convert_wan_transformer_to_diffusers(dict(native)), state)
    assert_same(rename(native, DIT_NAMES), state)


def test_dit_names_are_complete_and_translating_twice_changes_nothing(state, native):
    assert not {name for name in native if "to_q" in name or "net." in name or "condition_embedder" in name}
    assert {"head.modulation", "head.head.bias", "blocks.1.modulation", "blocks.1.norm3.bias"} <= native.keys()
    assert_same(rename(state, DIT_NAMES), state)  # so layouts need not be detected
    assert len(inverse(DIT_NAMES)) == len(DIT_NAMES)


def test_no_name_contains_a_wrapper(state, native):
    text = [*UMT5_NAMES, *UMT5_NAMES.values()]
    assert WRAPPERS.isdisjoint(part for name in [*state, *native, *text] for part in name.split("."))


@pytest.mark.parametrize("index", [9, 10, 39])
def test_layer_indices_stay(index):
    name = f"blocks.{index}.ffn.0.weight"
    assert list(rename({name: torch.zeros(1)}, DIT_NAMES)) == [f"blocks.{index}.ffn.net.0.proj.weight"]


def test_generator_layout(state, native):
    generator = export_state(state, "generator")["generator"]
    assert_same({name.removeprefix("model."): tensor for name, tensor in generator.items()}, native)


# ---- text encoder ----


def wan_text_encoder(state: State, ids: Tensor, heads: int, num_layers: int) -> Tensor:
    """Return the output [B, L, D] of Wan's UMT5 encoder for token ids [B, L] and weights under Wan's names.

    As in the T5 papers: pre-norm, and unscaled attention with a position bias per layer.
    """

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * state[f"{name}.weight"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ state[f"{name}.weight"].T

    def split(x: Tensor) -> Tensor:
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)

    def bucket(distance: int, half: int = 16, furthest: int = 128) -> int:
        """Return the bucket of a distance. Half of all buckets are for later keys; half of these are exact."""
        exact, far = half // 2, abs(distance)
        log = exact + int(math.log(max(far, 1) / exact) / math.log(furthest / exact) * (half - exact))
        return (half if distance > 0 else 0) + (far if far < exact else min(log, half - 1))

    length = ids.shape[1]
    buckets = torch.tensor([[bucket(key - query) for key in range(length)] for query in range(length)])
    x = state["token_embedding.weight"][ids]
    for layer in range(num_layers):
        name = f"blocks.{layer}"
        y = norm(x, f"{name}.norm1")
        query, key, value = (split(linear(y, f"{name}.attn.{which}")) for which in "qkv")
        bias = state[f"{name}.pos_embedding.embedding.weight"][buckets].permute(2, 0, 1)
        y = (query @ key.transpose(-1, -2) + bias).softmax(-1) @ value
        x = x + linear(y.transpose(1, 2).flatten(2), f"{name}.attn.o")
        y = norm(x, f"{name}.norm2")
        gate = nn.functional.gelu(linear(y, f"{name}.ffn.gate.0"), approximate="tanh")
        x = x + linear(linear(y, f"{name}.ffn.fc1") * gate, f"{name}.ffn.fc2")
    return norm(x, "norm")


def test_the_text_encoder_equals_wans_own(tmp_path):
    encoder = tiny_text_encoder()
    state = native_text_state(encoder)
    assert state.keys() >= {"token_embedding.weight", "blocks.1.ffn.gate.0.weight", "norm.weight"}
    assert not [name for name in state if name.startswith("encoder")]
    ids = torch.randint(3, 259, (2, 40))
    expected = wan_text_encoder(state, ids, heads=3, num_layers=2)
    torch.testing.assert_close(encoder(ids).last_hidden_state, expected, rtol=1e-4, atol=1e-4)

    config = infer_umt5_config(rename(state, UMT5_NAMES))
    assert {name: getattr(config, name) for name in TEXT_CONFIG} == TEXT_CONFIG
    with pytest.raises(UserError, match="not a UMT5 encoder's weights"):
        infer_umt5_config({"a": torch.zeros(1)})
