"""Other people's weights: their names, files and folders, read into ours.

Inside this repository a Wan transformer's state dict has the names of diffusers' `WanTransformer3DModel`. Wan's own
code, and what was trained with it (CausVid, Self-Forcing, HiAR), uses other names for the same tensors; the tables
below say which. No hub is asked, and no file gets to run code: pickles are read as plain tensors or refused.
"""

import json
import math
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeGuard, TypeVar

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLWan
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from diffusers.models.modeling_utils import no_init_weights
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, UMT5Config, UMT5EncoderModel

from utils.errors import UserError
from utils.files import atomic_path, writable_folder, write_json

State = dict[str, Tensor]
Layout = Literal["diffusers", "native", "generator"]
Net = TypeVar("Net", bound=nn.Module)

WAN_HEAD_DIM = 128  # every published Wan2.1 transformer

# Wan's own names -> diffusers' names. `#` is the index of the block; a trailing .weight or .bias is carried over. Mind
# the norms: Wan counts them in order of creation, diffusers in order of use. No name on the right is also a different
# name on the left, so translating twice changes nothing.
DIT_NAMES = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "blocks.#.modulation": "blocks.#.scale_shift_table",
    "blocks.#.self_attn.q": "blocks.#.attn1.to_q",
    "blocks.#.self_attn.k": "blocks.#.attn1.to_k",
    "blocks.#.self_attn.v": "blocks.#.attn1.to_v",
    "blocks.#.self_attn.o": "blocks.#.attn1.to_out.0",
    "blocks.#.self_attn.norm_q": "blocks.#.attn1.norm_q",
    "blocks.#.self_attn.norm_k": "blocks.#.attn1.norm_k",
    "blocks.#.norm3": "blocks.#.norm2",
    "blocks.#.cross_attn.q": "blocks.#.attn2.to_q",
    "blocks.#.cross_attn.k": "blocks.#.attn2.to_k",
    "blocks.#.cross_attn.v": "blocks.#.attn2.to_v",
    "blocks.#.cross_attn.o": "blocks.#.attn2.to_out.0",
    "blocks.#.cross_attn.norm_q": "blocks.#.attn2.norm_q",
    "blocks.#.cross_attn.norm_k": "blocks.#.attn2.norm_k",
    "blocks.#.ffn.0": "blocks.#.ffn.net.0.proj",
    "blocks.#.ffn.2": "blocks.#.ffn.net.2",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
}

# Wan's copy of the UMT5 encoder -> transformers' UMT5EncoderModel. Every block has its own position bias.
UMT5_NAMES = {
    "token_embedding": "shared",
    "blocks.#.norm1": "encoder.block.#.layer.0.layer_norm",
    "blocks.#.attn.q": "encoder.block.#.layer.0.SelfAttention.q",
    "blocks.#.attn.k": "encoder.block.#.layer.0.SelfAttention.k",
    "blocks.#.attn.v": "encoder.block.#.layer.0.SelfAttention.v",
    "blocks.#.attn.o": "encoder.block.#.layer.0.SelfAttention.o",
    "blocks.#.pos_embedding.embedding": "encoder.block.#.layer.0.SelfAttention.relative_attention_bias",
    "blocks.#.norm2": "encoder.block.#.layer.1.layer_norm",
    "blocks.#.ffn.gate.0": "encoder.block.#.layer.1.DenseReluDense.wi_0",
    "blocks.#.ffn.fc1": "encoder.block.#.layer.1.DenseReluDense.wi_1",
    "blocks.#.ffn.fc2": "encoder.block.#.layer.1.DenseReluDense.wo",
    "norm": "encoder.final_layer_norm",
}

# Parts of a name that training wrappers (FSDP, activation checkpointing, torch.compile, DDP, ComfyUI) put before or
# between the parts of the net's own name. None of them is a part of any name above.
WRAPPERS = {
    *("model", "module", "generator", "generator_ema", "diffusion_model"),
    *("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod", "_forward_module"),
}

TRANSFORMER_FILE = "diffusion_pytorch_model.safetensors"
NATIVE_TEXT_ENCODER = "models_t5_umt5-xxl-enc-bf16.pth"
NATIVE_TOKENIZER = "google/umt5-xxl"
NATIVE_VAE = "Wan2.1_VAE.pth"
# All that a DiT, a VAE, or an embedding depends on, in either layout of a model directory.
TRANSFORMER_FILES = ("transformer/*", "*.safetensors", "*.json")
VAE_FILES = ("vae/*", NATIVE_VAE)
TEXT_ENCODER_FILES = (
    *("text_encoder/*", "tokenizer/*.json", "tokenizer/*.model"),
    *(NATIVE_TEXT_ENCODER, f"{NATIVE_TOKENIZER}/*.json", f"{NATIVE_TOKENIZER}/*.model"),
)

