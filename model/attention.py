"""Self-attention over a clip (full, block-causal), or of one block next to a KV cache.

Queries, keys and values are [B, N, heads, head_dim] in every function here.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor

from model.kv_cache import KVCache


@dataclass(frozen=True)
class BlockCausalMask:
    """Which frames attend to which when a whole clip goes through the network at once.

    A block attends to itself, the sink, and as many earlier frames as a `KVCache` of the same size holds.

    With `teacher_forcing`, the input is the clip twice in a row, clean and noisy. Both halves have the same positions.
    A noisy block attends to the clean blocks before it instead of the noisy ones.
    """

    blocks: tuple[int, ...]  # frames of each block
    context_frames: int | None = None  # frames of context, the sink included; None: all earlier frames
    sink_frames: int = 0
    teacher_forcing: bool = False

    @property
    def copies(self) -> int:
        """Number of times that the clip stands in the input."""
        return 2 if self.teacher_forcing else 1

    def visible(self) -> list[tuple[int, int, list[tuple[int, int]]]]:
        """Return (first frame, end frame, visible frame ranges) of every block."""
        result = []
        start = 0
        for frames in self.blocks:
            sink = min(self.sink_frames, start)
            oldest = 0 if self.context_frames is None else max(0, start - (self.context_frames - self.sink_frames))
            ranges = [(0, sink), (max(oldest, sink), start + frames)] if oldest > sink else [(0, start + frames)]
            result.append((start, start + frames, [r for r in ranges if r[0] < r[1]]))
            start += frames
        if self.teacher_forcing:
            for first, end, ranges in result[: len(self.blocks)]:
                past = [(a, min(b, first)) for a, b in ranges if a < first]
                result.append((start + first, start + end, [*past, (start + first, start + end)]))
        return result


class SelfAttention(Protocol):
    """Attention in layer number `layer`."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...


def attend(q: Tensor, k: Tensor, v: Tensor, backend: Any) -> Tensor:
    """Return unmasked attention by one of diffusers' backends (None: the default one), in the dtype of q."""
    return dispatch_attention_fn(q, k, v, backend=backend).type_as(q)


class FullAttention:
    """Every token attends to all tokens."""

    def __init__(self, backend: Any):
        self.backend = backend

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, self.backend)


class BlockCausalAttention:
    """A clip under a `BlockCausalMask`, computed block by block.

    Slices replace the mask, so that every backend works and no hidden pair of tokens is computed.
    """

    def __init__(self, backend: Any, mask: BlockCausalMask, tokens_per_frame: int):
        self.backend = backend
        self.blocks = [
            (slice(start * tokens_per_frame, end * tokens_per_frame),
             [slice(a * tokens_per_frame, b * tokens_per_frame) for a, b in ranges])
            for start, end, ranges in mask.visible()
        ]  # fmt: skip

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        outputs = []
        for block, ranges in self.blocks:
            keys = torch.cat([k[:, r] for r in ranges], dim=1) if len(ranges) > 1 else k[:, ranges[0]]
            values = torch.cat([v[:, r] for r in ranges], dim=1) if len(ranges) > 1 else v[:, ranges[0]]
            outputs.append(attend(q[:, block], keys, values, self.backend))
        return torch.cat(outputs, dim=1)


class CachedAttention:
    """One block attends to a cache's context and to itself."""

    def __init__(
        self, backend: Any, cache: KVCache, first_frame: int, append: bool = False, copy_context: bool = False
    ):
        """
        Args:
            first_frame: absolute index of the block's first frame. A cache that has moved past this frame is read as it
                was before the block.
            append: append the block's keys and values; the caller commits them after the last layer.
            copy_context: copy the context of all layers now, for a checkpointed layer: it reads the context again in
                the backward pass, when the cache may have moved on.
        """
        self.backend, self.cache, self.append = backend, cache, append
        self.before = min(first_frame, cache.num_frames)
        self.copies: list[list[Tensor]] | None = None
        if copy_context:
            self.copies = [[x.clone() for x in cache.read(n, self.before)] for n in range(cache.num_layers)]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.copies is not None:
            past_k, past_v = self.copies[layer]
            keys, values = torch.cat([past_k, k], dim=1), torch.cat([past_v, v], dim=1)
        else:
            keys, values = self.cache.read_with_block(layer, k, v, self.before)
        output = attend(q, keys, values, self.backend)
        if self.append:
            self.cache.append(layer, k, v)
        return output


class WriteThenDenoiseAttention:
    """Two blocks in one pass: the first is appended to the cache, and the second attends to it there."""

    def __init__(self, backend: Any, cache: KVCache, written_frames: int):
        """
        Args:
            written_frames: frames of the first block; the caller commits them after the last layer.
        """
        self.backend, self.cache, self.written_frames = backend, cache, written_frames

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tokens = self.written_frames * self.cache.tokens_per_frame
        written_k, written_v = k[:, :tokens], v[:, :tokens]
        written = attend(q[:, :tokens], *self.cache.read_with_block(layer, written_k, written_v), self.backend)
        self.cache.append(layer, written_k, written_v)
        return torch.cat([written, self.second_block(layer, q[:, tokens:], k[:, tokens:], v[:, tokens:])], dim=1)

    def second_block(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend as the second block only, after the first one has been appended in this layer."""
        keys, values = self.cache.read_with_block(layer, k, v, uncommitted=self.written_frames)
        return attend(q, keys, values, self.backend)
