"""Self-attention over a full window of context: every block has the same shapes, so a layer is compiled as a whole."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.attention import CachedAttention, SecondBlockAttention, SelfAttention, attend


@dataclass(frozen=True)
class FullWindow:
    """Self-attention of one block over one layer's slots of a full window.

    A block writes its keys and values straight into the scratch slots. A compiled layer must not write to the cache
    a second time, because Inductor would then copy all slots. So the caller appends the block, from the scratch slots.
    """

    backend: Any
    keys: Tensor  # [B, slots, heads, head_dim]: the context, then the scratch slots
    values: Tensor
    context: int  # tokens of context

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        end = self.context + k.shape[1]
        self.keys[:, self.context : end] = k
        self.values[:, self.context : end] = v
        return attend(q, self.keys[:, :end], self.values[:, :end], self.backend)

    def block(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Return the keys and values [B, tokens, heads, head_dim] of the latest block."""
        slots = slice(self.context, self.context + tokens)
        return self.keys[:, slots], self.values[:, slots]


def full_window(attention: SelfAttention, layer: int) -> FullWindow | None:
    """Return the full window that one block attends to in a layer; None for any other attention."""
    if torch.is_grad_enabled() or not isinstance(attention, (CachedAttention, SecondBlockAttention)):
        return None
    if isinstance(attention, CachedAttention):
        whole_context = attention.read_frames is None and attention.before == attention.cache.num_frames
        if attention.copied_context is not None or not whole_context:
            return None
    cache = attention.cache
    if not cache.is_full_window():
        return None
    return FullWindow(attention.backend, *cache.slots(layer), cache.context_frames * cache.tokens_per_frame)
