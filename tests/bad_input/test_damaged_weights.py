"""Weights, configurations and tokenizers that load without an error and would spoil every video."""

import json
import shutil
import zipfile
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer, UMT5Config, UMT5EncoderModel

import inference
from model.causal_wan import CausalWanModel
from model.lora import fuse_lora
from model.weight_files import TRANSFORMER_FILE, read_checkpoint
from model.weights import NATIVE_TOKENIZER, ModelDirectory, build_from_state
from scripts import convert_checkpoint
from utils.errors import UserError

TENSOR = "blocks.1.ffn.net.2.weight"
VALUES = {  # of one weight -> fragment of the message
    "NaN": (float("nan"), "NaN or infinity"),
    "infinity": (float("inf"), "NaN or infinity"),
    "minus infinity": (-float("inf"), "NaN or infinity"),
}
TYPES = {
    "int8": (torch.int8, "int8 values"),
    "int64": (torch.int64, "int64 values"),
    "bool": (torch.bool, "bool values"),
    "complex": (torch.complex64, "complex64 values"),
}
DAMAGE = VALUES | TYPES


def damage(tensor: torch.Tensor, kind: str) -> torch.Tensor:
    """Return the tensor as another type, or with another last element."""
    value = DAMAGE[kind][0]
    if isinstance(value, torch.dtype):
        return tensor.to(value)
    tensor = tensor.clone()
    tensor.view(-1)[-1] = value
    return tensor


def write_weights(world, file: Path, kind: str, key: str = "", tensor: str = TENSOR) -> None:
    """Write the generator's weights with one damaged tensor; `key` puts them into a checkpoint of that name."""
    state = load_file(world.model / "generator" / TRANSFORMER_FILE)
    state[tensor] = damage(state[tensor], kind)
    if file.suffix == ".safetensors":
        save_file(state, file)
    else:
        torch.save({key: state} if key else state, file)


def inference_words(world, folder: Path, *words: object) -> tuple[object, ...]:
    always = ("--config_path", world.config, "--prompt", "a red circle", "--output_folder", folder / "out")
    return (*always, *words)


# ---- damaged tensors ----


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pt"])
def test_a_generator_with_damaged_weights_is_refused(world, refuse, tmp_path, kind, name):
    write_weights(world, tmp_path / name, kind)
    words = inference_words(world, tmp_path, "--checkpoint_path", tmp_path / name)
    line = refuse(inference.main, words, DAMAGE[kind][1])
    assert TENSOR in line and name in line


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_moving_average_is_refused(world, refuse, tmp_path, kind):
    write_weights(world, tmp_path / "ema.pt", kind, "generator_ema")
    words = inference_words(world, tmp_path, "--checkpoint_path", tmp_path / "ema.pt", "--use_ema")
    assert TENSOR in refuse(inference.main, words, DAMAGE[kind][1])


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_a_model_folder_with_damaged_weights_is_refused(world, refuse, tmp_path, kind, part):
    shutil.copytree(world.model, tmp_path / "model")
    [file] = (tmp_path / "model" / part).glob("*.safetensors")
    state = load_file(file)
    name = sorted(state)[-1]
    save_file(state | {name: damage(state[name], kind)}, file)
    line = refuse(inference.main, inference_words(world, tmp_path, f"model.base={tmp_path / 'model'}"), DAMAGE[kind][1])
    assert name in line


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("output", ["to.safetensors", "to.pt", "to"])
def test_damaged_weights_are_not_converted(world, refuse, tmp_path, kind, output):
    write_weights(world, tmp_path / "from.safetensors", kind)
    words = ("--input", tmp_path / "from.safetensors", "--output", tmp_path / output, "--to", "diffusers")
    assert TENSOR in refuse(convert_checkpoint.main, (*words, "--num_heads", 2), DAMAGE[kind][1])
    assert not (tmp_path / output).exists()


def test_weights_that_float16_cannot_hold_are_refused(world, refuse, tmp_path):
    state = load_file(world.model / "generator" / TRANSFORMER_FILE)
    state = {name: tensor.float() for name, tensor in state.items()}
    state[TENSOR].view(-1)[0] = 1e6
    save_file(state, tmp_path / "large.safetensors")
    words = inference_words(world, tmp_path, "--checkpoint_path", tmp_path / "large.safetensors", "model.dtype=float16")
    assert TENSOR in refuse(inference.main, words, "NaN or infinity in float16")
    words = ("--input", tmp_path / "large.safetensors", "--output", tmp_path / "to.pt", "--to", "native")
    assert TENSOR in refuse(convert_checkpoint.main, (*words, "--dtype", "fp16"), "NaN or infinity in float16")


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_lora_is_refused(world, tmp_path, kind):
    net = ModelDirectory.open(world.model).load_transformer(CausalWanModel)
    layer = "transformer.blocks.0.attn1.to_q"
    state = {f"{layer}.lora_A.weight": torch.ones(2, 32), f"{layer}.lora_B.weight": torch.ones(32, 2)}
    state[f"{layer}.lora_B.weight"] = damage(state[f"{layer}.lora_B.weight"], kind)
    save_file(state, tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match=DAMAGE[kind][1]) as caught:
        fuse_lora(net, str(tmp_path / "lora.safetensors"))
    assert f"{layer}.lora_B.weight" in str(caught.value)


