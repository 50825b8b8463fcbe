"""Conversion of a transformer's weights between three layouts: diffusers', Wan's, and that of HiAR and Self-Forcing."""

from pathlib import Path
from typing import Any, get_args

import torch

from model.weight_checks import check_weights
from model.weight_files import read_checkpoint, save_transformer, save_weights
from model.weight_names import Layout, State, export_state
from model.weights import infer_transformer_config
from utils.errors import UserError
from utils.files import read_json

LAYOUTS = get_args(Layout)
EXPORT_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "keep": None}
TORCH_SUFFIXES = (".pt", ".pth")
_SUFFIXES = {
    "diffusers": ("", ".safetensors", *TORCH_SUFFIXES),
    "native": (".safetensors", *TORCH_SUFFIXES),
    "generator": TORCH_SUFFIXES,
}
"""File suffixes that can hold each layout; an empty suffix is a folder."""


def weights_suffix(path: Path) -> str:
    """Return the suffix of a weight file, or an empty string for a folder; the dot in wan-1.3b starts no suffix."""
    return "" if path.suffix[1:2].isdigit() else path.suffix


def convert_checkpoint(
    source: Path,
    output: Path,
    layout: Layout,
    use_ema: bool = False,
    dtype: str = "keep",
    num_heads: int | None = None,
) -> str:
    """Convert the weights in `source` to another layout, write them to `output`, and return a one-line summary.

    Args:
        source: checkpoint file, weights folder or model folder.
        output: file or folder; its suffix must fit the layout.
        layout: from LAYOUTS.
        use_ema: read the EMA weights of a checkpoint that holds both.
        dtype: from EXPORT_DTYPES; `keep` keeps the stored dtype.
        num_heads: number of attention heads, if heads do not have 128 channels. Only for an output folder.

    Raises:
        UserError: if the input is unreadable, or the suffix of `output` does not fit the layout.
    """
    suffix = weights_suffix(output)
    if suffix not in _SUFFIXES[layout]:
        names = ", ".join(suffix or "no suffix (a folder)" for suffix in _SUFFIXES[layout])
        raise UserError(f"--to {layout} cannot be written as {output.name}; end --output with one of: {names}")

    state = read_checkpoint(source, use_ema)
    check_weights(state, source)
    config = {} if suffix else _folder_config(source, state, num_heads)
    target = EXPORT_DTYPES[dtype]
    if target is not None:
        state = {name: tensor.to(target) for name, tensor in state.items()}
        check_weights(state, f"{source} in {dtype}")  # fp16 ends at 65504
    content = export_state(state, layout)
    sizes = ""
    if suffix:
        save_weights(output, content)
    else:
        save_transformer(output, content, config)
        heads, head_dim = config["num_attention_heads"], config["attention_head_dim"]
        sizes = f"{config['num_layers']} layers, {heads} heads of {head_dim}, "
    return f"wrote {output} ({layout}: {sizes}{len(state)} tensors, {sum(t.numel() for t in state.values()):,} weights)"


def _folder_config(source: Path, state: State, num_heads: int | None) -> dict[str, Any]:
    """Return the configuration in the source folder, or else infer it from the shapes of the weights."""
    for file in (source / "config.json", source / "transformer" / "config.json"):
        if file.is_file():
            config = read_json(file, "configuration of a transformer")
            if "num_attention_heads" in config:
                return {name: value for name, value in config.items() if not name.startswith("_")}
    return infer_transformer_config(state, num_heads)
