"""One lane: the keys and values of earlier blocks, for every layer, at one context level.

Keys are stored after RoPE with their absolute frame index, and attention does not care about the order of keys, so a
full window is a ring: the newest frames take the place of the oldest and nothing is moved.
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
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        """
        Args:
            context_frames: latent frames that are kept, the sink included; the window less the current block.
            block_frames: frames of the longest block that will be attended with or appended.
            sink_frames: frames at the start of the video that are never evicted.
        """
        assert 0 <= sink_frames <= context_frames
        self.tokens_per_frame = tokens_per_frame
        self.context_frames = context_frames
        self.sink_frames = sink_frames
        self.num_frames = 0  # ever appended; the next block starts at this frame if it appends to this lane
        tokens = (context_frames + block_frames) * tokens_per_frame
        shape = (num_layers, batch_size, tokens, num_heads, head_dim)
        self._k = torch.empty(shape, dtype=dtype, device=device)
        self._v = torch.empty(shape, dtype=dtype, device=device)

    @property
    def held_frames(self) -> int:
        """Frames that a read returns."""
        return min(self.num_frames, self.context_frames)

    @property
    def num_bytes(self) -> int:
        """Memory of the keys and values."""
        return 2 * self._k.numel() * self._k.element_size()

    def read(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the context, views [B, held tokens, heads, head_dim]."""
        tokens = self.held_frames * self.tokens_per_frame
        return self._k[layer, :, :tokens], self._v[layer, :, :tokens]

    def beside(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The context with a block's own k, v [B, tokens, heads, head_dim] behind it. The context is not changed.

        Without autograd the block is put into scratch slots and a view comes back; with it, a fresh tensor.
        """
        if torch.is_grad_enabled():
            past_k, past_v = self.read(layer)
            return torch.cat([past_k, k], dim=1), torch.cat([past_v, v], dim=1)
        start = self.held_frames * self.tokens_per_frame
        end = start + k.shape[1]
        self._k[layer, :, start:end] = k
        self._v[layer, :, start:end] = v
        return self._k[layer, :, :end], self._v[layer, :, :end]

    @torch.no_grad()
    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Put a block's k, v [B, tokens, heads, head_dim] of one layer into the lane; `commit` follows them all."""
        for slot, frame, count in self._placement(k.shape[1] // self.tokens_per_frame):
            to = slice(slot * self.tokens_per_frame, (slot + count) * self.tokens_per_frame)
            of = slice(frame * self.tokens_per_frame, (frame + count) * self.tokens_per_frame)
            self._k[layer, :, to] = k[:, of]
            self._v[layer, :, to] = v[:, of]

    def commit(self, num_frames: int) -> None:
        """Make `num_frames` frames that every layer has appended part of the context."""
        self.num_frames += num_frames

    def reset(self) -> None:
        """Forget everything; the memory stays."""
        self.num_frames = 0

    def _placement(self, num_frames: int) -> Iterator[tuple[int, int, int]]:
        """Runs (first slot, first of the new frames, frames) that put the next `num_frames` frames into their slots.

        Frames that would be overwritten by later ones of the same block are left out.
        """
        ring = self.context_frames - self.sink_frames
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
                count = min(end - frame, self.context_frames - slot)
            yield slot, frame - self.num_frames, count
            frame += count
