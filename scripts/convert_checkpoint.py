"""Rewrite a transformer's weights in another layout: ours is diffusers', HiAR and Self-Forcing read `generator`.

    python scripts/convert_checkpoint.py --input ckpts/hiar.pt --use_ema --output hiar-diffusers --to diffusers
    python scripts/convert_checkpoint.py --input hiar-diffusers --output hiar.pt --to generator --dtype bf16

The input is any transformer that model/weights.py reads. The output's suffix chooses its format: .safetensors, or .pt
or .pth for a torch file; without a suffix it is a folder (config.json and weights) that diffusers can open.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from model.weight_files import read_checkpoint, save_transformer, save_weights
from model.weight_names import export_state
from model.weights import infer_transformer_config
from utils.errors import UserError, command

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "keep": None}
TORCH_SUFFIXES = (".pt", ".pth")


def convert(
    source: Path, output: Path, layout: str, use_ema: bool = False, dtype: str = "keep", num_heads: int | None = None
) -> str:
    """Read `source`, write `output`; returns one line that says what was written.

    Raises:
        UserError: unreadable input, or a layout that the output's format cannot hold.
    """
    formats = {"diffusers": ("", ".safetensors", *TORCH_SUFFIXES), "native": (".safetensors", *TORCH_SUFFIXES)}
    allowed = formats.get(layout, TORCH_SUFFIXES)
    suffix = folder_or_suffix(output)
    to_folder = suffix == ""
    if suffix not in allowed:
        names = ", ".join(suffix or "no suffix (a folder)" for suffix in allowed)
        raise UserError(f"--to {layout} cannot be written as {output.name}; end --output with one of: {names}")

    state = read_checkpoint(source, use_ema)
    config = folder_config(source, state, num_heads) if to_folder else {}
    target = DTYPES[dtype]
    if target is not None:
        state = {name: tensor.to(target) if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    content = export_state(state, layout)  # type: ignore[arg-type]

    shape = ""
    if to_folder:
        save_transformer(output, content, config)
        shape = (
            f"{config['num_layers']} layers, {config['num_attention_heads']} heads of {config['attention_head_dim']}, "
        )
    else:
        save_weights(output, content)
    return f"wrote {output} ({layout}: {shape}{len(state)} tensors, {sum(t.numel() for t in state.values()):,} weights)"


def folder_config(source: Path, state: dict[str, torch.Tensor], num_heads: int | None) -> dict[str, Any]:
    """The configuration to write beside weights: the source folder's own if it has one, else what the shapes tell."""
    for file in (source / "config.json", source / "transformer" / "config.json"):
        if file.is_file():
            config = json.loads(file.read_text())
            if "num_attention_heads" in config:
                return {name: value for name, value in config.items() if not name.startswith("_")}
    return infer_transformer_config(state, num_heads)


def folder_or_suffix(path: Path) -> str:
    """What decides about a file's format; empty for a folder, which may be called wan-1.3b."""
    return "" if path.suffix[1:2].isdigit() else path.suffix


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, required=True, help="checkpoint file, weights folder or model folder")
    parser.add_argument("--output", type=Path, required=True, help="file to write, or folder (no suffix)")
    parser.add_argument("--to", choices=("diffusers", "native", "generator"), required=True, help="layout to write")
    parser.add_argument("--use_ema", action="store_true", help="take the checkpoint's moving average")
    parser.add_argument("--dtype", choices=DTYPES, default="keep", help="cast the weights (default: as stored)")
    parser.add_argument("--num_heads", type=int, help="for a folder: attention heads, if not of 128 channels each")
    args = parser.parse_args()
    print(convert(args.input, args.output, args.to, args.use_ema, args.dtype, args.num_heads))


if __name__ == "__main__":
    main()
