"""KV cache with 8-bit keys and values: half the memory of bfloat16."""

from typing import Any

import torch
from torch import Tensor

from model.kv_cache import KVCache

_LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}  # largest values of the storage types


class QuantizedKVCache(KVCache):
    """Keys and values in 8 bits, with one float32 scale per token and head.

    A scale maps the largest magnitude of a head's vector to the largest value of the storage type. A read multiplies
    the context by its scales, in the dtype of the appended keys. The block that reads stays unquantized.
    """

    def __init__(self, *args: Any, dtype: torch.dtype, **kwargs: Any):
        """
        Args:
            dtype: storage type, torch.float8_e4m3fn or torch.int8.
            args, kwargs: see `KVCache`.
        """
        self.read_dtype = torch.float32  # of the latest append
        super().__init__(*args, **kwargs | {"dtype": dtype, "block_frames": 0})  # reads need no scratch space

    def _allocate(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> None:
        super()._allocate(shape, dtype, device)
        self._k_scale = torch.empty((*shape[:-1], 1), device=device)
        self._v_scale = torch.empty((*shape[:-1], 1), device=device)

    @property
    def num_bytes(self) -> int:
        """Memory of the keys, the values and their scales, in bytes."""
        return super().num_bytes + 2 * self._k_scale.numel() * self._k_scale.element_size()

    def is_full_window(self) -> bool:
        """Return false: reads are new tensors."""
        return False

    def read_with_block(
        self,
        layer: int,
        k: Tensor,
        v: Tensor,
        before: int | None = None,
        uncommitted: int = 0,
        frames: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return new tensors of the context followed by a block's own k and v; see `KVCache.read_with_block`."""
        newest = self.num_frames + uncommitted
        return self._dequantized(layer, newest if before is None else before, newest, frames, k, v)

    def _read(self, layer: int, end: int, newest: int, frames: int | None = None) -> tuple[Tensor, Tensor]:
        none = self._k.new_empty(self._k.shape[1], 0, *self._k.shape[3:], dtype=self.read_dtype)
        return self._dequantized(layer, end, newest, frames, none, none)

    def _store(self, layer: int, slots: slice, k: Tensor, v: Tensor) -> None:
        self.read_dtype = k.dtype
        for x, values, scales in ((k, self._k, self._k_scale), (v, self._v, self._v_scale)):
            values[layer, :, slots], scales[layer, :, slots] = quantize(x, values.dtype)

    def _dequantized(
        self, layer: int, end: int, newest: int, frames: int | None, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the context before frame `end`, followed by k and v, in the dtype of k and v."""
        pieces = self._pieces(end, newest, frames)
        keys = _joined(self._k[layer], self._k_scale[layer], pieces, k)
        values = _joined(self._v[layer], self._v_scale[layer], pieces, v)
        return (keys if frames is not None else self._move_sink(keys, end)), values


def quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return x [..., head_dim] in an 8-bit dtype, and float32 scales [..., 1] such that x = values * scales."""
    scale = x.abs().amax(dim=-1, keepdim=True).float() / _LARGEST[dtype]
    scaled = x.float() / scale.clamp_min(torch.finfo(torch.float32).tiny)
    return (scaled if dtype.is_floating_point else scaled.round()).to(dtype), scale


def _joined(values: Tensor, scales: Tensor, pieces: list[slice], block: Tensor) -> Tensor:
    """Return the dequantized pieces of values [B, tokens, heads, head_dim], followed by the block."""
    context = sum(piece.stop - piece.start for piece in pieces)
    result = block.new_empty(block.shape[0], context + block.shape[1], *block.shape[2:])
    start = 0
    for piece in pieces:
        stop = start + piece.stop - piece.start
        result[:, start:stop] = values[:, piece]  # exact: an 8-bit value fits into the dtype of the block
        result[:, start:stop] *= scales[:, piece]
        start = stop
    result[:, context:] = block
    return result


def new_kv_cache(*, dtype: torch.dtype, **sizes: Any) -> KVCache:
    """Return an empty cache that stores `dtype`. The other arguments are those of `KVCache`."""
    return (QuantizedKVCache if dtype in _LARGEST else KVCache)(dtype=dtype, **sizes)
