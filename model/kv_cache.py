"""KV cache: the keys and values of earlier blocks in every layer.

Keys are stored already rotated by their absolute frame index, and attention does not depend on the order of keys. A
full window is therefore a ring: the newest frames overwrite the oldest, and nothing is moved.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from model.rotary import rotary_table, rotate


class KVCache:
    """Preallocated keys and values. All positions are Python integers, so the host never waits for the device.

    Slots [0, sink_frames) hold the first frames of the video. The following slots are a ring over the later frames, and
    the last `block_frames` slots lie outside of it. Slots after the filled ones are scratch space: a block's own keys
    are put there, so that attention reads context and block as one view, without a copy.
    """

    def __init__(
        self,
        num_layers: int,
        batch_size: int,
        num_heads: int,
        head_dim: int,
        tokens_per_frame: int,
        context_frames: int,
        block_frames: int,
        sink_frames: int = 0,
        history_frames: int = 0,
        moving_sink: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        """
        Args:
            context_frames: most frames of context, the sink included: the window without the current block.
            block_frames: frames of the longest block.
            sink_frames: frames at the start of the video that are never evicted.
            history_frames: older frames to keep, so that the context of earlier blocks can be read again.
            moving_sink: rotate the keys of the sink by the distance that the window has moved, so that the sink
                directly precedes the window (Deep Forcing, arXiv 2512.05081).
        """
        assert 0 <= sink_frames <= context_frames and history_frames >= 0
        self.num_layers = num_layers
        self.tokens_per_frame = tokens_per_frame
        self.context_frames = context_frames
        self.sink_frames = sink_frames
        self.history_frames = history_frames
        self.moving_sink = moving_sink
        self.num_frames = 0  # frames ever appended, which is also the index of the next frame
        self.oldest = 0  # frames before this one are dropped, except for the sink
        self.frozen = False
        tokens = (context_frames + history_frames + block_frames) * tokens_per_frame
        self._allocate((num_layers, batch_size, tokens, num_heads, head_dim), dtype, device)

    def _allocate(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> None:
        self._k = torch.empty(shape, dtype=dtype, device=device)
        self._v = torch.empty(shape, dtype=dtype, device=device)
        # Views that `read_with_block` uses again: making one takes as long as copying a small block.
        self._views: dict[tuple[int, int, int], list[Tensor]] = {}

    @property
    def ring_frames(self) -> int:
        """Number of slots in the ring."""
        return self.context_frames - self.sink_frames + self.history_frames

    @property
    def num_bytes(self) -> int:
        """Memory of the keys and values, in bytes."""
        return 2 * self._k.numel() * self._k.element_size()

    def read(self, layer: int, before: int | None = None) -> tuple[Tensor, Tensor]:
        """Return keys and values [B, tokens, heads, head_dim] of the context; views if its slots are contiguous.

        Args:
            before: first frame of the block that reads its context. Default: the next block.

        Raises:
            ValueError: if a frame of this context is evicted or not yet appended.
        """
        return self._read(layer, self.num_frames if before is None else before, self.num_frames)

    def read_with_block(
        self,
        layer: int,
        k: Tensor,
        v: Tensor,
        before: int | None = None,
        uncommitted: int = 0,
        frames: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the context as `read` does, followed by a block's own k and v [B, tokens, heads, head_dim].

        The context stays unchanged. Without autograd, the block goes into scratch slots if possible, and the result is
        a view. Otherwise the result is a new tensor.

        Args:
            before: as in `read`.
            uncommitted: number of frames that this layer has appended since the last commit; they count as context.
            frames: read only the newest frames of the context, and the sink only as far as it is among them.

        Raises:
            ValueError: as in `read`.
        """
        newest = self.num_frames + uncommitted
        end = newest if before is None else before
        # Slots after the filled ones are scratch space unless history fills the ring beyond the context. Dropped frames
        # leave a gap, so the context is no single view.
        no_scratch = newest > self.context_frames < self._ring_end or self._has_gap(newest)
        if torch.is_grad_enabled() or end != newest or no_scratch or frames is not None or self._sink_shift(end):
            past_k, past_v = self._read(layer, end, newest, frames)
            return torch.cat([past_k, k], dim=1), torch.cat([past_v, v], dim=1)
        start = min(newest, self.context_frames) * self.tokens_per_frame
        stop = start + k.shape[1]
        if (layer, start, stop) not in self._views:
            views = [x[layer, :, first:stop] for first in (start, 0) for x in (self._k, self._v)]
            self._views[layer, start, stop] = views
        own_k, own_v, keys, values = self._views[layer, start, stop]
        own_k.copy_(k)
        own_v.copy_(v)
        return keys, values

    def is_full_window(self) -> bool:
        """Return whether the next blocks see the whole ring in one view, followed by scratch slots."""
        full = self.num_frames >= self.context_frames == self._ring_end and not self._has_gap(self.num_frames)
        return full and not self.frozen and not (self.moving_sink and self.sink_frames)

    def slots(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return the keys and values [B, slots, heads, head_dim] of all slots of a layer."""
        return self._k[layer], self._v[layer]

    @torch.no_grad()
    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Store a block's k and v [B, tokens, heads, head_dim] of one layer; call `commit` after the last layer."""
        assert not self.frozen, "append to a frozen cache"
        for slot, frame, count in self.placement(k.shape[1] // self.tokens_per_frame):
            target = slice(slot * self.tokens_per_frame, (slot + count) * self.tokens_per_frame)
            source = slice(frame * self.tokens_per_frame, (frame + count) * self.tokens_per_frame)
            self._store(layer, target, k[:, source], v[:, source])

    def _store(self, layer: int, slots: slice, k: Tensor, v: Tensor) -> None:
        self._k[layer, :, slots] = k
        self._v[layer, :, slots] = v

    def commit(self, num_frames: int) -> None:
        """Add `num_frames` frames to the context, after every layer has appended them."""
        self.num_frames += num_frames

    def forget(self, keep_frames: int) -> None:
        """Drop all frames except for the sink and the newest `keep_frames`."""
        self.oldest = max(self.oldest, self.num_frames - keep_frames)

    def rewind(self, frame: int) -> None:
        """Drop all frames except for those of the sink before `frame`, which is the next frame to append."""
        assert frame <= self.num_frames and not self.frozen
        self.num_frames = self.oldest = frame

    def freeze(self) -> None:
        """Refuse further appends, so that the backward pass reads the same keys and values again."""
        self.frozen = True

    def reset(self) -> None:
        """Empty and unfreeze the cache; its memory stays allocated."""
        self.num_frames, self.oldest, self.frozen = 0, 0, False

    @property
    def _ring_end(self) -> int:
        return self.sink_frames + self.ring_frames

    def _has_gap(self, newest: int) -> bool:
        """Return whether `forget` or `rewind` dropped frames that the context would hold."""
        return self.oldest > max(min(self.sink_frames, newest), newest - self.ring_frames)

    def _read(self, layer: int, end: int, newest: int, frames: int | None = None) -> tuple[Tensor, Tensor]:
        pieces = self._pieces(end, newest, frames)
        if len(pieces) == 1:
            k, v = self._k[layer, :, pieces[0]], self._v[layer, :, pieces[0]]
        else:
            k = torch.cat([self._k[layer, :, piece] for piece in pieces], dim=1)
            v = torch.cat([self._v[layer, :, piece] for piece in pieces], dim=1)
        return (k if frames is not None else self._move_sink(k, end)), v

    def _pieces(self, end: int, newest: int, frames: int | None = None) -> list[slice]:
        """Return the slices of tokens that hold the context before frame `end`; see `_slots`."""
        runs = self._slots(end, newest, frames)
        return [slice(a * self.tokens_per_frame, b * self.tokens_per_frame) for a, b in runs]

    def _move_sink(self, k: Tensor, end: int) -> Tensor:
        """Return the keys of a context with its sink, which comes first, rotated to its moved position."""
        if not (shift := self._sink_shift(end)):
            return k
        sink_tokens = min(self.sink_frames, end) * self.tokens_per_frame
        rope = rotary_table(k.shape[-1], shift, (1, 1, 1), k.device)
        return torch.cat([rotate(k[:, :sink_tokens], rope), k[:, sink_tokens:]], dim=1)

    def _sink_shift(self, end: int) -> int:
        """Return the frames by which a moving sink is moved for a block that starts at `end`."""
        if not self.moving_sink or not self.sink_frames:
            return 0
        oldest = min(end, max(end - (self.context_frames - self.sink_frames), self.oldest))
        return max(0, oldest - self.sink_frames)

    def _slots(self, end: int, newest: int, frames: int | None = None) -> list[tuple[int, int]]:
        """Return runs (first slot, end slot) of the context before frame `end`; `newest` frames are appended so far.

        The slots of the sink come first. `frames`: see `read_with_block`.
        """
        sink = min(self.sink_frames, end)
        start = max(self.sink_frames, end - (self.context_frames - self.sink_frames), self.oldest)
        if frames is not None:
            return self._newest_slots(max(0, end - frames), sink, max(start, end - frames), end, newest)
        if end > newest or start < min(end, newest - self.ring_frames):
            raise ValueError(f"the cache, at frame {newest}, does not hold the context before frame {end}")
        if start >= end:
            return [(0, sink)]
        first = (start - self.sink_frames) % self.ring_frames + self.sink_frames
        count = end - start
        wrapped = first + count - self._ring_end
        if count == self.ring_frames:  # the whole ring; the order of its frames does not matter
            return [(0, self._ring_end)]
        runs = [(first, min(first + count, self._ring_end))]
        if wrapped > 0:
            runs.insert(0, (self.sink_frames, self.sink_frames + wrapped))
        if sink and runs[0][0] == sink:
            runs[0] = (0, runs[0][1])
        elif sink:
            runs.insert(0, (0, sink))
        return runs

    def _newest_slots(self, first: int, sink: int, start: int, end: int, newest: int) -> list[tuple[int, int]]:
        """Return runs of slots of frames first to sink - 1 and start to end - 1."""
        assert end == newest
        runs = [(first, sink)] if first < sink else []
        while start < end:
            slot = self.sink_frames + (start - self.sink_frames) % self.ring_frames
            count = min(end - start, self._ring_end - slot)
            runs.append((slot, slot + count))
            start += count
        return runs or [(0, 0)]

    def placement(self, num_frames: int) -> Iterator[tuple[int, int, int]]:
        """Yield runs (first slot, index of the first new frame, number of frames) for the next `num_frames` frames.

        Frames that later frames of the same block would overwrite are skipped.
        """
        ring = self.ring_frames
        end = self.num_frames + num_frames
        frame = self.num_frames
        while frame < end:
            if frame < self.sink_frames:
                slot, count = frame, min(end, self.sink_frames) - frame
            elif frame < end - ring or ring == 0:
                frame = max(end - ring, self.sink_frames)
                continue
            else:
                slot = self.sink_frames + (frame - self.sink_frames) % ring
                count = min(end - frame, self._ring_end - slot)
            yield slot, frame - self.num_frames, count
            frame += count
