"""One transformer layer of the causal Wan DiT."""

import torch
import torch.nn as nn
from diffusers.models.attention import FeedForward
from diffusers.models.normalization import FP32LayerNorm
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor
from torch import Tensor

from model.attention import SelfAttention, attend
from model.conditioning import Rows, gated_sum, modulated_norm, scale_rows
from model.fused_qk import FusedQK
from model.plain_layer import PlainLayer
from model.rotary import rotate


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
        self.fused_qk: FusedQK | None = None
        self.plain: PlainLayer | None = None

    def forward(
        self,
        index: int,
        hidden: Tensor,
        modulation: Tensor | Rows,
        rope: Tensor,
        text_k: Tensor,
        text_v: Tensor,
        self_attention: SelfAttention,
    ) -> Tensor:
        """Return the layer's output [B, N, D].

        Args:
            index: index of this layer, passed to the self-attention.
            hidden: [B, N, D].
            modulation: [B, f, 6, D] with f = 1 or F, or the result of `rows`.
            rope: cosines and sines of the N positions, [N, 1, head_dim / 2, 2].
            text_k, text_v: the layer's cross-attention keys and values [B, L, heads, head_dim].
        """
        rows = self.rows(modulation)
        if self.plain is not None and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return self.plain(index, hidden, rows, rope, text_k, text_v, self_attention)
        q, k, v = self.qkv(hidden, rows, rope)
        return self.after_attention(hidden, self_attention(index, q, k, v), rows, text_k, text_v)

    def rows(self, modulation: Tensor | Rows) -> Rows:
        """Return the six rows of this layer; `Rows` describes them."""
        if isinstance(modulation, tuple):
            return modulation
        return scale_rows(self.scale_shift_table, modulation, scales=(1, 4))

    def qkv(self, hidden: Tensor, rows: Rows, rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return self-attention's q, k, v [B, N, heads, head_dim]; q and k are normalised and rotated."""
        normed = modulated_norm(hidden, rows[0], rows[1], self.norm1.eps)
        attn = self.attn1
        if self.fused_qk is not None and not torch.is_grad_enabled():
            q, k = self.fused_qk(normed, rope)
        else:
            q = rotate(split_heads(attn, attn.norm_q(attn.to_q(normed))), rope)
            k = rotate(split_heads(attn, attn.norm_k(attn.to_k(normed))), rope)
        return q, k, split_heads(attn, attn.to_v(normed))

    def kv(self, hidden: Tensor, modulation: Tensor | Rows, rope: Tensor) -> tuple[Tensor, Tensor]:
        """Return only the k and v of `qkv`. A context write needs nothing else from the last layer."""
        shift, scale, *_ = self.rows(modulation)
        normed = modulated_norm(hidden, shift, scale, self.norm1.eps)
        attn = self.attn1
        k = split_heads(attn, attn.norm_k(attn.to_k(normed)))
        return rotate(k, rope), split_heads(attn, attn.to_v(normed))

    def after_attention(self, hidden: Tensor, attended: Tensor, rows: Rows, text_k: Tensor, text_v: Tensor) -> Tensor:
        """Return the layer's output [B, N, D] from its input and self-attention's output [B, N, heads, head_dim]."""
        hidden = gated_sum(hidden, output_projection(self.attn1, attended), rows[2])

        attn = self.attn2
        q = split_heads(attn, attn.norm_q(attn.to_q(self.norm2(hidden))))
        attended = attend(q, text_k, text_v, attn.processor._attention_backend)
        hidden = hidden + output_projection(attn, attended)

        normed = modulated_norm(hidden, rows[3], rows[4], self.norm3.eps)
        return gated_sum(hidden, self.ffn(normed), rows[5])

    def text_kv(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Return cross-attention's keys and values [B, L, heads, head_dim] of projected text [B, L, D]."""
        attn = self.attn2
        return split_heads(attn, attn.norm_k(attn.to_k(text))), split_heads(attn, attn.to_v(text))

    def prepare_inference(self, plain: bool) -> None:
        """Choose the fastest form of passes without autograd. Later calls adapt to changed weights.

        Args:
            plain: use a `PlainLayer` if it is supported. False for a compiled layer.
        """
        changed = self.fused_qk is None or not self.fused_qk.is_current()
        if changed:
            self.fused_qk = FusedQK(self.attn1) if FusedQK.supports(self.attn1) else None
        if changed or (self.plain is not None and not (plain and self.plain.is_current())):
            fused = self.fused_qk
            self.plain = PlainLayer(self, fused) if plain and fused and PlainLayer.supports(self) else None


def split_heads(attn: WanAttention, x: Tensor) -> Tensor:
    """Return x [B, N, D] as [B, N, heads, head_dim]."""
    return x.view(x.shape[0], x.shape[1], attn.heads, -1)


def output_projection(attn: WanAttention, attended: Tensor) -> Tensor:
    """Project heads [B, N, heads, head_dim] back to [B, N, D]."""
    return attn.to_out[0](attended.flatten(2, 3))
