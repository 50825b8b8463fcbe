"""Builds the DiTs of a training run: weights, activation checkpointing, compilation, sharding. Also exports them."""

import contextlib
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model import presets
from model.causal_wan import CausalWanModel
from model.weight_files import save_transformer
from model.weights import ModelDirectory
from pipeline.build import choose_attention_backend
from trainer.sharding import shard_transformer
from utils.config import Config
from utils.device import DTYPES
from utils.errors import UserError


def build_transformer(config: Config, device: torch.device) -> CausalWanModel:
    """Return the DiT to train, in float32.

    Its weights are those of `train.init`, else random ones of preset `train.network`, else those of `model.base`.
    """
    torch.manual_seed(config.runtime.seed)
    if config.train.init or not config.train.network:
        directory = ModelDirectory.open(config.model.base)
        net = directory.load_transformer(CausalWanModel, torch.float32, weights=config.train.init or None)
    else:
        net = CausalWanModel(**preset(presets.TRANSFORMERS, config))
        net.init_weights()
    return prepare_transformer(net, config, device)


def prepare_transformer(net: CausalWanModel, config: Config, device: torch.device) -> CausalWanModel:
    """Apply the `train` section to a DiT: device, activation checkpointing, attention backend, compile, sharding."""
    train = config.train
    if train.sharding == "replicate":
        net.to(device)
    net.train()
    net.gradient_checkpointing = train.activation_checkpointing
    choose_attention_backend(net, config.model.attention_backend, device, DTYPES[train.dtype])
    if train.compile:
        net.compile_layers()
    shard_transformer(net, train, device)
    return net


def mixed_precision(config: Config, device: torch.device) -> AbstractContextManager:
    """Return the context in which replicated networks compute in `train.dtype`. FSDP2 casts sharded ones itself."""
    train = config.train
    if train.sharding != "replicate" or train.dtype == "float32":
        return contextlib.nullcontext()
    # The autocast cache would reuse weights that were cast under no_grad in passes that need their gradient.
    return torch.autocast(device.type, DTYPES[train.dtype], cache_enabled=False)


def preset(table: dict[str, dict[str, Any]], config: Config) -> dict[str, Any]:
    """Return the network sizes that `train.network` names.

    Raises:
        UserError: if the table has no such name.
    """
    name = config.train.network
    if name not in table:
        raise UserError(
            f"train.network={name!r} is not a preset for {config.train.objective}; choose from {', '.join(table)}"
        )
    return table[name]


def export_transformer(net: CausalWanModel, folder: Path, weights: dict[str, Tensor]) -> None:
    """Write weights in the layout of diffusers' `WanTransformer3DModel`, in bfloat16."""
    state = {name: weight.to("cpu", torch.bfloat16) for name, weight in weights.items()}
    save_transformer(folder, state, {k: v for k, v in net.config.items() if not k.startswith("_")})
