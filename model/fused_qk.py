"""Queries and keys of a self-attention from one projection, one norm and one rotation."""

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_wan import WanAttention
from torch import Tensor, nn

from model.plain_weights import WeightAddresses, is_plain
from model.rotary import rotate


class FusedQK:
    """Projects, normalises and rotates q and k together, with fewer and larger kernels. It computes no gradients.

    The parameters of the attention keep their names. They become views of the fused weights, so no memory is added and
    changes in place reach both. Other changes, such as a move to another device, give parameters new memory;
    `is_current` detects them.
    """

    def __init__(self, attn: WanAttention):
        self.heads, self.eps = attn.heads, attn.norm_q.eps
        self.weight = _joined(attn.to_q.weight, attn.to_k.weight).flatten(0, 1)  # [2 D, D]
        self.bias = _joined(attn.to_q.bias, attn.to_k.bias).flatten(0, 1)  # [2 D]
        self.norm = _joined(attn.norm_q.weight, attn.norm_k.weight)  # [2, D]
        self._addresses = WeightAddresses(attn, ("to_q", "to_k", "norm_q", "norm_k"))

    @staticmethod
    def supports(attn: WanAttention) -> bool:
        """Return whether the projections are plain; see `is_plain`."""
        return is_plain(attn.to_q) and is_plain(attn.to_k) and attn.to_q.weight.dtype == attn.to_k.weight.dtype

    def is_current(self) -> bool:
        """Return whether the parameters of the attention still are views of the fused weights."""
        return self._addresses.are_current()

    def __call__(self, x: Tensor, rope: Tensor) -> tuple[Tensor, Tensor]:
        """Return rotated q and k [B, N, heads, head_dim] of x [B, N, D]; `rope` is [N, 1, head_dim / 2, 2]."""
        qk = F.linear(x, self.weight, self.bias).unflatten(2, (2, -1))  # [B, N, 2, D]
        qk = F.rms_norm(qk, qk.shape[-1:], eps=self.eps) * self.norm
        q, k = rotate(qk.unflatten(3, (self.heads, -1)), rope.unsqueeze(1)).unbind(2)
        return q, k


def _joined(first: nn.Parameter, second: nn.Parameter) -> Tensor:
    """Return both parameters stacked, and make them views of the result."""
    stacked = torch.stack([first.data, second.data])
    first.data, second.data = stacked
    return stacked
