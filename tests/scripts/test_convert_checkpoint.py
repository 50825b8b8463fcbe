"""scripts/convert_checkpoint.py: a round trip changes no bit, and the files load in diffusers and the original code."""

from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file

from model.conversion import convert_checkpoint as convert
from model.weight_names import DIT_NAMES, State, inverse, rename
from scripts import convert_checkpoint
from utils.errors import UserError
from utils.files import read_json


@pytest.fixture(scope="module")
def state() -> State:
    torch.manual_seed(0)
    shape = dict(num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4)
    net = WanTransformer3DModel(**shape, text_dim=16, freq_dim=8, ffn_dim=20, num_layers=2)
    return {name: tensor.to(torch.bfloat16) for name, tensor in net.state_dict().items()}


@pytest.fixture
def checkpoint(tmp_path, state) -> Path:
    native = {f"model.{name}": tensor for name, tensor in rename(state, inverse(DIT_NAMES)).items()}
    other = {name: torch.zeros_like(tensor) for name, tensor in native.items()}
    torch.save({"generator": other, "generator_ema": native}, tmp_path / "hiar.pt")
    return tmp_path / "hiar.pt"


def assert_same(actual: State, expected: State) -> None:
    assert set(actual) == set(expected)
    assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []
    assert {tensor.dtype for tensor in actual.values()} == {tensor.dtype for tensor in expected.values()}


@pytest.mark.parametrize(
    ("middle", "layout"),
    [("folder", "diffusers"), ("a.safetensors", "diffusers"), ("a.safetensors", "native"), ("a.pth", "native")],
)
def test_a_round_trip_changes_no_bit(tmp_path, checkpoint, state, middle, layout):
    convert(checkpoint, tmp_path / middle, layout, use_ema=True, num_heads=2)
    convert(tmp_path / middle, tmp_path / "back.pt", "generator")
    content = torch.load(tmp_path / "back.pt", weights_only=True)
    assert content.keys() == {"generator"}
    assert_same(content["generator"], torch.load(checkpoint, weights_only=True)["generator_ema"])


def test_the_folder_loads_in_diffusers(tmp_path, checkpoint, state):
    line = convert(checkpoint, tmp_path / "new" / "folder", "diffusers", use_ema=True, num_heads=2)
    assert "2 layers, 2 heads of 12" in line
    net = WanTransformer3DModel.from_pretrained(tmp_path / "new" / "folder", torch_dtype=None)
    assert net.config.num_attention_heads == 2 and net.config.ffn_dim == 20
    assert read_json(tmp_path / "new/folder/config.json")["_class_name"] == "WanTransformer3DModel"
    assert_same({name: tensor.to(torch.bfloat16) for name, tensor in net.state_dict().items()}, state)


def test_a_native_file_has_wans_names(tmp_path, checkpoint, state):
    line = convert(checkpoint, tmp_path / "wan.safetensors", "native", use_ema=True, dtype="fp32")
    count = sum(tensor.numel() for tensor in state.values())
    assert line == f"wrote {tmp_path / 'wan.safetensors'} (native: {len(state)} tensors, {count:,} weights)"
    expected = {name: tensor.float() for name, tensor in rename(state, inverse(DIT_NAMES)).items()}
    assert_same(load_file(tmp_path / "wan.safetensors"), expected)


def test_a_file_can_be_converted_in_place(checkpoint, state):
    convert(checkpoint, checkpoint, "generator", use_ema=True)
    assert len(torch.load(checkpoint, weights_only=True)["generator"]) == len(state)
    assert [file.name for file in checkpoint.parent.iterdir()] == [checkpoint.name]


@pytest.mark.parametrize(
    ("name", "layout"), [("x.safetensors", "generator"), ("folder", "native"), ("x.bin", "diffusers")]
)
def test_formats_that_cannot_hold_the_layout_are_rejected(tmp_path, checkpoint, name, layout):
    with pytest.raises(UserError, match=f"--to {layout} cannot be written as {name}"):
        convert(checkpoint, tmp_path / name, layout)
    assert not (tmp_path / name).exists()


def test_a_folder_needs_the_number_of_heads(tmp_path, checkpoint):
    with pytest.raises(UserError, match="--num_heads"):
        convert(checkpoint, tmp_path / "folder", "diffusers")
    assert not (tmp_path / "folder").exists()


def test_the_command(call, tmp_path, checkpoint):
    words = ["--input", checkpoint, "--output", tmp_path / "out.pt", "--to", "native", "--dtype", "fp16"]
    code, out, err = call(convert_checkpoint, *words)
    assert code == 0 and out.startswith("wrote "), err
    assert {tensor.dtype for tensor in torch.load(tmp_path / "out.pt", weights_only=True).values()} == {torch.float16}


def test_the_command_without_input_is_one_line(call, tmp_path):
    words = ["--input", "none.pt", "--output", tmp_path / "out.pt", "--to", "native"]
    code, _, err = call(convert_checkpoint, *words)
    assert code == 2 and err.startswith("error: weights none.pt do not exist") and err.count("\n") == 1


def test_the_configuration_of_a_folder_is_kept(tmp_path):
    """Six heads of 32 channels and three of 64 have weights of the same shapes; only the configuration differs."""
    convert(Path("data/shapes-wan/transformer"), tmp_path / "wan-1.3b", "diffusers")
    config = WanTransformer3DModel.load_config(tmp_path / "wan-1.3b")
    assert (config["num_attention_heads"], config["attention_head_dim"]) == (6, 32)
