"""Checks of model files that load without an error but give wrong results: damaged values, sizes and classes."""

import math
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.errors import UserError

_COPY = "copy or download the file again"


def is_finite(tensor: Tensor) -> bool:
    """Return whether a tensor holds neither NaN nor infinity. On a GPU, the host waits for the result."""
    if not tensor.numel():
        return True
    if tensor.itemsize == 1:  # float8 has no extrema
        tensor = tensor.float()
    # One pass without a temporary tensor, 20 times as fast as isfinite().all(); the extrema of a NaN are NaN.
    low, high = torch.aminmax(tensor.detach())
    return math.isfinite(low) and math.isfinite(high)


def check_weights(state: Mapping[str, Tensor], source: Path | str) -> None:
    """Check that all weights are finite floating-point numbers.

    Args:
        source: origin of the weights, for error messages.

    Raises:
        UserError: for the first tensor with NaN, infinity, or values of another type.
    """
    check_floating_point(state, source)
    for name, tensor in state.items():
        if not is_finite(tensor):
            kind = str(tensor.dtype).removeprefix("torch.")
            raise UserError(f"{source}: tensor {name} holds NaN or infinity in {kind}; {_COPY}, or choose another one")


def check_floating_point(state: Mapping[str, Tensor], source: Path | str) -> None:
    """Check that all weights have a floating-point dtype. Their values are not read.

    Raises:
        UserError: for the first tensor of another dtype.
    """
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            kind = str(tensor.dtype).removeprefix("torch.")
            raise UserError(f"{source}: tensor {name} holds {kind} values, not floating-point weights; {_COPY}")


def check_zip(path: Path) -> None:
    """Check the checksums of all members of a zip file, such as torch.save writes.

    Raises:
        UserError: if a member differs from its checksum.
        zipfile.BadZipFile: if the file is no zip file.
    """
    with zipfile.ZipFile(path) as file:
        damaged = file.testzip()
    if damaged is not None:
        raise UserError(f"{path} is damaged: {damaged} in it does not match its checksum; {_COPY}")


def check_class(config: Mapping[str, Any], expected: str, file: Path) -> None:
    """Check the key `_class_name` of a config.json, if there is one.

    Raises:
        UserError: if the class is not `expected`.
    """
    found = config.get("_class_name", expected)
    if found != expected:
        raise UserError(f"{file} describes a {found}, not a {expected}; choose the folder of a Wan2.1 model")


def check_heads(config: Mapping[str, Any], file: Path) -> None:
    """Check the heads in the configuration of a transformer, under diffusers' names.

    Raises:
        UserError: if their number or size is not positive, or their size is odd; rotary embedding needs even sizes.
    """
    for name in ("num_attention_heads", "attention_head_dim"):
        _check_positive(name, config.get(name, 1), file)
    if config.get("attention_head_dim", 2) % 2:
        raise UserError(f"{file}: attention_head_dim must be even, not {config['attention_head_dim']}; {_COPY}")


def head_dim(width: Any, num_heads: Any, file: Path) -> int:
    """Return the number of channels per head in a network with this width.

    Raises:
        UserError: if the number of heads does not divide the width.
    """
    _check_positive("dim", width, file)
    _check_positive("num_heads", num_heads, file)
    if width % num_heads:
        raise UserError(f"{file}: num_heads {num_heads} does not divide the width dim {width}; {_COPY}")
    return width // num_heads


def check_text_heads(config: Mapping[str, Any], file: Path) -> None:
    """Check the heads in the configuration of a UMT5 encoder.

    Raises:
        UserError: if their number or size is not positive.
    """
    for name in ("num_heads", "d_kv"):
        _check_positive(name, config.get(name, 1), file)


def check_latent_statistics(config: Mapping[str, Any], source: Path) -> None:
    """Check the mean and the standard deviation of the latents in the complete configuration of a VAE.

    Raises:
        UserError: if they are not one finite number per channel, or a standard deviation is not positive.
    """
    channels = config["z_dim"]
    for name, lowest in ("latents_mean", -math.inf), ("latents_std", 0.0):
        values = config[name]
        if not isinstance(values, list | tuple) or len(values) != channels:
            held = f"{len(values)} values" if isinstance(values, list | tuple) else repr(values)
            raise UserError(f"{source}: {name} must be a list of {channels} numbers, one per channel, not {held}")
        for value in values:
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or not lowest < value < math.inf:  # NaN included
                kind = "positive" if lowest == 0 else "finite"
                raise UserError(f"{source}: {name} must hold {kind} numbers, not {value!r}; {_COPY}")


def check_tokenizer_class(config: Mapping[str, Any], expected: Collection[str], folder: Path) -> None:
    """Check the key `tokenizer_class` of a tokenizer_config.json, if there is one. The suffix Fast is ignored.

    Raises:
        UserError: if the class is not in `expected`.
    """
    found = config.get("tokenizer_class")
    if found is not None and str(found).removesuffix("Fast") not in {name.removesuffix("Fast") for name in expected}:
        raise UserError(f"{folder} holds a {found}, but the model needs a {' or '.join(expected)}; {_COPY}")


def check_vocabulary(tokenizer: Any, num_embeddings: int, folder: Path) -> None:
    """Check that a text encoder has an embedding for every token of a tokenizer.

    Raises:
        UserError: if there are more tokens than embeddings.
    """
    if len(tokenizer) > num_embeddings:
        raise UserError(
            f"the tokenizer in {folder} has {len(tokenizer)} tokens, but the text encoder has {num_embeddings} "
            f"embeddings; {_COPY}"
        )


def _check_positive(name: str, value: Any, file: Path) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{file}: {name} must be a positive whole number, not {value!r}; {_COPY}")
