"""Self-attention: over a whole clip (full or block-causal), or of one block over itself and a KV cache.

Queries, keys and values are [B, N, heads, head_dim] in every function here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from model import attention_backends
from model.kv_cache import KVCache


@dataclass(frozen=True)
class BlockCausalMask:
    """Mask over frames for one pass over a whole clip.

    A block attends to itself, the sink, and as many earlier frames as a `KVCache` of the same size holds.

    With `teacher_forcing`, the input is the clean clip followed by the noisy clip, at the same positions. A noisy block
    attends to the earlier clean blocks instead of the earlier noisy blocks.
    """

    blocks: tuple[int, ...]  # frames of each block
    context_frames: int | None = None  # frames of context, the sink included; None: all earlier frames
    sink_frames: int = 0
    teacher_forcing: bool = False

    @property
    def positions(self) -> tuple[tuple[int, int], ...]:
        """Frames of the input as runs (first frame of the video, frames): the clip once or twice."""
        return ((0, sum(self.blocks)),) * (2 if self.teacher_forcing else 1)

    def visible(self) -> list[tuple[int, int, list[tuple[int, int]]]]:
        """Return (first frame, end frame, visible frame ranges) of every block; the end of each range is exclusive."""
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


@dataclass(frozen=True)
class SegmentMask:
    """Mask over an input of several segments; each is a block of the video at some noise level."""

    positions: tuple[tuple[int, int], ...]  # of each segment: first frame of the video, frames
    segments: tuple[tuple[int, int, tuple[tuple[int, int], ...]], ...]  # see `BlockCausalMask.visible`
    gradient_sources: tuple[tuple[int, int, int | None], ...] = ()
    """Runs (first frame, end frame, source) of the input's frames: their keys and values have the gradient of those
    from frame `source` on, or none. Empty: every key and value has its own."""

    def visible(self) -> Sequence[tuple[int, int, Sequence[tuple[int, int]]]]:
        """Return (first frame, end frame, visible frame ranges) of every segment, in frames of the input."""
        return self.segments


class FrameMask(Protocol):
    """The frames of an input that each of its blocks attends to; see `BlockCausalMask`."""

    @property
    def positions(self) -> tuple[tuple[int, int], ...]: ...

    def visible(self) -> Sequence[tuple[int, int, Sequence[tuple[int, int]]]]: ...


class SelfAttention(Protocol):
    """Self-attention of the layer with index `layer`."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...


def attend(q: Tensor, k: Tensor, v: Tensor, backend: Any) -> Tensor:
    """Return unmasked attention in the dtype of q, computed by one of diffusers' backends (None: the default)."""
    return attention_backends.attend(q, k, v, backend).type_as(q)


class FullAttention:
    """Every token attends to all tokens."""

    def __init__(self, backend: Any):
        self.backend = backend

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, self.backend)


class BlockCausalAttention:
    """Every block of a clip attends to the frames that a mask makes visible.

    Each block attends to slices of the keys and values instead of using a mask. So every backend works, and masked
    pairs of tokens are not computed.
    """

    def __init__(self, backend: Any, mask: FrameMask, tokens_per_frame: int):
        self.backend = backend
        self.blocks = [
            (slice(start * tokens_per_frame, end * tokens_per_frame),
             [slice(a * tokens_per_frame, b * tokens_per_frame) for a, b in ranges])
            for start, end, ranges in mask.visible()
        ]  # fmt: skip
        self.gradient_sources = [
            tuple(None if frame is None else frame * tokens_per_frame for frame in run)
            for run in getattr(mask, "gradient_sources", ())
        ]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.gradient_sources:
            k, v = self._with_gradient_of_sources(k), self._with_gradient_of_sources(v)
        outputs = []
        for block, ranges in self.blocks:
            keys = torch.cat([k[:, r] for r in ranges], dim=1) if len(ranges) > 1 else k[:, ranges[0]]
            values = torch.cat([v[:, r] for r in ranges], dim=1) if len(ranges) > 1 else v[:, ranges[0]]
            outputs.append(attend(q[:, block], keys, values, self.backend))
        return torch.cat(outputs, dim=1)

    def _with_gradient_of_sources(self, x: Tensor) -> Tensor:
        """Return x with unchanged values; see `SegmentMask.gradient_sources`."""
        constant, pieces = x.detach(), []
        for start, end, source in self.gradient_sources:
            piece = constant[:, start:end]
            if source is not None:
                same = slice(source, source + end - start)
                piece = piece + (x[:, same] - constant[:, same])
            pieces.append(piece)
        return torch.cat(pieces, dim=1)


class CachedAttention:
    """One block attends to a cache's context and to itself."""

    def __init__(
        self,
        backend: Any,
        cache: KVCache,
        first_frame: int,
        append: bool = False,
        copy_context: bool = False,
        read_frames: int | None = None,
    ):
        """
        Args:
            first_frame: absolute index of the block's first frame. The block attends to the context before this frame,
                also if the cache already holds later frames.
            append: append the block's keys and values; the caller commits them after the last layer.
            copy_context: copy the context of all layers now. A checkpointed layer needs the copy: it reads the context
                again in the backward pass, possibly after further appends.
            read_frames: attend to the newest frames of the context only; see `KVCache.read_with_block`.
        """
        self.backend, self.cache, self.append, self.read_frames = backend, cache, append, read_frames
        self.before = min(first_frame, cache.num_frames)
        self.copied_context: list[list[Tensor]] | None = None
        if copy_context:
            self.copied_context = [[x.clone() for x in cache.read(n, self.before)] for n in range(cache.num_layers)]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.copied_context is not None:
            past_k, past_v = self.copied_context[layer]
            keys, values = torch.cat([past_k, k], dim=1), torch.cat([past_v, v], dim=1)
        else:
            keys, values = self.cache.read_with_block(layer, k, v, self.before, frames=self.read_frames)
        output = attend(q, keys, values, self.backend)
        if self.append:
            self.cache.append(layer, k, v)
        return output


class WriteThenDenoiseAttention:
    """Two blocks in one pass: the first is appended to the cache, and the second attends to it there."""

    def __init__(self, backend: Any, cache: KVCache, written_frames: int, read_frames: int | None = None):
        """
        Args:
            written_frames: frames of the first block; the caller commits them after the last layer.
            read_frames: newest frames of the context that the first block attends to; None for all.
        """
        self.backend, self.cache, self.written_frames = backend, cache, written_frames
        self.read_frames = read_frames
        self.second_block = SecondBlockAttention(backend, cache, written_frames)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tokens = self.written_frames * self.cache.tokens_per_frame
        written_k, written_v = k[:, :tokens], v[:, :tokens]
        context = self.cache.read_with_block(layer, written_k, written_v, frames=self.read_frames)
        written = attend(q[:, :tokens], *context, self.backend)
        self.cache.append(layer, written_k, written_v)
        return torch.cat([written, self.second_block(layer, q[:, tokens:], k[:, tokens:], v[:, tokens:])], dim=1)


class SecondBlockAttention:
    """The second block of `WriteThenDenoiseAttention` alone; the first must have been appended in the same layer."""

    def __init__(self, backend: Any, cache: KVCache, written_frames: int):
        self.backend, self.cache, self.written_frames = backend, cache, written_frames

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self.cache.read_with_block(layer, k, v, uncommitted=self.written_frames)
        return attend(q, keys, values, self.backend)
