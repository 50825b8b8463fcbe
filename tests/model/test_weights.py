"""model/weights.py: every layout gives the same names and values; what cannot be read says so in a line."""

import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import ByT5Tokenizer, UMT5Config, UMT5EncoderModel

from model.weight_files import TRANSFORMER_FILE, read_checkpoint
from model.weight_names import DIT_NAMES, UMT5_NAMES, WRAPPERS, State, export_state, inverse, rename
from model.weights import (
    NATIVE_TEXT_ENCODER,
    NATIVE_TOKENIZER,
    NATIVE_VAE,
    TEXT_ENCODER_FILES,
    VAE_FILES,
    ModelDirectory,
    aligned,
    infer_transformer_config,
    infer_umt5_config,
    load_into,
)
from utils.errors import UserError
from utils.files import fingerprint

CONFIG = dict(
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
TEXT_CONFIG = dict(vocab_size=259, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=3)


def tiny_dit(seed: int = 0, **changes) -> WanTransformer3DModel:
    torch.manual_seed(seed)
    return randomized(WanTransformer3DModel(**CONFIG | changes))


def randomized(net: nn.Module) -> nn.Module:
    """Norms start as ones and biases as zeros: give every tensor values of its own, so that no swap goes unseen."""
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.5)
    return net.eval()


@pytest.fixture(scope="module")
def dit() -> WanTransformer3DModel:
    return tiny_dit()


@pytest.fixture(scope="module")
def state(dit) -> State:
    return dit.state_dict()


@pytest.fixture(scope="module")
def native(state) -> State:
    return export_state(state, "native")


def assert_same(actual: State, expected: State) -> None:
    assert set(actual) == set(expected)
    assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []


# ---- names ----


def test_dit_names_agree_with_diffusers(state, native):
    assert_same(convert_wan_transformer_to_diffusers(dict(native)), state)
    assert_same(rename(native, DIT_NAMES), state)


def test_dit_names_cover_the_network_and_translate_once(state, native):
    assert not {name for name in native if "to_q" in name or "net." in name or "condition_embedder" in name}
    assert {"head.modulation", "head.head.bias", "blocks.1.modulation", "blocks.1.norm3.bias"} <= native.keys()
    assert_same(rename(state, DIT_NAMES), state)  # idempotent, so layouts need not be told apart
    assert len(inverse(DIT_NAMES)) == len(DIT_NAMES)


def test_wrappers_are_no_part_of_a_name(state, native):
    text = [*UMT5_NAMES, *UMT5_NAMES.values()]
    assert WRAPPERS.isdisjoint(part for name in [*state, *native, *text] for part in name.split("."))


@pytest.mark.parametrize("index", [9, 10, 39])
def test_block_indices_survive(index):
    name = f"blocks.{index}.ffn.0.weight"
    assert list(rename({name: torch.zeros(1)}, DIT_NAMES)) == [f"blocks.{index}.ffn.net.0.proj.weight"]


def test_generator_layout(state, native):
    generator = export_state(state, "generator")["generator"]
    assert_same({name.removeprefix("model."): tensor for name, tensor in generator.items()}, native)


# ---- checkpoints ----


def wrap(state: State, pattern: str) -> State:
    """Rename by the pattern: {} is the whole name, {head} and {tail} its parts around the block index."""
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
def test_prefixes(tmp_path, state, pattern, names):
    torch.save({"generator": wrap(export_state(state, names), pattern)}, tmp_path / "model.pt")
    assert_same(read_checkpoint(tmp_path / "model.pt"), state)


@pytest.mark.parametrize("key", ["generator", "model", "state_dict", None])
@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files(tmp_path, state, native, key, zipped):
    content = native if key is None else {key: native, "critic": {"x": torch.zeros(1)}, "step": 600}
    torch.save(content, tmp_path / "model.pt", _use_new_zipfile_serialization=zipped)
    assert_same(read_checkpoint(tmp_path / "model.pt"), state)


def test_safetensors_file(tmp_path, state, native):
    save_file({f"model.{name}": tensor for name, tensor in native.items()}, tmp_path / "wan.safetensors")
    assert_same(read_checkpoint(tmp_path / "wan.safetensors"), state)


def test_moving_average_is_chosen(tmp_path, state):
    ema = tiny_dit(1).state_dict()
    generator = export_state(state, "generator")
    torch.save(generator | {"generator_ema": export_state(ema, "generator")["generator"]}, tmp_path / "hiar.pt")
    assert_same(read_checkpoint(tmp_path / "hiar.pt"), state)
    assert_same(read_checkpoint(tmp_path / "hiar.pt", use_ema=True), ema)


