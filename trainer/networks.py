"""Builds the networks that training updates: loaded or new, compiled, checkpointed and sharded."""

import contextlib
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model import presets
from model.causal_wan import CausalWanModel
from model.weights import ModelDirectory, save_transformer
from pipeline.build import choose_attention_backend
from trainer.sharding import shard
from utils.config import Config
from utils.device import DTYPES
from utils.errors import UserError


def build_transformer(config: Config, device: torch.device) -> CausalWanModel:
    """The DiT to train: `train.init`'s weights, or a preset's random ones; prepared as `prepare` does."""
    torch.manual_seed(config.runtime.seed)
    if config.train.init:
        directory = ModelDirectory.open(config.model.base)
        net = directory.load_transformer(CausalWanModel, torch.float32, weights=config.train.init)
    else:
        net = CausalWanModel(**preset(presets.TRANSFORMERS, config))
        net.init_weights()
    return prepare(net, config, device)


def prepare(net: CausalWanModel, config: Config, device: torch.device) -> CausalWanModel:
    """Put a DiT on its device, compiled, checkpointed and sharded as `config.train` says."""
    train = config.train
    if train.sharding == "replicate":
        net.to(device)
    net.train()
    net.gradient_checkpointing = train.activation_checkpointing
    choose_attention_backend(net, config.model.attention_backend)
    if train.compile:
        net.compile_layers()
    shard(net, train, device)
    return net


def compute_in(config: Config, device: torch.device) -> AbstractContextManager:
    """The context in which networks compute in `train.dtype`; sharded ones are cast as they are gathered instead."""
    train = config.train
    if train.sharding != "replicate" or train.dtype == "float32":
        return contextlib.nullcontext()
    # Without its cache: a weight that was cast without autograd would be taken where autograd needs it.
    return torch.autocast(device.type, DTYPES[train.dtype], cache_enabled=False)


def preset(table: dict[str, dict[str, Any]], config: Config) -> dict[str, Any]:
    """The sizes that `config.train.network` names.

    Raises:
        UserError: if there are none of this name.
    """
    name = config.train.network
    if name not in table:
        raise UserError(
            f"train.network={name!r} is no preset of {config.train.objective}; choose from {', '.join(table)}"
        )
    return table[name]


def export_transformer(net: CausalWanModel, folder: Path, weights: dict[str, Tensor]) -> None:
    """Write weights in the layout of diffusers' `WanTransformer3DModel`, in bfloat16."""
    state = {name: weight.to("cpu", torch.bfloat16) for name, weight in weights.items()}
    save_transformer(folder, state, {k: v for k, v in net.config.items() if not k.startswith("_")})
