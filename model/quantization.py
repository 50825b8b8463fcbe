"""8-bit linear layers by torchao, an optional package (requirements-quantization.txt)."""

import importlib.util
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import torch
from torch import nn

from utils.errors import UserError

_FP8_CAPABILITY = (8, 9)  # of Ada and Hopper GPUs


def check_quantization(name: str, device: torch.device) -> None:
    """Check that a quantization of `model.quantization` can run on a device.

    Raises:
        UserError: if torchao is not installed, or the device has no FP8 matrix products.
    """
    if name == "none":
        return
    if importlib.util.find_spec("torchao") is None:
        raise UserError(f"model.quantization={name} needs torchao: pip install -r requirements-quantization.txt")
    if name == "fp8" and (device.type != "cuda" or torch.cuda.get_device_capability(device) < _FP8_CAPABILITY):
        raise UserError(
            f"model.quantization=fp8 needs an NVIDIA GPU with FP8 (RTX 40, L40, H100 or later), not {device}; "
            "use int8 or int8_dynamic"
        )


def quantize_layers_(net: nn.Module, layers: Iterable[nn.Module], name: str, device: torch.device) -> None:
    """Quantize the weights of all linear layers in `layers`, one after the other on `device`, where they stay.

    The network can no longer be saved, trained or given a LoRA.

    Args:
        name: int8 (weights only), int8_dynamic or fp8 (weights and, per token, activations).
    """
    from torchao.quantization import quantize_

    for layer in layers:
        quantize_(layer, _settings(name), filter_fn=lambda module, _: isinstance(module, nn.Linear), device=device)
    net.save_pretrained = _refuse_saving  # type: ignore[assignment]


def _settings(name: str) -> Any:
    from torchao import quantization

    choices: dict[str, Callable[[], Any]] = {
        "int8": quantization.Int8WeightOnlyConfig,
        "int8_dynamic": quantization.Int8DynamicActivationInt8WeightConfig,
        "fp8": lambda: quantization.Float8DynamicActivationFloat8WeightConfig(granularity=quantization.PerRow()),
    }
    return choices[name]()


def _refuse_saving(*args: Any, **kwargs: Any) -> NoReturn:
    raise UserError("the weights of a quantized network are not saved: load it with model.quantization=none to save it")
