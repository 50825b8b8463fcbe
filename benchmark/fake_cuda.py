"""Fake CUDA tensors: the code for a GPU runs at full size, without a GPU, and nothing is computed."""

import contextlib
import ctypes
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

DEVICE = torch.device("cuda:0")
_CUDA, _META = 1, 14  # device types in c10
_FLASH_LIMIT = 256  # largest head_dim of FlashAttention
_decomposed_rms_norm, _swap_tensors = torch.nn.functional.rms_norm, torch.utils.swap_tensors


@contextlib.contextmanager
def fake_cuda() -> Iterator[torch.device]:
    """Make all new tensors fake, and yield the fake CUDA device."""
    _set_device_guard()
    replacements = {
        "torch.nn.functional.scaled_dot_product_attention": _attention,
        "torch.nn.functional.rms_norm": _rms_norm,
        "torch.utils.swap_tensors": _swap,
        "torch.Tensor.pin_memory": lambda tensor: tensor,
    }
    torch.overrides.get_overridable_functions()  # a cache, which must hold the functions before their replacement
    with contextlib.ExitStack() as stack:
        for name, replacement in replacements.items():
            stack.enter_context(mock.patch(name, replacement))
        stack.enter_context(torch.no_grad())
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield DEVICE


@torch.library.custom_op("benchmark::rms_norm", mutates_args=())
def _fused_rms_norm(x: Tensor, weight: Tensor | None, eps: float | None) -> Tensor:
    raise NotImplementedError("only for fake tensors")


@_fused_rms_norm.register_fake
def _(x: Tensor, weight: Tensor | None, eps: float | None) -> Tensor:
    return torch.empty_like(x)


def _rms_norm(
    input: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """Run one kernel, as on a GPU; torch without CUDA would run several. Inductor fuses the decomposed norm."""
    if torch.compiler.is_compiling():
        return _decomposed_rms_norm(input, normalized_shape, weight, eps)
    return _fused_rms_norm(input, weight, eps)


def _swap(old: Tensor, new: Tensor) -> None:
    """Let `Module.to` leave fake parameters alone that are on the device already."""
    if (old.device, old.dtype) != (new.device, new.dtype):
        _swap_tensors(old, new)


def _set_device_guard() -> None:
    """Let a torch without CUDA switch to a CUDA device and back, which for fake tensors does nothing.

    FakeTensorMode does this itself in a torch with CUDA on a machine without a GPU. The meta device's guard does
    nothing, so it serves CUDA as well.
    """
    if torch.backends.cuda.is_built():
        return
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * (_META + 1)).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    guards[_CUDA] = guards[_META]


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Call the kernel that torch chooses on a GPU. For fake tensors, torch chooses none of its fused kernels."""
    aten = torch.ops.aten
    half = query.dtype in (torch.bfloat16, torch.float16)
    if half and attn_mask is None and query.shape[-1] <= _FLASH_LIMIT:
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
    arguments = (query, key, value, attn_mask, False, dropout_p, is_causal)
    return aten._scaled_dot_product_efficient_attention(*arguments, scale=scale)[0]
