"""A layer of the causal DiT for float32 on a CPU without autograd, with as little overhead as possible."""

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import SelfAttention, attend
from model.conditioning import Rows, gated_sum, modulated_norm
from model.cpu_kernels import linear, rms_norm_, rotate_, tanh_gelu
from model.fused_qk import FusedQK
from model.plain_weights import WeightAddresses, is_plain

if TYPE_CHECKING:
    from model.wan_layer import CausalWanLayer

_LINEARS = ("attn1.to_v", "attn1.to_out.0", "attn2.to_q", "attn2.to_out.0", "ffn.net.0.proj", "ffn.net.2")
_NORMS = ("attn2.norm_q", "norm2")


class PlainLayer:
    """The weights of a `CausalWanLayer` and a pass with changes in place.

    In a small network, calls of modules, new tensors and slow kernels take half as long as the matrix products.
    """

    def __init__(self, layer: "CausalWanLayer", fused_qk: FusedQK):
        linears: list[Any] = [layer.get_submodule(name) for name in _LINEARS]
        pairs: list[tuple[Tensor, Tensor]] = [(module.weight, module.bias) for module in linears]
        self.v, self.out, self.cross_q, self.cross_out, self.expand, self.contract = pairs
        self.cross_norm = layer.attn2.norm_q.weight
        norm2: Any = layer.norm2
        self.norm2_weight, self.norm2_bias = norm2.weight, norm2.bias
        self.fused_qk, self.heads = fused_qk, layer.attn1.heads
        self.eps, self.cross_eps = layer.norm1.eps, layer.attn2.norm_q.eps
        self.cross_processor = layer.attn2.processor
        self._addresses = WeightAddresses(layer, (*_LINEARS, *_NORMS))

    @staticmethod
    def supports(layer: "CausalWanLayer") -> bool:
        """Return whether all weights are plain, and float32 on a CPU; see `is_plain`."""
        if not isinstance(layer.norm2, nn.LayerNorm) or not all(is_plain(layer.get_submodule(n)) for n in _LINEARS):
            return False
        return all(weight.dtype == torch.float32 and weight.device.type == "cpu" for weight in layer.parameters())

    def is_current(self) -> bool:
        """Return whether the weights still are those of the layer."""
        return self._addresses.are_current()

    def __call__(
        self,
        index: int,
        hidden: Tensor,
        rows: Rows,
        rope: Tensor,
        text_k: Tensor,
        text_v: Tensor,
        self_attention: SelfAttention,
    ) -> Tensor:
        """Return the layer's output; `CausalWanLayer.forward` describes the arguments."""
        batch, tokens, dim = hidden.shape
        by_head, qk = (batch, tokens, self.heads, -1), self.fused_qk

        normed = modulated_norm(hidden, rows[0], rows[1], self.eps)
        both = rms_norm_(linear(normed, qk.weight, qk.bias).view(batch, tokens, 2, dim), qk.norm, qk.eps)
        q, k = rotate_(both.view(batch, tokens, 2, self.heads, -1), rope.unsqueeze(1)).unbind(2)
        attended = self_attention(index, q, k, linear(normed, *self.v).view(by_head))
        hidden = gated_sum(hidden, linear(attended.flatten(2), *self.out), rows[2])

        normed = F.layer_norm(hidden, (dim,), self.norm2_weight, self.norm2_bias, self.eps)
        q = rms_norm_(linear(normed, *self.cross_q), self.cross_norm, self.cross_eps)
        attended = attend(q.view(by_head), text_k, text_v, self.cross_processor._attention_backend)
        hidden = linear(attended.flatten(2), *self.cross_out).add_(hidden)

        normed = modulated_norm(hidden, rows[3], rows[4], self.eps)
        return gated_sum(hidden, linear(tanh_gelu(linear(normed, *self.expand)), *self.contract), rows[5])