@pytest.mark.parametrize(
    ("content", "use_ema", "words"),
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
def test_wrong_contents(tmp_path, content, use_ema, words):
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(UserError, match=words):
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
def test_cut_off_files(tmp_path, native, name, part):
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
def test_other_files(tmp_path, content, suffix):
    (tmp_path / f"x{suffix}").write_bytes(content)
    with pytest.raises(UserError, match="cut off or not a checkpoint"):
        read_checkpoint(tmp_path / f"x{suffix}")


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("run-by-the-pickle",)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_refused(tmp_path, monkeypatch, zipped):
    monkeypatch.chdir(tmp_path)
    torch.save({"generator": Malicious()}, "evil.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"refused: reading it could run code .*mkdir"):
        read_checkpoint("evil.pt")
    assert not Path("run-by-the-pickle").exists()


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
def test_training_never_writes_to_the_mapped_file(tmp_path, dit, state, name):
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


def test_load_into_a_net_without_memory(state):
    with init_empty_weights():
        net = WanTransformer3DModel(**CONFIG)
    load_into(net, state, "test")
    assert_same(net.state_dict(), state)
    assert net.proj_out.weight.data_ptr() == state["proj_out.weight"].data_ptr()
    assert all(parameter.requires_grad for parameter in net.parameters())


@pytest.mark.parametrize("name", ["model.pt", "old.pt", "model.safetensors"])
def test_loaded_weights_start_at_multiples_of_64_bytes(tmp_path, state, name):
    """On some CPUs unaligned matrices give other last bits, so mapped tensors are copied to aligned memory."""
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
    ("change", "words"),
    [
        ({"num_attention_heads": 4, "num_layers": 3}, "it has 3 layers of width 48, the network 2 layers of width 24"),
        ({"num_layers": 1}, "it has 1 layers.*the network 2 layers.*27 missing .blocks.1.scale_shift_table, .*, ...."),
        ({"num_layers": 3}, "it has 3 layers.*27 unexpected .blocks.2."),
        ({"text_dim": 8}, "1 of another shape .condition_embedder.text_embedder.linear_1.weight"),
        ({"added_kv_proj_dim": 24, "image_dim": 8}, "unexpected"),
    ],
)
@pytest.mark.parametrize("meta", [True, False])
def test_another_architecture_changes_nothing(change, words, meta):
    with torch.device("meta" if meta else "cpu"):
        net = WanTransformer3DModel(**CONFIG)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with pytest.raises(UserError, match=words) as error:
        load_into(net, tiny_dit(1, **change).state_dict(), "other.pt")
    assert "\n" not in str(error.value) and len(str(error.value)) < 600
    assert all(tensor.is_meta for tensor in net.state_dict().values()) if meta else True
    if not meta:
        assert_same(net.state_dict(), before)


def test_transformer_config_from_shapes(dit, state):
    assert infer_transformer_config(state, num_heads=2) == CONFIG
    with pytest.raises(UserError, match=r"width of 24 does not split into Wan's heads of 128.*--num_heads"):
        infer_transformer_config(state)
    with pytest.raises(UserError, match="does not split into 5 heads"):
        infer_transformer_config(state, num_heads=5)
    with pytest.raises(UserError, match="not a Wan transformer's weights"):
        infer_transformer_config({"a": torch.zeros(1)})


# ---- text encoder ----


def wan_text_encoder(state: State, ids: Tensor, heads: int, num_layers: int) -> Tensor:
    """Wan's UMT5 encoder on its own names, from the T5 papers: pre-norm, unscaled attention with a bias per layer.

    Args:
        ids: [B, L]; the result is [B, L, C]
    """

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * state[f"{name}.weight"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ state[f"{name}.weight"].T

    def split(x: Tensor) -> Tensor:
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)

    def bucket(distance: int, half: int = 16, furthest: int = 128) -> int:
        """Half of the buckets for keys ahead; in each half, half for exact distances and half for logarithmic ones."""
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


def tiny_text_encoder() -> UMT5EncoderModel:
    torch.manual_seed(2)
    return randomized(UMT5EncoderModel(UMT5Config(**TEXT_CONFIG)))


def native_text_state(encoder: UMT5EncoderModel) -> State:
    state = rename(encoder.state_dict(), inverse(UMT5_NAMES))
    del state["encoder.embed_tokens.weight"]
    return state


def test_text_encoder_equals_wans(tmp_path):
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


# ---- model folders ----


def native_vae_state(vae: AutoencoderKLWan) -> State:
    """Wan's own names of the VAE: the inverse of what diffusers' single-file loader does."""
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


def tiny_vae() -> AutoencoderKLWan:
    torch.manual_seed(3)
    return randomized(AutoencoderKLWan(base_dim=4))


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


def test_dtype_as_diffusers_does_it(model, diffusers_folder):
    net = model.load_transformer(WanTransformer3DModel, torch.bfloat16)
    expected = WanTransformer3DModel.from_pretrained(diffusers_folder / "transformer", torch_dtype=torch.bfloat16)
    assert {name: p.dtype for name, p in net.named_parameters()} == {
        name: p.dtype for name, p in expected.named_parameters()
    }
    assert_same(net.state_dict(), expected.state_dict())


def test_generator_checkpoint_for_a_folder(tmp_path, model, diffusers_folder):
    expected = tiny_dit(1).state_dict()
    torch.save({"generator_ema": export_state(expected, "generator")["generator"]}, tmp_path / "ema.pt")
    net = model.load_transformer(WanTransformer3DModel, weights=tmp_path / "ema.pt", use_ema=True)
    assert_same(net.state_dict(), expected)
    net = model.load_transformer(WanTransformer3DModel, weights=str(diffusers_folder / "generator"))
    assert_same(net.state_dict(), expected)
    torch.save(tiny_dit(1, num_layers=3).state_dict(), tmp_path / "deep.pt")
    with pytest.raises(UserError, match=r"deep.pt does not fit the network: it has 3 layers"):
        model.load_transformer(WanTransformer3DModel, weights=tmp_path / "deep.pt")


def test_subfolder(diffusers_folder):
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
def test_files_tell_one_model_from_another(model, tmp_path, kind):
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


def test_a_broken_native_folder(tmp_path, native_folder):
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


def test_what_is_not_a_model_folder(tmp_path):
    with pytest.raises(UserError, match=r"does not exist.*download_weights.py"):
        ModelDirectory.open(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"is not a model folder.*download_weights.py"):
        ModelDirectory.open(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="is not a model folder"):
        ModelDirectory.open(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json is not a valid model file.*download the model folder again"):
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
