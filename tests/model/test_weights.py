"""model/weights.py: weights are loaded completely or not at all; model folders of both layouts are read."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import WanTransformer3DModel
from safetensors.torch import save_file
from transformers import ByT5Tokenizer
from weight_samples import (
    CONFIG,
    assert_same,
    native_text_state,
    native_vae_state,
    tiny_dit,
    tiny_text_encoder,
    tiny_vae,
)

from model.weight_files import TRANSFORMER_FILE, read_checkpoint
from model.weight_names import export_state
from model.weights import (
    NATIVE_TEXT_ENCODER,
    NATIVE_TOKENIZER,
    NATIVE_VAE,
    TEXT_ENCODER_FILES,
    VAE_FILES,
    ModelDirectory,
    aligned,
    infer_transformer_config,
    load_into,
)
from utils.errors import UserError
from utils.files import fingerprint

# ---- networks ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_load_into_keeps_the_dtype(state, dtype):
    net = tiny_dit(1)
    for parameter in net.parameters():
        parameter.data = parameter.data.to(dtype)
    addresses = [parameter.data_ptr() for parameter in net.parameters()]
    load_into(net, state, "test")
    assert_same(net.state_dict(), {name: tensor.to(dtype) for name, tensor in state.items()})
    assert addresses == [parameter.data_ptr() for parameter in net.parameters()]


def test_a_network_on_the_meta_device_shares_the_tensors(state):
    with init_empty_weights():
        net = WanTransformer3DModel(**CONFIG)
    load_into(net, state, "test")
    assert_same(net.state_dict(), state)
    assert net.proj_out.weight.data_ptr() == state["proj_out.weight"].data_ptr()
    assert all(parameter.requires_grad for parameter in net.parameters())


@pytest.mark.parametrize("name", ["model.pt", "old.pt", "model.safetensors"])
def test_loaded_weights_start_at_multiples_of_64_bytes(tmp_path, state, name):
    """On some CPUs, unaligned matrices give different last bits, so mapped tensors are copied to aligned memory."""
    file = tmp_path / name
    if file.suffix == ".safetensors":
        save_file(state, file, metadata={"comment": "shifts the data by a few bytes"})
    else:
        torch.save(state, file, _use_new_zipfile_serialization=name != "old.pt")
    with init_empty_weights():
        net = WanTransformer3DModel(**CONFIG)
    load_into(net, read_checkpoint(file), name)
    assert [p.data_ptr() % 64 for p in net.parameters()] == [0] * len(list(net.parameters()))
    assert_same(net.state_dict(), state)


def test_aligned_keeps_values_and_copies_only_when_needed():
    whole = torch.arange(64.0)
    assert aligned(whole).data_ptr() == whole.data_ptr()
    copy = aligned(whole[1:])
    assert copy.data_ptr() % 64 == 0 and torch.equal(copy, whole[1:])
    assert aligned(torch.empty(3, device="meta")).is_meta


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_attention_heads": 4, "num_layers": 3}, "it has 3 layers of width 48, the network 2 layers of width 24"),
        ({"num_layers": 1}, "it has 1 layers.*the network 2 layers.*27 missing .blocks.1.scale_shift_table, .*, ...."),
        ({"num_layers": 3}, "it has 3 layers.*27 unexpected .blocks.2."),
        ({"text_dim": 8}, "1 of another shape .condition_embedder.text_embedder.linear_1.weight"),
        ({"added_kv_proj_dim": 24, "image_dim": 8}, "unexpected"),
    ],
)
@pytest.mark.parametrize("meta", [True, False])
def test_weights_of_another_architecture_change_nothing(change, message, meta):
    with torch.device("meta" if meta else "cpu"):
        net = WanTransformer3DModel(**CONFIG)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with pytest.raises(UserError, match=message) as error:
        load_into(net, tiny_dit(1, **change).state_dict(), "other.pt")
    assert "\n" not in str(error.value) and len(str(error.value)) < 600
    assert all(tensor.is_meta for tensor in net.state_dict().values()) if meta else True
    if not meta:
        assert_same(net.state_dict(), before)


def test_the_transformers_sizes_are_inferred_from_shapes(dit, state):
    assert infer_transformer_config(state, num_heads=2) == CONFIG
    with pytest.raises(UserError, match=r"width of 24 does not split into Wan's heads of 128.*--num_heads"):
        infer_transformer_config(state)
    with pytest.raises(UserError, match="does not split into 5 heads"):
        infer_transformer_config(state, num_heads=5)
    with pytest.raises(UserError, match="not a Wan transformer's weights"):
        infer_transformer_config({"a": torch.zeros(1)})


# ---- model folders ----


@pytest.fixture(scope="module")
def diffusers_folder(tmp_path_factory, dit) -> Path:
    folder = tmp_path_factory.mktemp("diffusers")
    (folder / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    dit.save_pretrained(folder / "transformer")
    tiny_dit(1).save_pretrained(folder / "generator")
    tiny_text_encoder().save_pretrained(folder / "text_encoder")
    ByT5Tokenizer(extra_ids=0).save_pretrained(folder / "tokenizer")
    tiny_vae().save_pretrained(folder / "vae")
    return folder


@pytest.fixture(scope="module")
def native_folder(tmp_path_factory, native) -> Path:
    folder = tmp_path_factory.mktemp("native")
    config = dict(_class_name="WanModel", model_type="t2v", dim=24, ffn_dim=20, freq_dim=8, text_dim=16, text_len=512)
    config |= dict(num_heads=2, num_layers=2, in_dim=4, out_dim=4, eps=1e-6)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(native, folder / TRANSFORMER_FILE)
    torch.save(native_text_state(tiny_text_encoder()), folder / NATIVE_TEXT_ENCODER)
    ByT5Tokenizer(extra_ids=0).save_pretrained(folder / NATIVE_TOKENIZER)
    torch.save(native_vae_state(tiny_vae()), folder / NATIVE_VAE)
    return folder


@pytest.fixture(params=["diffusers", "native"])
def model(request) -> ModelDirectory:
    model = ModelDirectory.open(request.getfixturevalue(f"{request.param}_folder"))
    assert model.layout == request.param
    return model


def test_transformer_of_a_folder(model, dit, state):
    config = model.transformer_config()
    assert {name: config[name] for name in CONFIG} == CONFIG | {"patch_size": config["patch_size"]}
    assert tuple(config["patch_size"]) == CONFIG["patch_size"]
    net = model.load_transformer(WanTransformer3DModel)
    assert_same(net.state_dict(), state)
    assert not net.training and not any(tensor.is_meta for tensor in (*net.parameters(), *net.buffers()))

    x, text = torch.randn(1, 4, 2, 4, 4), torch.randn(1, 5, 16)
    arguments = dict(hidden_states=x, timestep=torch.tensor([500]), encoder_hidden_states=text, return_dict=False)
    with torch.no_grad():
        assert torch.equal(net(**arguments)[0], dit(**arguments)[0])


def test_dtypes_are_those_of_diffusers(model, diffusers_folder):
    net = model.load_transformer(WanTransformer3DModel, torch.bfloat16)
    expected = WanTransformer3DModel.from_pretrained(diffusers_folder / "transformer", torch_dtype=torch.bfloat16)
    assert {name: p.dtype for name, p in net.named_parameters()} == {
        name: p.dtype for name, p in expected.named_parameters()
    }
    assert_same(net.state_dict(), expected.state_dict())


def test_a_checkpoint_replaces_the_folders_own_weights(tmp_path, model, diffusers_folder):
    expected = tiny_dit(1).state_dict()
    torch.save({"generator_ema": export_state(expected, "generator")["generator"]}, tmp_path / "ema.pt")
    net = model.load_transformer(WanTransformer3DModel, weights=tmp_path / "ema.pt", use_ema=True)
    assert_same(net.state_dict(), expected)
    net = model.load_transformer(WanTransformer3DModel, weights=str(diffusers_folder / "generator"))
    assert_same(net.state_dict(), expected)
    torch.save(tiny_dit(1, num_layers=3).state_dict(), tmp_path / "deep.pt")
    with pytest.raises(UserError, match=r"deep.pt does not fit the network: it has 3 layers"):
        model.load_transformer(WanTransformer3DModel, weights=tmp_path / "deep.pt")


def test_a_transformer_in_another_subfolder(diffusers_folder):
    net = ModelDirectory.open(diffusers_folder).load_transformer(WanTransformer3DModel, subfolder="generator")
    assert_same(net.state_dict(), tiny_dit(1).state_dict())
    with pytest.raises(UserError, match=r"cannot read model file .*critic"):
        ModelDirectory.open(diffusers_folder).load_transformer(WanTransformer3DModel, subfolder="critic")


def test_text_encoder_of_a_folder(model):
    encoder, tokenizer = model.load_text_encoder(torch.float32)
    assert isinstance(tokenizer, ByT5Tokenizer)
    tokens = tokenizer(["a red square"], padding="max_length", max_length=20, return_tensors="pt")
    expected = tiny_text_encoder()(**tokens).last_hidden_state
    assert torch.equal(encoder(**tokens).last_hidden_state, expected)
    assert encoder.encoder.embed_tokens.weight is encoder.shared.weight and not encoder.training
    half, _ = model.load_text_encoder(torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    half, _ = model.load_text_encoder(torch.float16)
    assert {name.split(".")[-2] for name, p in half.named_parameters() if p.dtype == torch.float32} == {"wo"}


def test_vae_of_a_folder(model):
    vae = model.load_vae(torch.float32)
    assert_same(vae.state_dict(), tiny_vae().state_dict())
    assert vae.config.base_dim == 4 and len(vae.config.latents_mean) == 16
    assert {parameter.dtype for parameter in model.load_vae(torch.bfloat16).parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("kind", ["VAE", "text encoder", "tokenizer"])
def test_a_changed_file_changes_the_fingerprint(model, tmp_path, kind):
    folder, native = tmp_path / "model", model.layout != "diffusers"
    shutil.copytree(model.path, folder)
    patterns, changed = {
        "VAE": (VAE_FILES, NATIVE_VAE if native else "vae/diffusion_pytorch_model.safetensors"),
        "text encoder": (TEXT_ENCODER_FILES, NATIVE_TEXT_ENCODER if native else "text_encoder/model.safetensors"),
        "tokenizer": (TEXT_ENCODER_FILES, f"{NATIVE_TOKENIZER if native else 'tokenizer'}/tokenizer_config.json"),
    }[kind]
    before = fingerprint(folder, patterns)
    content = bytearray((folder / changed).read_bytes())
    content[-1] ^= 1
    (folder / changed).write_bytes(content)
    assert fingerprint(folder, patterns) != before


def test_broken_files_of_a_native_folder_are_refused(tmp_path, native_folder):
    (tmp_path / "config.json").write_text((native_folder / "config.json").read_text())
    model = ModelDirectory.open(tmp_path)
    with pytest.raises(UserError, match=r"do not exist.*download_weights.py"):
        model.load_text_encoder()
    torch.save({"a": torch.zeros(1)}, tmp_path / NATIVE_TEXT_ENCODER)
    with pytest.raises(UserError, match="not a UMT5 encoder's weights"):
        model.load_text_encoder()
    torch.save({"a": torch.zeros(1)}, tmp_path / NATIVE_VAE)
    with pytest.raises(UserError, match=r"Wan2.1_VAE.pth does not fit"):
        model.load_vae()
    torch.save(native_text_state(tiny_text_encoder()), tmp_path / NATIVE_TEXT_ENCODER)
    with pytest.raises(UserError, match="cannot load the tokenizer"):
        model.load_text_encoder()


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"does not exist.*download_weights.py"):
        ModelDirectory.open(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"is not a model folder.*download_weights.py"):
        ModelDirectory.open(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="is not a model folder"):
        ModelDirectory.open(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json is not a valid model file.*download the model folder again"):
        ModelDirectory.open(tmp_path)


@pytest.mark.parametrize("change", [{"in_channels": 36}, {"image_dim": 1280}, {"added_kv_proj_dim": 24}])
def test_image_to_video_is_refused(tmp_path, change):
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(CONFIG | change))
    with pytest.raises(UserError, match="image-to-video"):
        ModelDirectory.open(tmp_path).transformer_config()


def test_native_image_to_video_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"dim": 24, "ffn_dim": 8, "num_heads": 2, "num_layers": 1, "in_dim": 36}')
    with pytest.raises(UserError, match="image-to-video"):
        ModelDirectory.open(tmp_path).transformer_config()
