"""model/weight_files.py: checkpoints of all layouts are read to the same names and values; other files are refused."""

import json
import os
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import WanTransformer3DModel
from safetensors.torch import save_file
from weight_samples import CONFIG, assert_same, tiny_dit

from model.weight_files import read_checkpoint
from model.weight_names import State, export_state
from model.weights import load_into
from utils.errors import UserError


def wrap(state: State, pattern: str) -> State:
    """Rename weights by a pattern: {} is the name, {head} its part up to the layer index, {tail} the part after it."""
    if "{head}" not in pattern:
        return {pattern.format(name): tensor for name, tensor in state.items()}
    wrapped = {}
    for name, tensor in state.items():
        head, index, tail = name.split(".", 2) if name.startswith("blocks.") else ("", "", "")
        wrapped[pattern.format(head=f"{head}.{index}", tail=tail) if head else f"model.{name}"] = tensor
    return wrapped


@pytest.mark.parametrize(
    "pattern",
    [
        "{}",
        "model.{}",
        "module.model.{}",
        "_orig_mod.{}",
        "diffusion_model.{}",
        "model.diffusion_model.{}",
        "model._fsdp_wrapped_module.{}",
        "model._fsdp_wrapped_module.{head}._fsdp_wrapped_module._checkpoint_wrapped_module.{tail}",
        "model.{head}._orig_mod.{tail}",
    ],
)
@pytest.mark.parametrize("names", ["native", "diffusers"])
def test_names_with_wrappers(tmp_path, state, pattern, names):
    torch.save({"generator": wrap(export_state(state, names), pattern)}, tmp_path / "model.pt")
    assert_same(read_checkpoint(tmp_path / "model.pt"), state)


@pytest.mark.parametrize("key", ["generator", "model", "state_dict", None])
@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files_with_and_without_a_key(tmp_path, state, native, key, zipped):
    content = native if key is None else {key: native, "critic": {"x": torch.zeros(1)}, "step": 600}
    torch.save(content, tmp_path / "model.pt", _use_new_zipfile_serialization=zipped)
    assert_same(read_checkpoint(tmp_path / "model.pt"), state)


def test_safetensors_file(tmp_path, state, native):
    save_file({f"model.{name}": tensor for name, tensor in native.items()}, tmp_path / "wan.safetensors")
    assert_same(read_checkpoint(tmp_path / "wan.safetensors"), state)


def test_use_ema_reads_the_moving_average(tmp_path, state):
    ema = tiny_dit(1).state_dict()
    generator = export_state(state, "generator")
    torch.save(generator | {"generator_ema": export_state(ema, "generator")["generator"]}, tmp_path / "hiar.pt")
    assert_same(read_checkpoint(tmp_path / "hiar.pt"), state)
    assert_same(read_checkpoint(tmp_path / "hiar.pt", use_ema=True), ema)


@pytest.mark.parametrize(
    ("content", "use_ema", "message"),
    [
        ({"generator": {"a": torch.zeros(1)}, "critic": {}}, True, "no generator_ema.*generator.*leave out --use_ema"),
        ({"a": torch.zeros(1)}, True, "no generator_ema.*one unnamed set of weights.*leave out --use_ema"),
        ({"generator_ema": {"a": torch.zeros(1)}}, False, "no generator.*generator_ema.*add --use_ema"),
        ({"step": 3}, False, "holds step; choose another"),
        ({}, False, "holds nothing"),
        ({"generator": {"a": 1.0}}, False, "no generator"),
        ([torch.zeros(1)], False, "holds a list"),
        ({"a.weight": torch.zeros(1), "model.a.weight": torch.zeros(1)}, False, "more than once"),
    ],
)
def test_other_contents_are_refused(tmp_path, content, use_ema, message):
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(UserError, match=message):
        read_checkpoint(tmp_path / "model.pt", use_ema)


def save_sharded(state: State, folder: Path) -> None:
    names = sorted(state)
    shards = {"a-00001-of-00002.safetensors": names[::2], "a-00002-of-00002.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: state[name] for name in part}, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, part in shards.items() for name in part}}
    (folder / "a.safetensors.index.json").write_text(json.dumps(index))


def test_folders(tmp_path, dit, state, native):
    dit.save_pretrained(tmp_path / "generator")
    assert_same(read_checkpoint(tmp_path / "generator"), state)

    (tmp_path / "sharded").mkdir()
    save_sharded(native, tmp_path / "sharded")
    assert_same(read_checkpoint(tmp_path / "sharded"), state)
    (tmp_path / "sharded" / "a-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"a-00002-of-00002.safetensors do not exist"):
        read_checkpoint(tmp_path / "sharded")

    (tmp_path / "iteration").mkdir()
    torch.save({"generator": native}, tmp_path / "iteration" / "model.pt")
    assert_same(read_checkpoint(tmp_path / "iteration"), state)
    torch.save({"generator": native}, tmp_path / "iteration" / "other.pt")
    with pytest.raises(UserError, match="several weights files"):
        read_checkpoint(tmp_path / "iteration")

    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no \*.safetensors"):
        read_checkpoint(tmp_path / "empty")
    with pytest.raises(UserError, match="do not exist"):
        read_checkpoint(tmp_path / "nowhere.pt")


@pytest.mark.parametrize("name", ["zip.pt", "old.pt", "safe.safetensors"])
@pytest.mark.parametrize("part", [0.0, 0.001, 0.5, 0.999])
def test_cut_off_files_are_refused(tmp_path, native, name, part):
    file = tmp_path / name
    if name.startswith("safe"):
        save_file(native, file)
    else:
        torch.save({"generator": native}, file, _use_new_zipfile_serialization=name.startswith("zip"))
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * part)])
    with pytest.raises(UserError, match="cut off or not a checkpoint"):
        read_checkpoint(file)


@pytest.mark.parametrize("content", [b"version https://git-lfs.github.com/spec/v1\n", b"PK\x03\x04", bytes(range(256))])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_files_of_other_kinds_are_refused(tmp_path, content, suffix):
    (tmp_path / f"x{suffix}").write_bytes(content)
    with pytest.raises(UserError, match="cut off or not a checkpoint"):
        read_checkpoint(tmp_path / f"x{suffix}")


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("run-by-the-pickle",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_is_refused(tmp_path, monkeypatch, zipped):
    monkeypatch.chdir(tmp_path)
    torch.save({"generator": Malicious()}, "evil.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"refused: reading it could run code .*mkdir"):
        read_checkpoint("evil.pt")
    assert not Path("run-by-the-pickle").exists()


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
def test_training_never_changes_the_mapped_file(tmp_path, dit, state, name):
    (save_file if name.endswith("safetensors") else torch.save)(state, tmp_path / name)
    before = (tmp_path / name).read_bytes()
    with init_empty_weights():
        net = WanTransformer3DModel(**CONFIG)
    load_into(net, read_checkpoint(tmp_path / name), name)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(1)
    assert (tmp_path / name).read_bytes() == before
    assert_same(read_checkpoint(tmp_path / name), state)
