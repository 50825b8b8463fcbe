"""Write a complete tiny model with random weights in diffusers' layout."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from transformers import ByT5Tokenizer, UMT5Config, UMT5EncoderModel

from model import presets
from model.causal_wan import CausalWanModel
from trainer.datasets.clips import open_clips
from trainer.networks import export_transformer

ROOT = Path(__file__).resolve().parents[1]

TRANSFORMER: dict[str, Any] = dict(
    num_attention_heads=2, attention_head_dim=16, ffn_dim=32, num_layers=2, text_dim=16, freq_dim=32
)
VAE: dict[str, Any] = presets.VAES["shapes"] | dict(base_dim=4, decoder_base_dim=4)
TINY_DECODER: dict[str, Any] = dict(widths=(8, 4, 4, 4))
TEXT_ENCODER: dict[str, Any] = dict(
    vocab_size=384, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0
)


def write_model(folder: Path) -> Path:
    """Write a complete model and return its folder. `transformer/` and `generator/` have different weights."""
    write_model_index(folder)
    torch.manual_seed(0)
    AutoencoderKLWan(**VAE).save_pretrained(folder / "vae")
    UMT5EncoderModel(UMT5Config(**TEXT_ENCODER)).save_pretrained(folder / "text_encoder")
    ByT5Tokenizer().save_pretrained(folder / "tokenizer")
    for part in ("transformer", "generator"):
        net = CausalWanModel(**TRANSFORMER)
        export_transformer(net, folder / part, net.state_dict())
    return folder


def write_model_index(folder: Path) -> None:
    """Copy the untrained files of a model folder from the shipped miniature."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / "data/shapes-wan/model_index.json", folder)
    shutil.copytree(ROOT / "data/shapes-wan/scheduler", folder / "scheduler", dirs_exist_ok=True)


def write_config(file: Path, model: Path, **sections: dict[str, Any]) -> Path:
    """Write a configuration of 32x32 videos with the model in folder `model`; return its path."""
    config: dict[str, Any] = {
        "model": {"base": str(model), "generator": str(model / "generator"), "text_length": 24, "dtype": "float32"},
        "teacher": {"negative_prompt": "", "guidance_scale": 3.0},
        "video": {"height": 32, "width": 32, "num_output_frames": 9},
        "runtime": {"device": "cpu", "seed": 7},
    }
    for name, keys in sections.items():
        config.setdefault(name, {}).update(keys)
    file.write_text(json.dumps(config))
    return file


def all_clips(folder: str) -> tuple[torch.Tensor, list[str]]:
    """Return all clips [N, F, C, h, w] of a folder, and their captions."""
    clips = open_clips(folder)
    return clips.read(range(len(clips.captions))), clips.captions
