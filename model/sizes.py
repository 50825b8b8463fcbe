"""Sizes of networks from configuration files, without loading weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from model import presets
from model.weights import ModelDirectory
from utils.errors import UserError
from utils.files import read_json

Module = TypeVar("Module", bound=nn.Module)


def base_config(base: str) -> dict:
    """Return the configuration of a model directory's DiT. If it is not downloaded, its name selects a preset.

    Raises:
        UserError: if the directory cannot be read and its name contains no known size.
    """
    try:
        return ModelDirectory.open(base).transformer_config()
    except UserError:
        for size, name in (("1.3b", "wan-1.3b"), ("14b", "wan-14b")):
            if size in base.lower():
                return presets.TRANSFORMERS[name]
        raise


def component_config(folder: Path) -> dict[str, Any]:
    """Return the config.json of a component of a model directory; {} if there is none, as in Wan's native layout."""
    file = folder / "config.json"
    return read_json(file, "model configuration") if file.is_file() else {}


def text_encoder_preset(text_dim: int, base: Path) -> dict[str, Any]:
    """Return the configuration of the text encoder with this embedding width.

    Raises:
        UserError: if no preset has this width.
    """
    for sizes in presets.TEXT_ENCODERS.values():
        if sizes["d_model"] == text_dim:
            return sizes
    raise UserError(f"{base} has no text_encoder/config.json, and no known text encoder has the width {text_dim}")


def width(net: dict) -> int:
    """Return a DiT's width D."""
    return net["num_attention_heads"] * net["attention_head_dim"]


def on_meta(build: Callable[[], Module]) -> Module:
    """Build a network on the meta device, which allocates no memory."""
    with torch.device("meta"):
        return build()


def num_parameters(net: nn.Module) -> int:
    """Return the number of parameters of a network. Shared parameters count once."""
    return sum(p.numel() for p in net.parameters())
