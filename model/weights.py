"""Networks from weights: loads state dicts, infers sizes, and opens whole model folders."""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from diffusers.models.modeling_utils import no_init_weights
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, UMT5Config, UMT5EncoderModel

from model.config_checks import (
    check_sizes,
    check_text_positions,
    check_vae_sizes,
    class_defaults,
    describes_network,
)
from model.weight_checks import (
    check_class,
    check_floating_point,
    check_heads,
    check_latent_statistics,
    check_text_heads,
    check_tokenizer_class,
    check_vocabulary,
    check_weights,
    head_dim,
    is_finite,
)
from model.weight_files import HOW_TO_DOWNLOAD, read_checkpoint, read_model_json, read_state
from model.weight_names import UMT5_NAMES, State, join_names, num_layers, rename
from utils.download_manifest import check_loaded
from utils.errors import UserError

Net = TypeVar("Net", bound=nn.Module)

WAN_HEAD_DIM = 128  # of every published Wan2.1 transformer

NATIVE_TEXT_ENCODER = "models_t5_umt5-xxl-enc-bf16.pth"
NATIVE_TOKENIZER = "google/umt5-xxl"
NATIVE_VAE = "Wan2.1_VAE.pth"
TOKENIZERS = ("T5Tokenizer", "ByT5Tokenizer")  # of model folders that name no class
# All files that a DiT, a VAE or an embedding depends on, in either layout of a model folder.
TRANSFORMER_FILES = ("transformer/*", "*.safetensors", "*.json")
VAE_FILES = ("vae/*", NATIVE_VAE)
TEXT_ENCODER_FILES = (
    *("text_encoder/*", "tokenizer/*.json", "tokenizer/*.model"),
    *(NATIVE_TEXT_ENCODER, f"{NATIVE_TOKENIZER}/*.json", f"{NATIVE_TOKENIZER}/*.model"),
)

# Keys of Wan's own config.json -> diffusers' keys, and the values of keys that this file lacks.
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

_WIDTH = "patch_embedding.bias"  # [D]


# ---- state dicts into networks ----


