"""One transformer layer of the causal Wan DiT."""

import torch
import torch.nn as nn
from diffusers.models.attention import FeedForward
from diffusers.models.normalization import FP32LayerNorm
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor
from torch import Tensor

from model.attention import SelfAttention, attend
from model.rotary import Rope, rotate


class CausalWanLayer(nn.Module):
    """Modulated self-attention, cross-attention to the text, modulated feed-forward.

    Submodules and arithmetic are those of diffusers' `WanTransformerBlock`. Only the self-attention differs: the caller
    passes it in.
    """

    def __init__(self, dim: int, ffn_dim: int, num_heads: int, cross_attn_norm: bool, eps: float):
        super().__init__()
        head_dim = dim // num_heads
        self.norm1 = FP32LayerNorm(dim, eps, elementwise_affine=False)
        self.attn1 = WanAttention(dim, num_heads, head_dim, eps, processor=WanAttnProcessor())
        self.attn2 = WanAttention(
            dim, num_heads, head_dim, eps, cross_attention_dim_head=head_dim, processor=WanAttnProcessor()
        )
        self.norm2 = FP32LayerNorm(dim, eps, elementwise_affine=True) if cross_attn_norm else nn.Identity()
        self.ffn = FeedForward(dim, inner_dim=ffn_dim, activation_fn="gelu-approximate")
        self.norm3 = FP32LayerNorm(dim, eps, elementwise_affine=False)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def forward(
        self,
        index: int,
        hidden: Tensor,
        modulation: Tensor,
        rope: Rope,
        text_k: Tensor,
        text_v: Tensor,
        self_attention: SelfAttention,
    ) -> Tensor:
        """Return the layer's output [B, N, D].

        Args:
            index: index of this layer, passed to the self-attention.
            hidden: [B, N, D].
            modulation: [B, f, 6, D] with f = 1 or F.
            rope: cosines and sines of the N positions.
            text_k, text_v: the layer's cross-attention keys and values [B, L, heads, head_dim].
        """
        q, k, v = self.qkv(hidden, modulation, rope)
        return self.after_attention(hidden, self_attention(index, q, k, v), modulation, text_k, text_v)

    def qkv(self, hidden: Tensor, modulation: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """Return self-attention's q, k, v [B, N, heads, head_dim]; q and k are normalised and rotated."""
        normed = self._self_attention_input(hidden, modulation)
        attn = self.attn1
        q = attn.norm_q(attn.to_q(normed)).unflatten(2, (attn.heads, -1))
        k = attn.norm_k(attn.to_k(normed)).unflatten(2, (attn.heads, -1))
        v = attn.to_v(normed).unflatten(2, (attn.heads, -1))
        return rotate(q, *rope), rotate(k, *rope), v

    def kv(self, hidden: Tensor, modulation: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        """Return only the k and v of `qkv`. A context write needs nothing else from the last layer."""
        normed = self._self_attention_input(hidden, modulation)
        attn = self.attn1
        k = attn.norm_k(attn.to_k(normed)).unflatten(2, (attn.heads, -1))
        return rotate(k, *rope), attn.to_v(normed).unflatten(2, (attn.heads, -1))

    def after_attention(
        self, hidden: Tensor, attended: Tensor, modulation: Tensor, text_k: Tensor, text_v: Tensor
    ) -> Tensor:
        """Return the layer's output [B, N, D] from its input and self-attention's output [B, N, heads, head_dim]."""
        gate = self._modulation_row(modulation, 2)
        hidden = gated_sum(hidden, output_projection(self.attn1, attended), gate)

        normed = self.norm2(hidden.float()).type_as(hidden)
        attn = self.attn2
        q = attn.norm_q(attn.to_q(normed)).unflatten(2, (attn.heads, -1))
        attended = attend(q, text_k, text_v, attn.processor._attention_backend)
        hidden = hidden + output_projection(attn, attended)

        shift, scale, gate = (self._modulation_row(modulation, row) for row in (3, 4, 5))
        normed = modulate(self.norm3(hidden.float()), shift, scale).type_as(hidden)
        return gated_sum(hidden, self.ffn(normed), gate)

    def text_kv(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Return cross-attention's keys and values [B, L, heads, head_dim] of projected text [B, L, D]."""
        attn = self.attn2
        k = attn.norm_k(attn.to_k(text)).unflatten(2, (attn.heads, -1))
        return k, attn.to_v(text).unflatten(2, (attn.heads, -1))

    def _self_attention_input(self, hidden: Tensor, modulation: Tensor) -> Tensor:
        shift, scale = self._modulation_row(modulation, 0), self._modulation_row(modulation, 1)
        return modulate(self.norm1(hidden.float()), shift, scale).type_as(hidden)

    def _modulation_row(self, modulation: Tensor, row: int) -> Tensor:
        """Return one of six shifts, scales and gates, float32 [B, f, 1, D]."""
        return (self.scale_shift_table[:, row] + modulation[:, :, row].float()).unsqueeze(2)


def modulate(normed: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return normed (1 + scale) + shift, [B, N, D]; shift and scale are [B, f, 1, D], one row per N / f tokens."""
    batch, tokens, dim = normed.shape
    return (normed.view(batch, shift.shape[1], -1, dim) * (1 + scale) + shift).view(batch, tokens, dim)


def gated_sum(hidden: Tensor, update: Tensor, gate: Tensor) -> Tensor:
    """Return hidden + gate update, computed in float32, in the dtype of hidden; [B, N, D] with gate [B, f, 1, D]."""
    gated = update.float().view(*gate.shape[:2], -1, gate.shape[-1]) * gate
    return (hidden.float() + gated.view(hidden.shape)).type_as(hidden)


def output_projection(attn: WanAttention, attended: Tensor) -> Tensor:
    """Project heads [B, N, heads, head_dim] back to [B, N, D]."""
    return attn.to_out[0](attended.flatten(2, 3))