def test_weights_of_every_floating_type_load(world):
    state = load_file(world.model / "generator" / TRANSFORMER_FILE)
    config = ModelDirectory.open(world.model).transformer_config()
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn):
        stored = {name: tensor.to(dtype) for name, tensor in state.items()}
        build_from_state(partial(CausalWanModel.from_config, config), stored, "stored", torch.float32)


# ---- flipped bytes ----


@pytest.mark.parametrize("position", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_a_torch_file_with_flipped_bytes_is_refused(world, refuse, tmp_path, position):
    file = tmp_path / "flipped.pt"
    torch.save({"generator": load_file(world.model / "generator" / TRANSFORMER_FILE)}, file)
    with zipfile.ZipFile(file) as archive:  # inside the values of a tensor, where torch.load sees nothing
        members = [info for info in archive.infolist() if "/data/" in info.filename and info.file_size > 200]
        info = members[int(position * len(members))]
    content = bytearray(file.read_bytes())
    start = content.index(info.filename.encode(), info.header_offset) + len(info.filename)
    content[start + 100] ^= 0xFF
    file.write_bytes(content)
    words = inference_words(world, tmp_path, "--checkpoint_path", file)
    assert info.filename in refuse(inference.main, words, "does not match its checksum")


def test_an_older_torch_file_has_no_checksums_and_loads(world, tmp_path):
    state = load_file(world.model / "generator" / TRANSFORMER_FILE)
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert read_checkpoint(tmp_path / "old.pt").keys() == state.keys()


# ---- configurations ----

HEADS = {
    "negative": ({"num_attention_heads": -2, "attention_head_dim": -16}, "num_attention_heads must be a positive"),
    "zero": ({"num_attention_heads": 0}, "num_attention_heads must be a positive"),
    "fraction": ({"num_attention_heads": 2.0}, "num_attention_heads must be a positive"),
    "text": ({"num_attention_heads": "2"}, "num_attention_heads must be a positive"),
    "true": ({"num_attention_heads": True, "attention_head_dim": 32}, "num_attention_heads must be a positive"),
    "null": ({"num_attention_heads": None}, "num_attention_heads must be a positive"),
    "negative size": ({"attention_head_dim": -16}, "attention_head_dim must be a positive"),
    "odd size": ({"num_attention_heads": 32, "attention_head_dim": 1}, "attention_head_dim must be even"),
    "another width": ({"num_attention_heads": 3}, "does not fit the network"),
}


@pytest.mark.parametrize("case", HEADS)
@pytest.mark.parametrize("part", ["transformer", "generator"])
def test_impossible_heads_are_refused(world, refuse, tmp_path, case, part):
    shutil.copytree(world.model, tmp_path / "model")
    changes, fragment = HEADS[case]
    change_json(tmp_path / "model" / part / "config.json", **changes)
    words = (f"model.base={tmp_path / 'model'}", f"model.generator={tmp_path / 'model/generator'}")
    if part == "transformer":
        words = (words[0], "model.generator=")
    refuse(inference.main, inference_words(world, tmp_path, *words), fragment)


NATIVE_HEADS = {
    "not dividing": ({"num_heads": 5}, "num_heads 5 does not divide the width dim 32"),
    "negative": ({"num_heads": -2}, "num_heads must be a positive"),
    "zero": ({"num_heads": 0}, "num_heads must be a positive"),
    "fraction": ({"num_heads": 1.5}, "num_heads must be a positive"),
    "text": ({"num_heads": "2"}, "num_heads must be a positive"),
    "null": ({"num_heads": None}, "num_heads must be a positive"),
    "negative width": ({"dim": -32}, "dim must be a positive"),
    "no width": ({"dim": 0}, "dim must be a positive"),
}


@pytest.mark.parametrize("case", NATIVE_HEADS)
def test_impossible_heads_of_wans_own_folder_are_refused(tmp_path, case):
    changes, fragment = NATIVE_HEADS[case]
    config = {"dim": 32, "ffn_dim": 64, "num_heads": 2, "num_layers": 2, "in_dim": 16, "out_dim": 16}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert ModelDirectory.open(tmp_path).transformer_config()["attention_head_dim"] == 16
    change_json(tmp_path / "config.json", **changes)
    with pytest.raises(UserError, match=fragment):
        ModelDirectory.open(tmp_path).transformer_config()


@pytest.mark.parametrize("changes", [{"num_heads": -2, "d_kv": -8}, {"num_heads": 0}, {"d_kv": "8"}, {"d_kv": None}])
def test_impossible_heads_of_the_text_encoder_are_refused(world, refuse, tmp_path, changes):
    shutil.copytree(world.model, tmp_path / "model")
    change_json(tmp_path / "model/text_encoder/config.json", **changes)
    words = inference_words(world, tmp_path, f"model.base={tmp_path / 'model'}")
    refuse(inference.main, words, "must be a positive whole number")


STATISTICS = {
    "a deviation of 0": ("latents_std", [1.0] * 15 + [0], "positive numbers, not 0"),
    "a negative deviation": ("latents_std", [-1.0] * 16, "positive numbers, not -1.0"),
    "a deviation of NaN": ("latents_std", [float("nan")] * 16, "positive numbers, not nan"),
    "an infinite deviation": ("latents_std", [float("inf")] * 16, "positive numbers, not inf"),
    "a deviation of text": ("latents_std", ["1"] * 16, "positive numbers, not '1'"),
    "a deviation of null": ("latents_std", [None] * 16, "positive numbers, not None"),
    "a deviation of true": ("latents_std", [True] * 16, "positive numbers, not True"),
    "one deviation": ("latents_std", [1.0], "a list of 16 numbers, one per channel, not 1 values"),
    "17 deviations": ("latents_std", [1.0] * 17, "a list of 16 numbers, one per channel, not 17 values"),
    "a number": ("latents_std", 1.0, "a list of 16 numbers, one per channel, not 1.0"),
    "null": ("latents_std", None, "a list of 16 numbers, one per channel, not None"),
    "a mean of NaN": ("latents_mean", [float("nan")] * 16, "finite numbers, not nan"),
    "an infinite mean": ("latents_mean", [-float("inf")] * 16, "finite numbers, not -inf"),
    "no means": ("latents_mean", [], "a list of 16 numbers, one per channel, not 0 values"),
}


@pytest.mark.parametrize("case", STATISTICS)
def test_impossible_statistics_of_the_latents_are_refused(world, refuse, tmp_path, case):
    name, value, fragment = STATISTICS[case]
    shutil.copytree(world.model, tmp_path / "model")
    change_json(tmp_path / "model/vae/config.json", **{name: value})
    words = inference_words(world, tmp_path, f"model.base={tmp_path / 'model'}")
    assert name in refuse(inference.main, words, fragment)


# ---- classes ----


@pytest.mark.parametrize("name", ["AutoencoderKL", "AutoencoderKLHunyuanVideo", "WanTransformer3DModel"])
def test_a_vae_of_another_class_is_refused(world, refuse, tmp_path, name):
    shutil.copytree(world.model, tmp_path / "model")
    change_json(tmp_path / "model/vae/config.json", _class_name=name)
    words = inference_words(world, tmp_path, f"model.base={tmp_path / 'model'}")
    refuse(inference.main, words, f"describes a {name}, not a AutoencoderKLWan")


@pytest.mark.parametrize("name", ["CLIPTokenizer", "T5TokenizerFast", "BertTokenizer", "GPT2Tokenizer"])
def test_a_tokenizer_of_another_class_is_refused(world, refuse, tmp_path, name):
    shutil.copytree(world.model, tmp_path / "model")
    change_json(tmp_path / "model/tokenizer/tokenizer_config.json", tokenizer_class=name)
    words = inference_words(world, tmp_path, f"model.base={tmp_path / 'model'}")
    refuse(inference.main, words, f"holds a {name}, but the model needs a ByT5Tokenizer")


def test_wans_own_folder_needs_a_tokenizer_of_t5(tmp_path):
    (tmp_path / NATIVE_TOKENIZER).mkdir(parents=True)
    directory = ModelDirectory(tmp_path, "native")
    file = tmp_path / NATIVE_TOKENIZER / "tokenizer_config.json"
    for name in ("T5Tokenizer", "T5TokenizerFast"):
        file.write_text(json.dumps({"tokenizer_class": name}))
        directory._check_tokenizer_class(file.parent)
    file.write_text(json.dumps({"tokenizer_class": CLIPTokenizer.__name__}))
    with pytest.raises(UserError, match="holds a CLIPTokenizer, but the model needs a T5Tokenizer or ByT5Tokenizer"):
        directory._check_tokenizer_class(file.parent)


def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused(world, refuse, tmp_path):
    shutil.copytree(world.model, tmp_path / "model")
    sizes = dict(vocab_size=300, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    UMT5EncoderModel(UMT5Config(**sizes)).save_pretrained(tmp_path / "model/text_encoder")
    words = inference_words(world, tmp_path, f"model.base={tmp_path / 'model'}")
    refuse(inference.main, words, "has 384 tokens, but the text encoder has 300 embeddings")


def change_json(file: Path, **changes: object) -> None:
    """Change entries of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