def load_into(net: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load all weights of `net` from `state`, or change nothing.

    Values are cast to the network's dtypes. A network on the meta device shares the tensors of `state` that are already
    of the right dtype and aligned.

    Args:
        source: origin of the weights, for error messages.

    Raises:
        UserError: if a name is missing or unexpected, or has another shape, or a weight is not a finite number.
    """
    expected = net.state_dict()
    problems = {
        "missing": [name for name in expected if name not in state],
        "unexpected": [name for name in state if name not in expected],
        "of another shape": [n for n, tensor in expected.items() if n in state and state[n].shape != tensor.shape],
    }
    if any(problems.values()):
        found = "; ".join(f"{len(names)} {kind} ({join_names(names)})" for kind, names in problems.items() if names)
        theirs, ours = _size(state), _size(expected)
        sizes = f": it has {theirs}, the network {ours}" if theirs != ours else ""
        raise UserError(
            f"{source} does not fit the network{sizes}; use weights of the same architecture. Names: {found}"
        )
    check_floating_point(state, source)
    on_meta = any(tensor.is_meta for tensor in expected.values())
    stored = state
    if on_meta:
        state = {name: aligned(stored[name].to(tensor.dtype)) for name, tensor in expected.items()}
    if not all(is_finite(tensor) for tensor in state.values()):  # a cast keeps NaN, and can overflow to infinity
        check_weights(stored, source)
        check_weights(state, source)
    net.load_state_dict(dict(state), assign=on_meta)


def aligned(tensor: Tensor) -> Tensor:
    """Return a CPU tensor in memory that starts at a multiple of 64 bytes; tensors on other devices are unchanged.

    Tensors mapped from a file can start at any address. On some CPUs, MKL and oneDNN then choose another kernel that
    rounds the last bits differently. The same weights would give different videos before and after saving.
    """
    if tensor.device.type != "cpu" or tensor.data_ptr() % 64 == 0:
        return tensor
    return tensor.clone()  # torch allocates CPU memory in multiples of 64 bytes


def align_weights_(net: nn.Module) -> None:
    """Move all parameters and buffers of a network on the CPU to aligned memory; see `aligned`."""
    for tensor in (*net.parameters(), *net.buffers()):
        tensor.data = aligned(tensor.data)


def build_from_state(
    build: Callable[[], Net], state: State, source: Path | str, dtype: torch.dtype | None, fp32: Collection[str] = ()
) -> Net:
    """Build a network without allocating its weights and load `state` into it; return it in evaluation mode.

    Args:
        build: builds the network.
        source: origin of the weights, for error messages.
        dtype: of the weights; None: as stored.
        fp32: names of modules with float32 weights, whatever the dtype.

    Raises:
        UserError: as in `load_into`.
    """
    with no_init_weights(), init_empty_weights():
        net = build()
    for name, parameter in net.named_parameters():
        in_fp32 = dtype and not set(fp32).isdisjoint(name.split("."))
        stored = state.get(name, parameter).dtype
        stored = stored if stored.is_floating_point else parameter.dtype  # an error when it is loaded
        parameter.data = parameter.data.to(torch.float32 if in_fp32 else dtype or stored)
    load_into(net, state, str(source))
    return net.eval()


# ---- sizes from shapes ----


def infer_transformer_config(state: State, num_heads: int | None = None) -> dict[str, Any]:
    """Infer the constructor arguments of a Wan transformer from its state dict (diffusers' names).

    Args:
        num_heads: number of attention heads, which the shapes do not determine. None: heads of 128 channels, as in
            every published Wan2.1.

    Raises:
        UserError: if these are not the weights of a Wan transformer, or the width does not divide into the heads.
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
    except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
        raise UserError(f"these are not a Wan transformer's weights: {error} is missing; choose another file") from None
    if dim % (num_heads or WAN_HEAD_DIM):
        heads = f"{num_heads} heads" if num_heads else f"Wan's heads of {WAN_HEAD_DIM}"
        raise UserError(f"a width of {dim} does not split into {heads}; give the right --num_heads")
    num_heads = num_heads or dim // WAN_HEAD_DIM
    norm = "blocks.0.norm2.weight" in state
    rest = dict(num_layers=num_layers(state), cross_attn_norm=norm, qk_norm="rms_norm_across_heads", eps=1e-6)
    return dict(num_attention_heads=num_heads, attention_head_dim=dim // num_heads) | config | rest


def infer_umt5_config(state: State) -> UMT5Config:
    """Infer the configuration of a UMT5 encoder from its state dict (transformers' names).

    Raises:
        UserError: if these are not the weights of a UMT5 encoder.
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
            num_layers=num_layers(state),
            num_heads=heads,
            relative_attention_num_buckets=buckets,
        )
    except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
        raise UserError(f"these are not a UMT5 encoder's weights: {error} is missing; choose another file") from None


def _size(state: Mapping[str, Tensor]) -> str:
    return f"{num_layers(state)} layers" + (f" of width {len(state[_WIDTH])}" if _WIDTH in state else "")


def check_transformer_config(config: Mapping[str, Any], file: Path) -> None:
    """Check the constructor arguments of a transformer, under diffusers' names.

    Raises:
        UserError: if they belong to another kind of network or to image-to-video, or if a value is impossible.
    """
    kind = str(config.get("_class_name") or config.get("architectures") or "")
    if kind.startswith("Autoencoder") or "architectures" in config:
        raise UserError(f"{file} describes {kind}, not a transformer; choose the folder or file of a transformer")
    check_heads(config, file)
    check_sizes(config, class_defaults(WanTransformer3DModel), file)
    more_channels = config.get("in_channels") != (config.get("out_channels") or config.get("in_channels"))
    if more_channels or config.get("image_dim") is not None or config.get("added_kv_proj_dim") is not None:
        raise UserError(f"{file} describes an image-to-video transformer; choose a text-to-video (T2V) model")
    patch = config.get("patch_size", (1, 2, 2))
    if len(patch) != 3 or min(patch) < 1 or max(patch) > 64:
        raise UserError(f"{file}: patch_size must be three sizes from 1 to 64, not {list(patch)}")


# ---- model folders ----


@dataclass(frozen=True)
class ModelDirectory:
    """A whole model on disk: transformer, text encoder with tokenizer, and VAE. Use `ModelDirectory.open` to create it.

    The argument `dtype` of each loader is that of the weights; None: as stored. The loaders raise `UserError` as
    `read_checkpoint` and `load_into` do.
    """

    path: Path
    layout: Literal["diffusers", "native"]

    @classmethod
    def open(cls, path: str | Path) -> "ModelDirectory":
        """Open a folder in diffusers' layout (model_index.json) or in Wan's own (config.json).

        Raises:
            UserError: if the folder has neither layout, or differs from the manifest of its download.
        """
        path = Path(path)
        if not path.is_dir():
            raise UserError(f"model folder {path} does not exist; check the path, or {HOW_TO_DOWNLOAD}")
        check_loaded(path)
        if (path / "model_index.json").is_file():
            return cls(path, "diffusers")
        config = path / "config.json"
        if config.is_file() and {"dim", "ffn_dim", "num_heads"} <= read_model_json(config).keys():
            return cls(path, "native")
        raise UserError(
            f"{path} is not a model folder: it has neither diffusers' model_index.json nor Wan's own config.json; "
            f"check the path, or {HOW_TO_DOWNLOAD}"
        )

    def transformer_config(self, subfolder: str = "transformer") -> dict[str, Any]:
        """Return the constructor arguments of the transformer, under diffusers' names.

        Raises:
            UserError: if the file is unreadable or describes an image-to-video transformer.
        """
        file = self.path / subfolder / "config.json" if self.layout == "diffusers" else self.path / "config.json"
        config = {name: value for name, value in read_model_json(file).items() if not name.startswith("_")}
        if self.layout == "native":
            config = NATIVE_DEFAULTS | {NATIVE_CONFIG[name]: v for name, v in config.items() if name in NATIVE_CONFIG}
            config["attention_head_dim"] = head_dim(config.pop("dim"), config["num_attention_heads"], file)
        check_transformer_config(config, file)
        return config

    def load_transformer(
        self,
        net_class: type[Net],
        dtype: torch.dtype | None = None,
        subfolder: str = "transformer",
        weights: str | Path | None = None,
        use_ema: bool = False,
    ) -> Net:
        """Load a transformer with this folder's configuration and weights.

        Args:
            net_class: a diffusers model class with the arguments and names of `WanTransformer3DModel`. As in diffusers,
                its `_keep_in_fp32_modules` stay in float32, whatever the dtype.
            subfolder: subfolder of the transformer in diffusers' layout.
            weights: a checkpoint to load instead of the folder's own weights. If it is a folder with a config.json,
                this file gives the sizes.
            use_ema: load the checkpoint's EMA weights; see `read_checkpoint`.
        """
        own = Path(weights) / "config.json" if weights else None
        if own is not None and own.is_file():
            config = read_model_json(own)
            check_transformer_config(config, own)
        else:
            own, config = None, self.transformer_config(subfolder)
        source = Path(weights or (self.path / subfolder if self.layout == "diffusers" else self.path))
        state = read_checkpoint(source, use_ema)
        fp32 = getattr(net_class, "_keep_in_fp32_modules", None) or ()
        build = partial(net_class.from_config, config)  # type: ignore[attr-defined]
        with describes_network(own or source, "Wan transformer"):
            return build_from_state(build, state, source, dtype, fp32)

    def load_text_encoder(self, dtype: torch.dtype | None = None) -> tuple[UMT5EncoderModel, PreTrainedTokenizerBase]:
        """Load the text encoder and its tokenizer; tokenizer_config.json names the tokenizer's class."""
        if self.layout == "diffusers":
            source, tokens = self.path / "text_encoder", self.path / "tokenizer"
            sizes = read_model_json(source / "config.json")
            check_text_heads(sizes, source / "config.json")
            check_sizes(sizes, UMT5Config().to_dict(), source / "config.json")
            check_text_positions(sizes, source / "config.json")
            state = read_state(source)
            with describes_network(source, "UMT5 encoder"):
                config = UMT5Config.from_dict(sizes)
        else:
            source, tokens = self.path / NATIVE_TEXT_ENCODER, self.path / NATIVE_TOKENIZER
            state = rename(read_state(source), UMT5_NAMES)
            config = infer_umt5_config(state)
        self._check_tokenizer_class(tokens)
        shared = state.get("shared.weight", state.get("encoder.embed_tokens.weight"))
        if shared is not None:  # the model has this tensor under two names; a file may have either or both
            state |= {"shared.weight": shared, "encoder.embed_tokens.weight": shared}
        # As in transformers: `wo` overflows in float16, so only there it stays in float32.
        fp32 = ("wo",) if dtype == torch.float16 else ()
        with describes_network(source, "UMT5 encoder"):
            encoder = build_from_state(lambda: UMT5EncoderModel(config), state, source, dtype, fp32)
        encoder.set_input_embeddings(encoder.shared)
        with describes_network(tokens, "tokenizer"):
            try:
                tokenizer = AutoTokenizer.from_pretrained(tokens, local_files_only=True, trust_remote_code=False)
            except OSError as error:
                raise UserError(f"cannot load the tokenizer in {tokens} ({error}); copy or download it again") from None
        check_vocabulary(tokenizer, len(encoder.shared.weight), tokens)
        return encoder, tokenizer

    def _check_tokenizer_class(self, folder: Path) -> None:
        """Check the tokenizer's class against model_index.json; its absence is reported when it is loaded."""
        expected: tuple[str, ...] = TOKENIZERS
        if self.layout == "diffusers":
            entry = read_model_json(self.path / "model_index.json").get("tokenizer")
            expected = (str(entry[1]),) if isinstance(entry, list) and len(entry) == 2 else expected
        file = folder / "tokenizer_config.json"
        if file.is_file():
            check_tokenizer_class(read_model_json(file), expected, folder)

    def load_vae(self, dtype: torch.dtype | None = None) -> AutoencoderKLWan:
        """Load the VAE. Wan's own file has no configuration; its sizes are Wan2.1's, with the width of the weights."""
        if self.layout == "diffusers":
            source = self.path / "vae"
            state, config = read_state(source), read_model_json(source / "config.json")
            check_class(config, "AutoencoderKLWan", source / "config.json")
            defaults = {k: v for k, v in class_defaults(AutoencoderKLWan).items() if not k.startswith("latents_")}
            check_sizes(config, defaults, source / "config.json")
            check_vae_sizes(config, source / "config.json")
        else:
            source = self.path / NATIVE_VAE
            state = convert_wan_vae_to_diffusers(read_state(source))
            config = {"base_dim": len(state["encoder.conv_in.bias"])} if "encoder.conv_in.bias" in state else {}
        with describes_network(source, "Wan VAE"):
            vae = build_from_state(lambda: AutoencoderKLWan.from_config(config), state, source, dtype)
        check_latent_statistics(vae.config, source)
        return vae
