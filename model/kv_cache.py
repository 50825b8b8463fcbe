"""One cache: the keys and values of earlier blocks, for every layer, at one context level.

Keys are stored after RoPE with their absolute frame index, and attention does not care about the order of keys, so a
full window is a ring: the newest frames take the place of the oldest and nothing is moved. A cache can be read as it
was
before any frame whose context is still there; training keeps a longer history for that.
"""

from collections.abc import Iterator

import torch
from torch import Tensor


class KVCache:
    """Preallocated keys and values with Python-int cursors: nothing here waits for the device.

    Slots [0, sink_frames) keep the video's first frames for ever; slots [sink_frames, context_frames) are a ring over
    the frames after them. The slots behind those that are filled serve as scratch, so that a block's own keys can stand
    beside its context without a copy of it.
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
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        """
        Args:
            context_frames: latent frames that a block sees, the sink included; the window less the current block.
            block_frames: frames of the longest block that will be attended with or appended.
            sink_frames: frames at the start of the video that are never evicted.
            history_frames: frames older than the context that are kept, so that earlier blocks can be read again.
        """
        assert 0 <= sink_frames <= context_frames and history_frames >= 0
        self.tokens_per_frame = tokens_per_frame
        self.context_frames = context_frames
        self.sink_frames = sink_frames
        self.history_frames = history_frames
        self.num_frames = 0  # ever appended; the next block starts at this frame if it appends to this cache
        self.closed = False  # to further blocks, so that who reads it again later finds what was there
        tokens = (context_frames + history_frames + block_frames) * tokens_per_frame
        shape = (num_layers, batch_size, tokens, num_heads, head_dim)
        self._k = torch.empty(shape, dtype=dtype, device=device)
        self._v = torch.empty(shape, dtype=dtype, device=device)

    @property
    def held_frames(self) -> int:
        """Frames that a read returns."""
        return min(self.num_frames, self.context_frames)

    @property
    def ring_frames(self) -> int:
        """Slots that are used again and again: all but the sink's and the scratch."""
        return self.context_frames - self.sink_frames + self.history_frames

    @property
    def num_bytes(self) -> int:
        """Memory of the keys and values."""
        return 2 * self._k.numel() * self._k.element_size()

    def read(self, layer: int, before: int | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values [B, held tokens, heads, head_dim] of the context; views where it lies in one piece.

        Args:
            before: read the cache as it was when this frame was the next; default: as it is.
        """
        pieces = [slice(a * self.tokens_per_frame, b * self.tokens_per_frame) for a, b in self._slots(before)]
        if len(pieces) == 1:
            return self._k[layer, :, pieces[0]], self._v[layer, :, pieces[0]]
        return (
            torch.cat([self._k[layer, :, piece] for piece in pieces], dim=1),
            torch.cat([self._v[layer, :, piece] for piece in pieces], dim=1),
        )

    def beside(
        self, layer: int, k: Tensor, v: Tensor, before: int | None = None, appended: int = 0
    ) -> tuple[Tensor, Tensor]:
        """The context, as `read` gives it, with a block's own k, v [B, tokens, heads, head_dim] behind it.

        The context is not changed. Without autograd the block is put into scratch slots and a view comes back where it
        can; otherwise a fresh tensor.

        Args:
            before: as `read` has it.
            appended: frames that this layer has appended and nobody has committed yet; they count as context.
        """
        if appended:
            self.num_frames += appended
            try:
                return self.beside(layer, k, v)
            finally:
                self.num_frames -= appended
        earlier = before is not None and before != self.num_frames
        if torch.is_grad_enabled() or earlier or self.num_frames > self.context_frames < self._first_scratch:
            past_k, past_v = self.read(layer, before)
            return torch.cat([past_k, k], dim=1), torch.cat([past_v, v], dim=1)
        start = self.held_frames * self.tokens_per_frame
        end = start + k.shape[1]
        self._k[layer, :, start:end] = k
        self._v[layer, :, start:end] = v
        return self._k[layer, :, :end], self._v[layer, :, :end]

    @torch.no_grad()
    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Put a block's k, v [B, tokens, heads, head_dim] of one layer into the cache; `commit` follows them all."""
        assert not self.closed
        for slot, frame, count in self._placement(k.shape[1] // self.tokens_per_frame):
            to = slice(slot * self.tokens_per_frame, (slot + count) * self.tokens_per_frame)
            of = slice(frame * self.tokens_per_frame, (frame + count) * self.tokens_per_frame)
            self._k[layer, :, to] = k[:, of]
            self._v[layer, :, to] = v[:, of]

    def commit(self, num_frames: int) -> None:
        """Make `num_frames` frames that every layer has appended part of the context."""
        self.num_frames += num_frames

    @property
    def _first_scratch(self) -> int:
        return self.sink_frames + self.ring_frames

    def _slots(self, before: int | None) -> list[tuple[int, int]]:
        """Runs (first, end) of slots that hold the context before a frame; one at least."""
        end = self.num_frames if before is None else before
        sink = min(self.sink_frames, end)
        start = max(self.sink_frames, end - (self.context_frames - self.sink_frames))
        if end > self.num_frames or start < min(end, self.num_frames - self.ring_frames):
            raise ValueError(f"the cache, at frame {self.num_frames}, does not hold the context before frame {end}")
        if start >= end:
            return [(0, sink)]
        first = (start - self.sink_frames) % self.ring_frames + self.sink_frames
        count = end - start
        wrapped = first + count - self._first_scratch
        if count == self.ring_frames:  # all of the ring, in whatever order
            return [(0, self._first_scratch)]
        runs = [(first, min(first + count, self._first_scratch))]
        if wrapped > 0:
            runs.insert(0, (self.sink_frames, self.sink_frames + wrapped))
        if sink and runs[0][0] == sink:
            runs[0] = (0, runs[0][1])
        elif sink:
            runs.insert(0, (0, sink))
        return runs

    def reset(self) -> None:
        """Forget everything; the memory stays."""
        self.num_frames, self.closed = 0, False

    def close(self) -> None:
        """Take no further blocks."""
        self.closed = True

    def _placement(self, num_frames: int) -> Iterator[tuple[int, int, int]]:
        """Runs (first slot, first of the new frames, frames) that put the next `num_frames` frames into their slots.

        Frames that would be overwritten by later ones of the same block are left out.
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
                count = min(end - frame, self._first_scratch - slot)
            yield slot, frame - self.num_frames, count
            frame += count
