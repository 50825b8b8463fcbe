"""Attention backends: the best one for a GPU, the kernel that a backend runs, and cuDNN without copies."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    dispatch_attention_fn,
)
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

FASTEST: dict[int, tuple[str, ...]] = {
    9: ("_flash_3", "_native_cudnn"),  # Hopper
    10: ("_native_cudnn",),  # Blackwell, data centre
    12: ("_native_cudnn",),  # Blackwell, others
}
"""Backends for `auto` by the major compute capability of the GPU, in order of preference. Other GPUs: native, which
runs FlashAttention-2 on compute capability 8. Backends that round to 8 bits, such as sage, are never chosen."""

PYTORCH_KERNELS = {  # operators of PyTorch, the most specific names first
    "_flash_attention_for_cpu": "PyTorch's flash attention for CPUs",
    "_cudnn_attention": "cuDNN",
    "_flash_attention": "FlashAttention-2 in PyTorch",
    "_efficient_attention": "memory-efficient attention in PyTorch",
    "_fused_attention_overrideable": "a fused kernel of the device",
    "softmax": "unfused attention in PyTorch",
}
PACKAGES = {"_flash_3": "FlashAttention-3", "flash": "FlashAttention-2 (flash_attn)", "sage": "SageAttention"}

TOLERANCE = 0.03  # of bfloat16 outputs that are averages of values of about 1


def attend(q: Tensor, k: Tensor, v: Tensor, backend: Any) -> Tensor:
    """Return unmasked attention [B, N, heads, head_dim] by one of diffusers' backends; None for the default."""
    if backend == "_native_cudnn":
        return cudnn_attention(q, k, v)
    if (backend or _AttentionBackendRegistry.get_active_backend()[0]) == AttentionBackendName.NATIVE:
        # The dispatch does the same. On a CPU, its checks take as long as the attention to a short text.
        return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
    return dispatch_attention_fn(q, k, v, backend=backend)


def cudnn_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return attention by cuDNN, on views of q, k and v. diffusers copies them; the keys are the whole window."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def fastest_backend(device: torch.device, dtype: torch.dtype, head_dim: int, autograd: bool = False) -> str:
    """Return the first backend of `FASTEST` that works on a device, else `native`.

    A backend works if it runs and its result is close to PyTorch's unfused attention.

    Args:
        autograd: the backend must have a backward pass.
    """
    if device.type != "cuda":
        return "native"
    for name in FASTEST.get(torch.cuda.get_device_capability(device)[0], ()):
        if backend_works(name, device, dtype, head_dim, autograd):
            return name
    return "native"


def backend_works(name: str, device: torch.device, dtype: torch.dtype, head_dim: int, autograd: bool = False) -> bool:
    """Return whether a backend runs here and agrees with PyTorch's unfused attention; see `fastest_backend`."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, 2, head_dim, generator=generator).to(device, dtype) for n in (96, 200, 200))
    with torch.set_grad_enabled(autograd):
        try:
            output = attend(q.requires_grad_(autograd), k, v, name)
            if autograd:
                output.float().sum().backward()
        except (RuntimeError, ValueError, ImportError, AttributeError, TypeError, AssertionError, NameError):
            return False  # without its package, a backend calls an object that does not exist
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        wide_q, wide_k, wide_v = (x.float().transpose(1, 2) for x in (q, k, v))
        expected = F.scaled_dot_product_attention(wide_q, wide_k, wide_v).transpose(1, 2)
    return bool(((output.detach().float() - expected).abs() < TOLERANCE).all())


def kernel_name(
    backend: Any, device: torch.device, dtype: torch.dtype, head_dim: int, attention: Callable[..., Tensor] = attend
) -> str:
    """Return the name of the kernel that a backend runs for tensors of this kind, from one small call.

    `native` leaves the choice to PyTorch, which depends on its version, on cuDNN and on the GPU.
    """
    q, k, v = (torch.zeros(1, tokens, 2, head_dim, device=device, dtype=dtype) for tokens in (96, 200, 200))
    with torch.no_grad(), _Operators() as mode:
        attention(q, k, v, backend)
    for operator, name in PYTORCH_KERNELS.items():
        if any(operator in called for called in mode.names):
            impl = getattr(torch.nn.attention, "current_flash_attention_impl", lambda: None)()
            return f"{name} ({impl})" if impl and "FlashAttention" in name else name
    value = getattr(backend, "value", backend)
    return PACKAGES.get(value, str(value))


class _Operators(TorchDispatchMode):
    """Records the names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def describe_attention(net: Any, requested: str) -> str:
    """Return the attention backend of a `CausalWanModel` and the kernel that it runs, as one line for the log.

    Args:
        requested: backend of the configuration, possibly `auto`.
    """
    backend = net.layers[0].attn1.processor._attention_backend
    chosen = getattr(backend, "value", backend) or "native"
    kernel = kernel_name(backend, net.device, net.dtype, net.config["attention_head_dim"])
    auto = f" selects {chosen}, which" if requested == "auto" else ""
    return f"attention: {requested}{auto} runs {kernel}"
