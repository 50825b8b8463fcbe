"""Queries and keys of a self-attention from one projection, one norm and one rotation."""

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_wan import WanAttention
from torch import Tensor, nn

from model.cpu_kernels import rms_norm
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
        self._addresses = _addresses(attn)

    @staticmethod
    def supports(attn: WanAttention) -> bool:
        """Return whether the projections are plain: neither quantized, nor wrapped by an adapter, nor offloaded."""
        modules = attn.to_q, attn.to_k
        if any(
            type(m) is not nn.Linear or type(m.weight) is not nn.Parameter or hasattr(m, "_hf_hook") for m in modules
        ):
            return False
        return attn.to_q.weight.dtype == attn.to_k.weight.dtype and not attn.to_q.weight.is_meta

    def is_current(self, attn: WanAttention) -> bool:
        """Return whether the parameters of the attention still are views of the fused weights."""
        return type(attn.to_q) is type(attn.to_k) is nn.Linear and _addresses(attn) == self._addresses

    def __call__(self, x: Tensor, rope: Tensor) -> tuple[Tensor, Tensor]:
        """Return rotated q and k [B, N, heads, head_dim] of x [B, N, D]; `rope` is [N, 1, head_dim / 2, 2]."""
        qk = F.linear(x, self.weight, self.bias).unflatten(2, (2, -1))  # [B, N, 2, D]
        qk = rms_norm(qk, self.norm, self.eps)
        q, k = rotate(qk.unflatten(3, (self.heads, -1)), rope.unsqueeze(1)).unbind(2)
        return q, k


def _joined(first: nn.Parameter, second: nn.Parameter) -> Tensor:
    """Return both parameters stacked, and make them views of the result."""
    stacked = torch.stack([first.data, second.data])
    first.data, second.data = stacked
    return stacked


def _addresses(attn: WanAttention) -> tuple[int, ...]:
    parameters = attn.to_q.weight, attn.to_k.weight, attn.to_q.bias, attn.norm_q.weight
    return tuple(parameter.data_ptr() for parameter in parameters)
