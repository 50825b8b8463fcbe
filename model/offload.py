"""Weights that stay in CPU memory and are copied to the device one linear layer at a time, by accelerate's hooks."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module
from torch import Tensor, nn


class StreamedWeights(ModelHook):
    """Copies a module's own weights to a device before its forward pass, and drops the copies afterwards."""

    def __init__(self, device: torch.device):
        self.device = device
        self.weights: dict[str, nn.Parameter] = {}  # on the CPU

    def init_hook(self, module: nn.Module) -> nn.Module:
        """Move the weights to the CPU, for a GPU in pinned memory, which is copied faster."""
        for name, weight in module.named_parameters(recurse=False):
            tensor = weight.detach().to("cpu")
            if self.device.type == "cuda" and type(tensor) is Tensor:  # not a quantized weight
                tensor = tensor.pin_memory()
            self.weights[name] = nn.Parameter(tensor, requires_grad=False)
        return self.post_forward(module, module)

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple, dict]:
        """Copy the weights to the device. The copies are queued, so the host does not wait for them."""
        for name, weight in self.weights.items():
            copied = weight.detach().to(self.device, non_blocking=True)
            module.register_parameter(name, nn.Parameter(copied, requires_grad=False))
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        """Drop the copies."""
        for name, weight in self.weights.items():
            module.register_parameter(name, weight)
        return output


def stream_weights_(net: nn.Module, parts: Iterable[nn.Module], device: torch.device) -> None:
    """Move a network to a device, except for the linear layers of `parts`: their weights stay on the CPU.

    The weights of each linear layer are copied to the device while it runs. An embedding table of tokens, if the
    network has one, runs on the CPU.
    """
    linears = {module for part in parts for module in part.modules() if isinstance(module, nn.Linear)}
    tables = _token_tables(net)
    for module in net.modules():
        if module in linears:
            if not hasattr(module, "_hf_hook"):
                add_hook_to_module(module, StreamedWeights(device))
        elif module in tables:
            if not hasattr(module, "_hf_hook"):
                add_hook_to_module(module.to("cpu"), AlignDevicesHook("cpu", io_same_device=True))
        else:
            for name, weight in list(module.named_parameters(recurse=False)):
                module.register_parameter(name, nn.Parameter(weight.detach().to(device), requires_grad=False))
            for name, buffer in list(module.named_buffers(recurse=False)):
                module._buffers[name] = buffer.to(device)


def _token_tables(net: nn.Module) -> set[nn.Module]:
    """Return the modules that hold the input embeddings of a text encoder; empty for other networks."""
    if not hasattr(net, "get_input_embeddings"):
        return set()
    table = net.get_input_embeddings()  # type: ignore[operator]
    return {module for module in net.modules() if getattr(module, "weight", None) is table.weight}


def num_bytes(net: nn.Module) -> int:
    """Return the bytes of a network's parameters and buffers."""
    tensors: list[Tensor] = [*net.parameters(), *net.buffers()]
    return sum(tensor.nbytes for tensor in tensors)


def free_bytes(device: torch.device) -> float:
    """Return the bytes that this process can still allocate on a GPU; infinity for other devices."""
    if device.type != "cuda":
        return math.inf
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