# Wan's own config.json -> diffusers' words, and what it leaves out.
NATIVE_CONFIG = {
    "dim": "dim",
    "num_heads": "num_attention_heads",
    "num_layers": "num_layers",
    "ffn_dim": "ffn_dim",
    "freq_dim": "freq_dim",
    "text_dim": "text_dim",
    "in_dim": "in_channels",
    "out_dim": "out_channels",
    "eps": "eps",
}
NATIVE_DEFAULTS: dict[str, Any] = {
    **dict(patch_size=(1, 2, 2), in_channels=16, out_channels=16, text_dim=4096, freq_dim=256),
    **dict(cross_attn_norm=True, qk_norm="rms_norm_across_heads", eps=1e-6),
}

_BLOCK = re.compile(r"\bblocks?\.(\d+)\b")
_WIDTH = "patch_embedding.bias"  # [width]
_TO_DOWNLOAD = "see python scripts/download_weights.py --list"
# What torch.load and safetensors raise when a file is not what it should be; found by feeding them mutilated files.
_UNREADABLE = (
    *(RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, EOFError, OSError),
    *(pickle.UnpicklingError, struct.error, zipfile.BadZipFile, SafetensorError),
)


# ---- names ----


def rename(state: Mapping[str, Tensor], names: Mapping[str, str]) -> State:
    """Translate a state dict's names by a table such as `DIT_NAMES`; names that are not in the table stay."""
    return {_rename(name, names): tensor for name, tensor in state.items()}


def inverse(names: Mapping[str, str]) -> dict[str, str]:
    """The same table the other way round."""
    return {new: old for old, new in names.items()}


def _rename(name: str, names: Mapping[str, str]) -> str:
    stem, leaf = (name[: m.start()], m[0]) if (m := re.search(r"\.(weight|bias)$", name)) else (name, "")
    block = _BLOCK.search(stem)
    if block:
        stem = f"{stem[: block.start(1)]}#{stem[block.end(1) :]}"
    new = names.get(stem)
    return name if new is None else new.replace("#", block[1] if block else "") + leaf


def export_state(state: Mapping[str, Tensor], layout: Layout) -> dict[str, Any]:
    """Our transformer's state dict in the names that others read.

    Returns:
        `diffusers`: as it is; `native`: Wan's own names; `generator`: what HiAR, Self-Forcing and CausVid load,
        {"generator": {"model." + Wan's own name: tensor}}, to be written with `torch.save`.
    """
    if layout == "diffusers":
        return dict(state)
    native: dict[str, Any] = dict(rename(state, inverse(DIT_NAMES)))
    return native if layout == "native" else {"generator": {f"model.{name}": t for name, t in native.items()}}


# ---- files ----


def read_checkpoint(path: str | Path, use_ema: bool = False) -> State:
    """Read a transformer's weights from a file or folder of any layout we know, under diffusers' names.

    Known are the checkpoints of HiAR, Self-Forcing and CausVid (a dict with `generator`, `generator_ema` or `model`),
    bare state dicts in Wan's or diffusers' names, `.safetensors` or torch files, and folders with one such file or with
    shards and their index. Tensors stay on the CPU, as stored; they are mapped from the file where it allows that.

    Args:
        path: the file or folder; of a whole model folder the transformer is taken.
        use_ema: take `generator_ema`, the moving average of the trained weights, instead of `generator`.
    Raises:
        UserError: nothing there, unreadable, cut off, unsafe to read, no checkpoint, or not with the weights asked for.
    """
    state = _read_state(Path(path), use_ema)
    own = {name: ".".join(part for part in name.split(".") if part not in WRAPPERS) for name in state}
    if len(set(own.values())) < len(own):
        raise UserError(f"{path} holds the same weights more than once under different prefixes; keep one of them")
    return rename({own[name]: tensor for name, tensor in state.items()}, DIT_NAMES)


def _read_state(path: Path, use_ema: bool = False) -> State:
    """The one state dict to use of what a file or folder holds, under its own names. Raises as `read_checkpoint`."""
    content = _read(path)
    if _is_state(content) and not use_ema:
        return content
    wanted = ("generator_ema",) if use_ema else ("generator", "model", "state_dict")
    state = next((content[name] for name in wanted if name in content), None)
    if _is_state(state):
        return dict(state)
    held = "one unnamed set of weights" if _is_state(content) else _some(map(str, content), 9) or "nothing"
    advice = "add --use_ema" if "generator_ema" in content else "choose another file"
    if use_ema:
        advice = "leave out --use_ema"
    raise UserError(f"{path} has no {' or '.join(wanted)} weights, it holds {held}; {advice}")


