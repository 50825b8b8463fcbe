"""Names of weights: tables that map public naming schemes to each other, and the renaming of state dicts.

In this repository, state dicts of a Wan transformer have the names of diffusers' `WanTransformer3DModel`. Wan's own
code, and the models trained with it (CausVid, Self-Forcing, HiAR), name the same tensors differently.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from torch import Tensor

State = dict[str, Tensor]
Layout = Literal["diffusers", "native", "generator"]

# Wan's own names -> diffusers' names. `#` stands for the index of the layer; a trailing .weight or .bias stays. The
# norms are easily confused: Wan numbers them in order of creation, diffusers in order of use. No diffusers name is also
# Wan's name of another tensor, so translating twice changes nothing.
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

# Wan's copy of the UMT5 encoder -> transformers' UMT5EncoderModel. Every layer has its own position bias.
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

# Parts that wrappers (FSDP, activation checkpointing, torch.compile, DDP, ComfyUI) add to names. No name in the tables
# above contains any of them.
WRAPPERS = {
    *("model", "module", "generator", "generator_ema", "diffusion_model"),
    *("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod", "_forward_module"),
}

_LAYER = re.compile(r"\bblocks?\.(\d+)\b")


def rename(state: Mapping[str, Tensor], names: Mapping[str, str]) -> State:
    """Translate a state dict's names by a table such as `DIT_NAMES`; names that are not in the table stay."""
    return {_rename(name, names): tensor for name, tensor in state.items()}


def inverse(names: Mapping[str, str]) -> dict[str, str]:
    """Return the table of names for the opposite direction."""
    return {new: old for old, new in names.items()}


def without_wrappers(name: str) -> str:
    """Return a name without the parts that training wrappers add."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def num_layers(names: Iterable[str]) -> int:
    """Return the number of different layer indices in the names."""
    return len({layer[1] for name in names if (layer := _LAYER.search(name))})


def export_state(state: Mapping[str, Tensor], layout: Layout) -> dict[str, Any]:
    """Return our transformer's state dict in a public layout.

    Args:
        layout: `diffusers` keeps the names; `native` gives Wan's own; `generator` gives the format that HiAR,
            Self-Forcing and CausVid load: {"generator": {"model." + Wan's own name: tensor}}, for `torch.save`.
    """
    if layout == "diffusers":
        return dict(state)
    native: dict[str, Any] = dict(rename(state, inverse(DIT_NAMES)))
    return native if layout == "native" else {"generator": {f"model.{name}": t for name, t in native.items()}}


def join_names(names: Iterable[str], limit: int = 3) -> str:
    """Return the first `limit` names, separated by commas, for messages."""
    names = list(names)
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")


def _rename(name: str, names: Mapping[str, str]) -> str:
    stem, leaf = (name[: m.start()], m[0]) if (m := re.search(r"\.(weight|bias)$", name)) else (name, "")
    layer = _LAYER.search(stem)
    if layer:
        stem = f"{stem[: layer.start(1)]}#{stem[layer.end(1) :]}"
    new = names.get(stem)
    return name if new is None else new.replace("#", layer[1] if layer else "") + leaf
