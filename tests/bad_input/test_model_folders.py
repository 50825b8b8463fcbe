"""Bad model folders: other folders as --checkpoint_path, and every damaged file and value of a config.json."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from bad_files import bad_file
from tiny_model import TEXT_ENCODER, TRANSFORMER, VAE

import inference
from model.causal_wan import CausalWanModel
from model.weight_files import read_checkpoint
from model.weights import ModelDirectory
from scripts import convert_checkpoint
from utils.errors import UserError


@pytest.fixture
def model(world, tmp_path) -> Path:
    """A copy of the tiny model that a test may damage."""
    return shutil.copytree(world.model, tmp_path / "model")


def words(world, folder: Path, *more: object) -> tuple[object, ...]:
    return ("--config_path", world.config, "--prompt", "a", "--output_folder", folder / "out", *more)


@pytest.mark.parametrize(
    ("part", "fragment"),
    [
        ("vae", "AutoencoderKLWan, not a transformer"),
        ("text_encoder", "not a transformer"),
        ("tokenizer", "no *.safetensors"),
        ("scheduler", "no *.safetensors"),
    ],
)
def test_other_folders_are_no_checkpoint(world, tmp_path, refuse, part, fragment):
    refuse(inference.main, words(world, tmp_path, "--checkpoint_path", world.model / part), fragment)
    convert = ("--input", world.model / part, "--output", tmp_path / "x", "--to", "diffusers")
    refuse(convert_checkpoint.main, convert)


@pytest.mark.parametrize(
    "change",
    [{"in_channels": 36}, {"image_dim": 1280}, {"added_kv_proj_dim": 16}, {"in_channels": 33, "out_channels": 16}],
    ids=str,
)
def test_an_image_to_video_folder_is_no_checkpoint(world, tmp_path, refuse, model, change):
    file = model / "generator/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    refuse(inference.main, words(world, tmp_path, "--checkpoint_path", model / "generator"), "image-to-video")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".bin", ""])
@pytest.mark.parametrize("kind", ["missing", "folder", "empty", "binary", "words", "deep", "zip"])
def test_bad_checkpoint_files(tmp_path, suffix, kind):
    with pytest.raises(UserError, match=str(tmp_path)):
        read_checkpoint(bad_file(tmp_path, kind, suffix))


@pytest.mark.parametrize("file", ["config.json", "diffusion_pytorch_model.safetensors.index.json"])
@pytest.mark.parametrize("kind", ["empty", "binary", "words", "number", "list", "deep"])
def test_bad_json_beside_the_weights_of_a_checkpoint(world, tmp_path, refuse, model, file, kind):
    (model / "generator" / file).unlink(missing_ok=True)
    bad_file(tmp_path, kind).rename(model / "generator" / file)
    refuse(inference.main, words(world, tmp_path, "--checkpoint_path", model / "generator"))


@pytest.mark.parametrize(
    "content",
    [
        {"weight_map": None},
        {"weight_map": []},
        {"weight_map": {}},
        {"weight_map": {"a": 1}},
        {"weight_map": {"a": "none.safetensors"}},
        {"weight_map": {"a": "../x.safetensors"}},
        {},
    ],
    ids=str,
)
def test_bad_indexes_of_shards(model, content):
    (model / "generator/x.safetensors.index.json").write_text(json.dumps(content))
    with pytest.raises(UserError):
        read_checkpoint(model / "generator")


LOADERS = {
    "transformer": lambda model: model.load_transformer(CausalWanModel),
    "vae": ModelDirectory.load_vae,
    "text_encoder": ModelDirectory.load_text_encoder,
}


@pytest.mark.parametrize("kind", ["missing", "folder", "empty", "binary", "words", "number", "list", "deep"])
@pytest.mark.parametrize(
    ("part", "file"),
    [
        ("transformer", "transformer/config.json"),
        ("transformer", "transformer/diffusion_pytorch_model.safetensors"),
        ("vae", "vae/config.json"),
        ("vae", "vae/diffusion_pytorch_model.safetensors"),
        ("text_encoder", "text_encoder/config.json"),
        ("text_encoder", "text_encoder/model.safetensors"),
        ("text_encoder", "tokenizer/tokenizer_config.json"),
    ],
)
def test_bad_files_of_a_model_folder(tmp_path, model, part, file, kind):
    (model / file).unlink()
    made = bad_file(tmp_path, kind)
    if kind != "missing":
        made.rename(model / file)
    with pytest.raises(UserError):
        LOADERS[part](ModelDirectory.open(model))


SIZES = {"transformer": sorted(TRANSFORMER), "vae": sorted(VAE), "text_encoder": sorted(TEXT_ENCODER)}
VALUES = (None, "x", -7, {"a": 1}, 10**9, [[1]])


@pytest.mark.parametrize(("part", "key"), [(part, key) for part, keys in SIZES.items() for key in keys])
def test_every_size_of_a_config_json_refuses_other_values(model, part, key):
    file = model / part / "config.json"
    good = json.loads(file.read_text())
    for value in VALUES:
        if value is None and key == "decoder_base_dim":
            continue  # means base_dim
        file.write_text(json.dumps(good | {key: value}))
        with pytest.raises(UserError, match=r"config\.json|does not|latents_"):
            LOADERS[part](ModelDirectory.open(model))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (-2, "num_layers must be at most 1,000 and not negative, not -2"),
        (1.5, "num_layers must be a whole number, not '1.5'"),
    ],
)
def test_a_wrong_size_is_named_with_its_file(model, value, message):
    file = model / "transformer/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_layers": value}))
    with pytest.raises(UserError, match=f"^{file}: {message}; "):
        LOADERS["transformer"](ModelDirectory.open(model))


def test_a_list_of_other_elements_is_refused(model):
    file = model / "vae/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"dim_mult": ["x", "y"]}))
    with pytest.raises(UserError, match=r"dim_mult must be a list, each a whole number, not \"\['x', 'y'\]\""):
        LOADERS["vae"](ModelDirectory.open(model))


def test_a_text_encoder_without_its_largest_distance_has_the_usual_one(model):
    file = model / "text_encoder/config.json"
    sizes = json.loads(file.read_text())
    sizes.pop("relative_attention_max_distance", None)
    file.write_text(json.dumps(sizes))
    encoder, _ = ModelDirectory.open(model).load_text_encoder()
    assert encoder.config.relative_attention_max_distance == 128


@pytest.mark.parametrize("layers", [10**6, 1001])
def test_a_million_layers_end_at_once(model, layers):
    file = model / "transformer/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_layers": layers}))
    with pytest.raises(UserError, match="num_layers must be at most 1,000"):
        ModelDirectory.open(model).transformer_config()


@pytest.mark.parametrize("shape", [(), (3,), (3, 4), (0, 0, 1, 1, 1)])
def test_weights_of_other_shapes_are_no_transformer(tmp_path, shape):
    from model.weights import infer_transformer_config

    state = {"patch_embedding.weight": torch.zeros(shape)}
    with pytest.raises(UserError, match="not a Wan transformer"):
        infer_transformer_config(state)