def _is_state(content: Any) -> TypeGuard[State]:
    if not isinstance(content, dict) or not content:
        return False
    return all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in content.items())


def _read(path: Path) -> dict[str, Any]:
    """The content, as stored, of a weights file, or of the weights file or shards in a folder."""
    if not path.is_dir():
        return _read_file(path)
    if (path / "model_index.json").is_file():
        return _read(path / "transformer")
    for index in sorted(path.glob("*.safetensors.index.json")):
        shards = sorted(set(_read_json(index).get("weight_map", {}).values()))
        return {name: tensor for shard in shards for name, tensor in _read_file(path / shard).items()}
    files = [file for file in (path / TRANSFORMER_FILE, path / "model.safetensors") if file.is_file()]
    files = files or sorted(path.glob("*.safetensors"))
    files = files or [file for file in sorted(path.iterdir()) if file.suffix in (".pt", ".pth", ".bin")]
    if len(files) == 1:
        return _read_file(files[0])
    held = f"several weights files ({_some(file.name for file in files)})" if files else "no *.safetensors or *.pt"
    raise UserError(f"folder {path} holds {held}; name the folder or file with the weights")


def _read_file(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"weights {path} do not exist; check the path, or {_TO_DOWNLOAD}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # Only the zip format of torch.save can be mapped; its older format is read in one go.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except _UNREADABLE as error:
        if code := re.search(r"GLOBAL (\S+)", str(error)):
            raise UserError(
                f"{path} is refused: reading it could run code ({code[1]}); only plain tensors are read, "
                "so get a file with nothing but weights, best as .safetensors"
            ) from None
        raise UserError(f"{path} is cut off or not a checkpoint; copy or download it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a checkpoint: it holds a {type(content).__name__}; choose another file")
    return content


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"cannot read {path} ({error}); copy or download the model folder again") from None


# ---- networks ----


def load_into(net: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Give `net` all of its weights from `state`, or change nothing.

    Values are cast to the dtypes of the net. A net on the meta device takes over the tensors of `state` where no cast
    is needed, so nothing is held twice.

    Args:
        source: where the state came from, for messages.
    Raises:
        UserError: a name is missing, unexpected, or has another shape.
    """
    wanted = net.state_dict()
    problems = {
        "missing": [name for name in wanted if name not in state],
        "unexpected": [name for name in state if name not in wanted],
        "of another shape": [name for name in wanted if name in state and state[name].shape != wanted[name].shape],
    }
    if any(problems.values()):
        found = "; ".join(f"{len(names)} {kind} ({_some(names)})" for kind, names in problems.items() if names)
        theirs, ours = _size(state), _size(wanted)
        sizes = f": it has {theirs}, the network {ours}" if theirs != ours else ""
        raise UserError(
            f"{source} does not fit the network{sizes}; take weights of the same architecture. Names: {found}"
        )
    on_meta = any(tensor.is_meta for tensor in wanted.values())
    if on_meta:
        state = {name: aligned(state[name].to(tensor.dtype)) for name, tensor in wanted.items()}
    net.load_state_dict(dict(state), assign=on_meta)


def aligned(tensor: Tensor) -> Tensor:
    """Return a CPU tensor whose memory starts at a multiple of 64 bytes; other tensors are returned as they are.

    Tensors mapped from a file start anywhere. On some CPUs, MKL and oneDNN choose another kernel for such matrices and
    round the last bits differently, so the same weights would give other videos before and after saving.
    """
    if tensor.device.type != "cpu" or tensor.data_ptr() % 64 == 0:
        return tensor
    return tensor.clone()  # torch allocates CPU memory in multiples of 64 bytes


def align_weights_(net: nn.Module) -> None:
    """Move all parameters and buffers of a network on the CPU to aligned memory; see `aligned`."""
    for tensor in (*net.parameters(), *net.buffers()):
        tensor.data = aligned(tensor.data)


def build(
    make: Callable[[], Net], state: State, source: Path | str, dtype: torch.dtype | None, fp32: Collection[str] = ()
) -> Net:
    """Make a net that takes no memory and load `state` into it, in evaluation mode as `from_pretrained` does.

    Weights become `dtype` (None: as stored), those of modules named in `fp32` float32. `source` is where `state` came
    from, for messages.
    """
    with no_init_weights(), init_empty_weights():
        net = make()
    for name, parameter in net.named_parameters():
        in_fp32 = dtype and not set(fp32).isdisjoint(name.split("."))
        parameter.data = parameter.data.to(torch.float32 if in_fp32 else dtype or state.get(name, parameter).dtype)
    load_into(net, state, str(source))
    return net.eval()


def transformer_config(state: State, num_heads: int | None = None) -> dict[str, Any]:
    """Infer the constructor's arguments of a Wan transformer from its state dict (diffusers' names).

    Args:
        num_heads: shapes do not tell it; None means heads of 128 channels, as in every published Wan2.1.
    Raises:
        UserError: not a Wan transformer, or its width does not split into such heads.
    """
    try:
        dim, in_channels, *patch = state["patch_embedding.weight"].shape
        config = dict(
            patch_size=tuple(patch),
            in_channels=in_channels,
            out_channels=state["proj_out.weight"].shape[0] // math.prod(patch),
            text_dim=state["condition_embedder.text_embedder.linear_1.weight"].shape[1],
            freq_dim=state["condition_embedder.time_embedder.linear_1.weight"].shape[1],
            ffn_dim=state["blocks.0.ffn.net.0.proj.weight"].shape[0],
        )
    except KeyError as error:
        raise UserError(f"these are not a Wan transformer's weights: {error} is missing; choose another file") from None
    if dim % (num_heads or WAN_HEAD_DIM):
        heads = f"{num_heads} heads" if num_heads else f"Wan's heads of {WAN_HEAD_DIM}"
        raise UserError(f"a width of {dim} does not split into {heads}; give the right --num_heads")
    num_heads = num_heads or dim // WAN_HEAD_DIM
    norm = "blocks.0.norm2.weight" in state
    rest = dict(num_layers=_num_blocks(state), cross_attn_norm=norm, qk_norm="rms_norm_across_heads", eps=1e-6)
    return dict(num_attention_heads=num_heads, attention_head_dim=dim // num_heads) | config | rest


def umt5_config(state: State) -> UMT5Config:
    """Infer a UMT5 encoder's configuration from its state dict (transformers' names).

    Raises:
        UserError: not a UMT5 encoder.
    """
    attention = "encoder.block.0.layer.0.SelfAttention"
    try:
        vocabulary, width = state["shared.weight"].shape
        buckets, heads = state[f"{attention}.relative_attention_bias.weight"].shape
        return UMT5Config(
            vocab_size=vocabulary,
            d_model=width,
            d_kv=state[f"{attention}.q.weight"].shape[0] // heads,
            d_ff=state["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"].shape[0],
            num_layers=_num_blocks(state),
            num_heads=heads,
            relative_attention_num_buckets=buckets,
        )
    except KeyError as error:
        raise UserError(f"these are not a UMT5 encoder's weights: {error} is missing; choose another file") from None


def _num_blocks(names: Iterable[str]) -> int:
    return len({block[1] for name in names if (block := _BLOCK.search(name))})


def _size(state: Mapping[str, Tensor]) -> str:
    return f"{_num_blocks(state)} layers" + (f" of width {len(state[_WIDTH])}" if _WIDTH in state else "")


def _some(names: Iterable[str], limit: int = 3) -> str:
    names = list(names)
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")


# ---- model folders ----


@dataclass(frozen=True)
class ModelDirectory:
    """A whole model on disk: transformer, text encoder with tokenizer, VAE. Made by `ModelDirectory.open`.

    Every loader takes the dtype of the weights (None: as stored) and raises a `UserError` as `read_checkpoint` and
    `load_into` do.
    """

    path: Path
    layout: Literal["diffusers", "native"]

    @classmethod
    def open(cls, path: str | Path) -> "ModelDirectory":
        """Find out which layout the folder `path` has: diffusers' (model_index.json) or Wan's own (config.json).

        Raises:
            UserError: neither.
        """
        path = Path(path)
        if not path.is_dir():
            raise UserError(f"model folder {path} does not exist; check the path, or {_TO_DOWNLOAD}")
        if (path / "model_index.json").is_file():
            return cls(path, "diffusers")
        if (path / "config.json").is_file() and {"dim", "ffn_dim", "num_heads"} <= _read_json(
            path / "config.json"
        ).keys():
            return cls(path, "native")
        raise UserError(
            f"{path} is not a model folder: it has neither diffusers' model_index.json nor Wan's own config.json; "
            f"check the path, or {_TO_DOWNLOAD}"
        )

    def transformer_config(self, subfolder: str = "transformer") -> dict[str, Any]:
        """The constructor's arguments of the transformer, in diffusers' words.

        Raises:
            UserError: unreadable, or an image-to-video transformer.
        """
        file = self.path / subfolder / "config.json" if self.layout == "diffusers" else self.path / "config.json"
        config = {name: value for name, value in _read_json(file).items() if not name.startswith("_")}
        if self.layout == "native":
            config = NATIVE_DEFAULTS | {NATIVE_CONFIG[name]: v for name, v in config.items() if name in NATIVE_CONFIG}
            config["attention_head_dim"] = config.pop("dim") // config["num_attention_heads"]
        more_channels = config.get("in_channels") != (config.get("out_channels") or config.get("in_channels"))
        if more_channels or config.get("image_dim") is not None or config.get("added_kv_proj_dim") is not None:
            raise UserError(f"{file} describes an image-to-video transformer; choose a text-to-video (T2V) model")
        return config

    def load_transformer(
        self,
        net_class: type[Net],
        dtype: torch.dtype | None = None,
        subfolder: str = "transformer",
        weights: str | Path | None = None,
        use_ema: bool = False,
    ) -> Net:
        """A `net_class` with this folder's configuration and weights, which are never held twice.

        Args:
            net_class: a diffusers model class with the arguments and names of `WanTransformer3DModel`. Its
                `_keep_in_fp32_modules` stay in float32 whatever the dtype, as in diffusers.
            subfolder: of a folder in diffusers' layout.
            weights: a checkpoint to load instead of the folder's own weights, and `use_ema` of it: `read_checkpoint`.
                A folder with a config.json has its own size.
        """
        own = Path(weights) / "config.json" if weights else None
        config = _read_json(own) if own is not None and own.is_file() else self.transformer_config(subfolder)
        source = Path(weights or (self.path / subfolder if self.layout == "diffusers" else self.path))
        state = read_checkpoint(source, use_ema)
        fp32 = getattr(net_class, "_keep_in_fp32_modules", None) or ()
        return build(lambda: net_class.from_config(config), state, source, dtype, fp32)  # type: ignore[attr-defined]

    def load_text_encoder(self, dtype: torch.dtype | None = None) -> tuple[UMT5EncoderModel, PreTrainedTokenizerBase]:
        """The text encoder and its tokenizer, of whichever kind its tokenizer_config.json names."""
        if self.layout == "diffusers":
            source, tokens = self.path / "text_encoder", self.path / "tokenizer"
            state, config = _read_state(source), UMT5Config.from_dict(_read_json(source / "config.json"))
        else:
            source, tokens = self.path / NATIVE_TEXT_ENCODER, self.path / NATIVE_TOKENIZER
            state = rename(_read_state(source), UMT5_NAMES)
            config = umt5_config(state)
        shared = state.get("shared.weight", state.get("encoder.embed_tokens.weight"))
        if shared is not None:  # one tensor that the model knows by two names; a file may have either or both
            state |= {"shared.weight": shared, "encoder.embed_tokens.weight": shared}
        # As in transformers: `wo` overflows in float16, and only then is it kept in float32.
        fp32 = ("wo",) if dtype == torch.float16 else ()
        encoder = build(lambda: UMT5EncoderModel(config), state, source, dtype, fp32)
        encoder.set_input_embeddings(encoder.shared)
        try:
            return encoder, AutoTokenizer.from_pretrained(tokens, local_files_only=True)
        except (OSError, ValueError) as error:
            raise UserError(f"cannot load the tokenizer in {tokens} ({error}); copy or download it again") from None

    def load_vae(self, dtype: torch.dtype | None = None) -> AutoencoderKLWan:
        """The video VAE. Wan's own file has no configuration: it is Wan2.1's, with the width that the shapes tell."""
        if self.layout == "diffusers":
            source = self.path / "vae"
            state, config = _read_state(source), _read_json(source / "config.json")
        else:
            source = self.path / NATIVE_VAE
            state = convert_wan_vae_to_diffusers(_read_state(source))
            config = {"base_dim": len(state["encoder.conv_in.bias"])} if "encoder.conv_in.bias" in state else {}
        return build(lambda: AutoencoderKLWan.from_config(config), state, source, dtype)


# ---- Writing ----


def save_weights(path: Path, content: dict[str, Any]) -> None:
    """Write weights as safetensors or for torch.load, by the path's suffix; atomic."""
    writable_folder(path.parent)
    with atomic_path(path) as file:
        if path.suffix == ".safetensors":
            save_file({name: tensor.contiguous() for name, tensor in content.items()}, file, metadata={"format": "pt"})
        else:
            torch.save(content, file)


def save_transformer(folder: Path, state: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Write a transformer as diffusers keeps it: weights and config.json."""
    save_weights(folder / TRANSFORMER_FILE, state)
    write_json(folder / "config.json", {"_class_name": "WanTransformer3DModel", **config})
