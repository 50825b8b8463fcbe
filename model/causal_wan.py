"""The causal Wan DiT: one network that runs bidirectionally, block-causally over a whole clip, or one block at a time
against a KV cache.

The parameters, their names and the arithmetic are those of diffusers' `WanTransformer3DModel`, so Wan2.1 weights load
as they are and the bidirectional mode equals it. What is ours: one timestep per frame, positions without an end, and
the three ways of attending.

Shapes: B batch, C channels, F frames, h and w latent height and width, P tokens per frame, N = F P tokens, D width.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol, cast

import torch
import torch.nn as nn
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin, FeedForward
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.normalization import FP32LayerNorm
from diffusers.models.transformers.transformer_wan import (
    WanAttention,
    WanAttnProcessor,
    WanTimeTextImageEmbedding,
)
from einops import rearrange
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from torch.utils.checkpoint import checkpoint

from model.kv_cache import KVCache
from model.weights import align_weights_


@dataclass(frozen=True)
class TextContext:
    """Keys and values of a prompt for every layer's cross-attention; computed once, shared by all caches and steps."""

    k: list[Tensor]  # per layer [B, text tokens, heads, head_dim]
    v: list[Tensor]


@dataclass(frozen=True)
class BlockCausal:
    """Which frames see which, when a whole clip goes through the network at once.

    A block sees itself, the sink, and as many frames before it as a `KVCache` of the same size would hold.

    With `beside_clean`, the clip stands twice in a row, clean and noisy: both halves have the same positions, and a
    noisy block sees the clean blocks before it instead of the noisy ones (teacher forcing).
    """

    blocks: tuple[int, ...]  # frames of each block
    context_frames: int | None = None  # frames before a block that it sees, the sink included; None: all
    sink_frames: int = 0
    beside_clean: bool = False

    @property
    def copies(self) -> int:
        """How often the clip stands in a row."""
        return 2 if self.beside_clean else 1

    def visible(self) -> list[tuple[int, int, list[tuple[int, int]]]]:
        """Per block (first frame, end frame, frame ranges that it sees)."""
        result = []
        start = 0
        for frames in self.blocks:
            sink = min(self.sink_frames, start)
            oldest = 0 if self.context_frames is None else max(0, start - (self.context_frames - self.sink_frames))
            seen = [(0, sink), (max(oldest, sink), start + frames)] if oldest > sink else [(0, start + frames)]
            result.append((start, start + frames, [r for r in seen if r[0] < r[1]]))
            start += frames
        if self.beside_clean:
            for first, end, seen in result[: len(self.blocks)]:
                past = [(a, min(b, first)) for a, b in seen if a < first]
                result.append((start + first, start + end, [*past, (start + first, start + end)]))
        return result


class Attend(Protocol):
    """How a layer's queries meet keys and values: all [B, N, heads, head_dim]."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...


class CausalWanModel(ModelMixin, ConfigMixin, PeftAdapterMixin, AttentionMixin):
    """Wan2.1's text-to-video DiT with cached, block-causal or bidirectional self-attention (arXiv 2503.20314, 4.2)."""

    _supports_gradient_checkpointing = True
    _no_split_modules = ["CausalWanLayer"]  # noqa: RUF012
    _repeated_blocks = ["CausalWanLayer"]  # noqa: RUF012
    _skip_layerwise_casting_patterns = ["patch_embedding", "condition_embedder", "norm"]  # noqa: RUF012
    _keep_in_fp32_modules = ["time_embedder", "scale_shift_table", "norm1", "norm2", "norm3"]  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = ["norm_added_q"]  # noqa: RUF012

    @register_to_config
    def __init__(
        self,
        patch_size: tuple[int, int, int] = (1, 2, 2),
        num_attention_heads: int = 12,
        attention_head_dim: int = 128,
        in_channels: int = 16,
        out_channels: int = 16,
        text_dim: int = 4096,
        freq_dim: int = 256,
        ffn_dim: int = 8960,
        num_layers: int = 30,
        cross_attn_norm: bool = True,
        qk_norm: str | None = "rms_norm_across_heads",
        eps: float = 1e-6,
        image_dim: int | None = None,
        added_kv_proj_dim: int | None = None,
        rope_max_seq_len: int = 1024,
        pos_embed_seq_len: int | None = None,
    ):
        """The arguments are those of `WanTransformer3DModel`; `rope_max_seq_len` is accepted and not needed."""
        super().__init__()
        if image_dim is not None or added_kv_proj_dim is not None:
            raise ValueError("this is an image-to-video checkpoint; the causal DiT takes text-to-video ones")
        if patch_size[0] != 1 or qk_norm != "rms_norm_across_heads":
            raise ValueError("the causal DiT needs patches of one frame and RMS norm across heads")
        dim = num_attention_heads * attention_head_dim
        self.patch_embedding = nn.Conv3d(in_channels, dim, kernel_size=patch_size, stride=patch_size)
        self.condition_embedder = WanTimeTextImageEmbedding(
            dim=dim, time_freq_dim=freq_dim, time_proj_dim=dim * 6, text_embed_dim=text_dim
        )
        self.blocks = nn.ModuleList(
            CausalWanLayer(dim, ffn_dim, num_attention_heads, cross_attn_norm, eps) for _ in range(num_layers)
        )
        self.norm_out = FP32LayerNorm(dim, eps, elementwise_affine=False)
        self.proj_out = nn.Linear(dim, out_channels * prod(patch_size))
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)
        self.gradient_checkpointing = False

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load a network as diffusers does, with its weights in aligned memory so that results have the same bits."""
        loaded = super().from_pretrained(*args, **kwargs)
        align_weights_(loaded[0] if isinstance(loaded, tuple) else loaded)  # a tuple with output_loading_info=True
        return loaded

    @property
    def layers(self) -> "list[CausalWanLayer]":
        """The transformer layers; diffusers names them blocks, a word that means frames here."""
        return cast("list[CausalWanLayer]", list(self.blocks))

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        text: Tensor | TextContext,
        *,
        first_frame: int = 0,
        causal: BlockCausal | None = None,
        cache: KVCache | None = None,
        write: bool = False,
        head: bool = True,
        written: int = 0,
    ) -> Tensor | None:
        """Predict the flow of x.

        Args:
            x: [B, C, F, h, w], any dtype; computed in the network's.
            timestep: 1000 sigma, [B] for one per clip or [B, F] for one per frame.
            text: prompt embeddings [B, L, text_dim], or what `encode_text` made of them.
            first_frame: absolute index of x's first frame in the video, without an upper limit.
            causal: block-causal attention over the whole of x, which is [clean; noisy] if it says `beside_clean`.
                Without it and without a cache, every token sees all.
            cache: x is one block, which sees the cache's context before `first_frame` and itself.
            write: append this block's keys and values to the cache.
            head: false to leave out what only the prediction needs: the head, and all but the keys and values of the
                last layer. Nothing is returned then.
            written: the first so many frames of x are a block of their own, whose keys and values are appended to the
                cache; the frames after them are the next block, which sees it. Timesteps are per frame then.

        Returns:
            The flow noise - x0, [B, C, F, h, w] in the network's dtype; None without the head, and without the frames
            that were only written.
        """
        frames, height, width = x.shape[2:]
        _, patch_h, patch_w = self.config.patch_size
        grid = (frames, height // patch_h, width // patch_w)
        if height % patch_h or width % patch_w:
            raise ValueError(f"latents of {height}x{width} do not divide into patches of {patch_h}x{patch_w}")
        if cache is not None and causal is not None:
            raise ValueError("a cached block is causal by its cache; `causal` is for whole clips")
        if not head and (cache is None or not write):
            raise ValueError("without its head a forward only writes: give a cache, and write=True")
        checkpointing = self.gradient_checkpointing and torch.is_grad_enabled()
        if written and (cache is None or write or not head or timestep.ndim == 1 or torch.is_grad_enabled()):
            raise ValueError("`written` frames need a cache, timesteps per frame, a head, and no autograd")
        if checkpointing and write:
            raise ValueError("a checkpointed forward runs twice and would write twice; write the context without grad")
        if isinstance(text, Tensor):
            text = self.encode_text(text)

        hidden = self.patch_embedding(x.to(self.dtype)).flatten(2).transpose(1, 2).contiguous()
        time, modulation = self.embed_timestep(timestep)
        copies = causal.copies if causal is not None else 1
        once = (frames // copies, *grid[1:])
        rope = rotary_table(self.config.attention_head_dim, first_frame, once, hidden.device)
        if copies > 1:
            rope = rope[0].repeat(copies, 1, 1), rope[1].repeat(copies, 1, 1)
        per_frame = grid[1] * grid[2]
        attend = self._attend(causal, cache, write, checkpointing, first_frame, per_frame, written)

        for index, layer in enumerate(self.layers):
            if index == len(self.layers) - 1 and (written or not head):
                # Of frames that are only written, the last layer gives its keys and values and nothing else.
                assert cache is not None
                tokens = written * per_frame if head else hidden.shape[1]
                own = slice(None) if modulation.shape[1] == 1 else slice(tokens // per_frame)
                k, v = layer.kv(hidden[:, :tokens], modulation[:, own], (rope[0][:tokens], rope[1][:tokens]))
                cache.append(index, k, v)
                if not head:
                    break
                hidden, modulation, time = hidden[:, tokens:], modulation[:, written:], time[:, written:]
                rope = rope[0][tokens:], rope[1][tokens:]
            arguments = (index, hidden, modulation, rope, text.k[index], text.v[index], attend)
            hidden = checkpoint(layer, *arguments, use_reentrant=False) if checkpointing else layer(*arguments)
        if cache is not None and (write or written):
            cache.commit(written or frames)
        if not head:
            return None

        # [1, 2, D] + [B, f, 1, D], f timesteps per clip: one or F.
        shift, scale = (self.scale_shift_table + time.unsqueeze(2)).chunk(2, dim=2)
        hidden = modulate(self.norm_out(hidden.float()), shift, scale).type_as(hidden)
        return rearrange(
            self.proj_out(hidden),
            "b (f h w) (ph pw c) -> b c f (h ph) (w pw)",
            f=frames - written, h=grid[1], w=grid[2], ph=patch_h, pw=patch_w,
        )  # fmt: skip

    def encode_text(self, embeddings: Tensor) -> TextContext:
        """Cross-attention keys and values of prompt embeddings [B, L, text_dim]."""
        hidden = self.condition_embedder.text_embedder(embeddings.to(self.dtype))
        pairs = [layer.text_kv(hidden) for layer in self.layers]
        return TextContext([k for k, _ in pairs], [v for _, v in pairs])

    def embed_timestep(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Embedding [B, f, D] and modulation [B, f, 6, D] of timesteps [B] (f = 1) or [B, f]."""
        embedder = self.condition_embedder
        per_clip = timestep if timestep.ndim == 2 else timestep[:, None]
        sinusoid = embedder.timesteps_proj(per_clip.flatten())
        weight = embedder.time_embedder.linear_1.weight
        time = embedder.time_embedder(sinusoid.to(weight.dtype)).to(self.dtype).unflatten(0, per_clip.shape)
        return time, embedder.time_proj(embedder.act_fn(time)).unflatten(2, (6, -1))

    def init_weights(self) -> None:
        """Initialise for training from nothing, as Wan does: Xavier for linear layers, a head that starts at zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embedding.weight.flatten(1))
        nn.init.zeros_(self.proj_out.weight)

    def new_cache(
        self,
        batch_size: int,
        height: int,
        width: int,
        context_frames: int,
        block_frames: int,
        sink_frames: int = 0,
        history_frames: int = 0,
        dtype: torch.dtype | None = None,
    ) -> KVCache:
        """An empty cache for latents of height x width, on this network's device and in its dtype if in no other."""
        _, patch_h, patch_w = self.config.patch_size
        return KVCache(
            num_layers=len(self.layers),
            batch_size=batch_size,
            num_heads=self.config.num_attention_heads,
            head_dim=self.config.attention_head_dim,
            tokens_per_frame=(height // patch_h) * (width // patch_w),
            context_frames=context_frames,
            block_frames=block_frames,
            sink_frames=sink_frames,
            history_frames=history_frames,
            dtype=dtype or self.dtype,
            device=self.device,
        )

    def compile_layers(self, fall_back: bool = True) -> None:
        """torch.compile what surrounds attention in every layer; the cache's changing lengths stay outside of it.

        Args:
            fall_back: where it cannot be compiled, say so once and run the layers as they are; false to have the error.
        """
        compiled = _OrAsItIs() if fall_back else torch.compile
        for layer in self.layers:
            layer.qkv = compiled(layer.qkv)  # type: ignore[method-assign]
            layer.after_attention = compiled(layer.after_attention)  # type: ignore[method-assign]

    def _attend(
        self,
        causal: BlockCausal | None,
        cache: KVCache | None,
        write: bool,
        checkpointing: bool,
        first_frame: int,
        tokens_per_frame: int,
        written: int,
    ) -> Attend:
        """The way of attending that this forward takes."""

        backend = self.layers[0].attn1.processor._attention_backend

        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return dispatch_attention_fn(q, k, v, backend=backend).type_as(q)

        def full(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attention(q, k, v)

        def block_causal(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            # Block by block over plain slices: no mask, so every backend serves, and nothing hidden is computed.
            assert causal is not None
            outputs = []
            for start, end, seen in causal.visible():
                ranges = [slice(a * tokens_per_frame, b * tokens_per_frame) for a, b in seen]
                keys = torch.cat([k[:, r] for r in ranges], dim=1) if len(ranges) > 1 else k[:, ranges[0]]
                values = torch.cat([v[:, r] for r in ranges], dim=1) if len(ranges) > 1 else v[:, ranges[0]]
                outputs.append(attention(q[:, start * tokens_per_frame : end * tokens_per_frame], keys, values))
            return torch.cat(outputs, dim=1)

        def cached(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            assert cache is not None
            if past is not None:
                keys, values = torch.cat([past[layer][0], k], dim=1), torch.cat([past[layer][1], v], dim=1)
            else:
                keys, values = cache.beside(layer, k, v, before)
            output = attention(q, keys, values)
            if write:
                cache.append(layer, k, v)
            return output

        def write_then_attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            assert cache is not None
            tokens = written * tokens_per_frame if layer < len(self.layers) - 1 else 0  # the last has appended already
            outputs = []
            if tokens:
                context = k[:, :tokens], v[:, :tokens]
                outputs.append(attention(q[:, :tokens], *cache.beside(layer, *context)))
                cache.append(layer, *context)
            keys, values = cache.beside(layer, k[:, tokens:], v[:, tokens:], appended=written)
            outputs.append(attention(q[:, tokens:], keys, values))
            return torch.cat(outputs, dim=1)

        if cache is None:
            return full if causal is None else block_causal
        if written:
            return write_then_attend
        # A cache that has gone past this block already is read as it was before it.
        before = min(first_frame, cache.num_frames)
        # A checkpointed layer reads its context again in the backward pass, when an open cache has moved on.
        past = None
        if checkpointing and not cache.closed:
            past = [tuple(x.clone() for x in cache.read(layer, before)) for layer in range(len(self.layers))]
        return cached


class _OrAsItIs:
    """torch.compile for several functions; none of them runs compiled any more once it has failed for one."""

    def __init__(self) -> None:
        self._failed = False

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        compiled = torch.compile(function)

        def run(*arguments: Any) -> Any:
            if not self._failed:
                try:
                    return compiled(*arguments)
                except TorchDynamoException as error:  # compiling has failed, and nothing has run yet
                    self._failed = True
                    print(f"note: layers run uncompiled: {compile_failure(error)}", file=sys.stderr, flush=True)
            return function(*arguments)

        return run


def compile_failure(error: TorchDynamoException) -> str:
    """One line on why torch.compile has failed."""
    cause = getattr(error, "inner_exception", error)
    return f"{type(cause).__name__}: {next(iter(str(cause).splitlines()), '')}"


class CausalWanLayer(nn.Module):
    """One layer: modulated self-attention, cross-attention to the text, modulated feed-forward.

    The submodules are those of diffusers' `WanTransformerBlock`; only what happens between q, k, v and the attention's
    output differs from it, and that is the caller's `attend`.
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
        rope: tuple[Tensor, Tensor],
        text_k: Tensor,
        text_v: Tensor,
        attend: Attend,
    ) -> Tensor:
        """hidden [B, N, D], modulation [B, f, 6, D] with f = 1 or F, text_k and text_v [B, L, heads, head_dim]."""
        q, k, v = self.qkv(hidden, modulation, rope)
        return self.after_attention(hidden, attend(index, q, k, v), modulation, text_k, text_v)

    def qkv(self, hidden: Tensor, modulation: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Self-attention's q, k, v [B, N, heads, head_dim]; q and k normalised and rotated."""
        normed = self._normed(hidden, modulation)
        attn = self.attn1
        q = attn.norm_q(attn.to_q(normed)).unflatten(2, (attn.heads, -1))
        k = attn.norm_k(attn.to_k(normed)).unflatten(2, (attn.heads, -1))
        v = attn.to_v(normed).unflatten(2, (attn.heads, -1))
        return rotate(q, *rope), rotate(k, *rope), v

    def kv(self, hidden: Tensor, modulation: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Only the k and v of `qkv`: all that a context pass needs of the last layer."""
        normed = self._normed(hidden, modulation)
        attn = self.attn1
        k = attn.norm_k(attn.to_k(normed)).unflatten(2, (attn.heads, -1))
        return rotate(k, *rope), attn.to_v(normed).unflatten(2, (attn.heads, -1))

    def _normed(self, hidden: Tensor, modulation: Tensor) -> Tensor:
        """What self-attention sees of the tokens."""
        shift, scale = self.modulation_part(modulation, 0), self.modulation_part(modulation, 1)
        return modulate(self.norm1(hidden.float()), shift, scale).type_as(hidden)

    def after_attention(
        self, hidden: Tensor, attended: Tensor, modulation: Tensor, text_k: Tensor, text_v: Tensor
    ) -> Tensor:
        """The rest of the layer, from self-attention's output [B, N, heads, head_dim] on."""
        gate = self.modulation_part(modulation, 2)
        hidden = gated_sum(hidden, output_projection(self.attn1, attended), gate)

        normed = self.norm2(hidden.float()).type_as(hidden)
        attn = self.attn2
        q = attn.norm_q(attn.to_q(normed)).unflatten(2, (attn.heads, -1))
        seen = dispatch_attention_fn(q, text_k, text_v, backend=attn.processor._attention_backend).type_as(q)
        hidden = hidden + output_projection(attn, seen)

        shift, scale, gate = (self.modulation_part(modulation, part) for part in (3, 4, 5))
        normed = modulate(self.norm3(hidden.float()), shift, scale).type_as(hidden)
        return gated_sum(hidden, self.ffn(normed), gate)

    def text_kv(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-attention's keys and values [B, L, heads, head_dim] of projected text [B, L, D]."""
        attn = self.attn2
        k = attn.norm_k(attn.to_k(text)).unflatten(2, (attn.heads, -1))
        return k, attn.to_v(text).unflatten(2, (attn.heads, -1))

    def modulation_part(self, modulation: Tensor, part: int) -> Tensor:
        """Shift, scale or gate number `part`, float32 [B, f, 1, D]."""
        return (self.scale_shift_table[:, part] + modulation[:, :, part].float()).unsqueeze(2)


def modulate(normed: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """normed [B, N, D] (1 + scale) + shift, with scale and shift [B, f, 1, D] of f equal runs of tokens."""
    batch, tokens, dim = normed.shape
    return (normed.view(batch, shift.shape[1], -1, dim) * (1 + scale) + shift).view(batch, tokens, dim)


def gated_sum(hidden: Tensor, update: Tensor, gate: Tensor) -> Tensor:
    """hidden + gate update, in float32, back in hidden's dtype; [B, N, D] with gate [B, f, 1, D]."""
    gated = update.float().view(*gate.shape[:2], -1, gate.shape[-1]) * gate
    return (hidden.float() + gated.view(hidden.shape)).type_as(hidden)


def output_projection(attn: WanAttention, attended: Tensor) -> Tensor:
    """Heads [B, N, heads, head_dim] back to [B, N, D]."""
    return attn.to_out[0](attended.flatten(2, 3))


def rotary_table(
    head_dim: int, first_frame: int, grid: tuple[int, int, int], device: torch.device, theta: float = 10000.0
) -> tuple[Tensor, Tensor]:
    """Cosines and sines, float32 [N, 1, head_dim / 2], of the token positions of `grid` (frames, rows, columns).

    Pairs of channels are split over (time, height, width) as Wan does; frames count from `first_frame` on. Angles are
    computed in float64 for any position, so that no table ends.
    """
    spatial = 2 * (head_dim // 6)
    exact = torch.device("cpu") if device.type == "mps" else device  # MPS has no float64
    angles = []
    for axis, (size, dim) in enumerate(zip(grid, (head_dim - 2 * spatial, spatial, spatial), strict=True)):
        start = first_frame if axis == 0 else 0
        position = torch.arange(start, start + size, dtype=torch.float64, device=exact)
        frequency = theta ** -(torch.arange(0, dim, 2, dtype=torch.float64, device=exact) / dim)
        shape = [1, 1, 1, dim // 2]
        shape[axis] = size
        angles.append(torch.outer(position, frequency).view(shape).expand(*grid, dim // 2))
    table = torch.cat(angles, dim=-1).flatten(0, 2).unsqueeze(1)
    return table.cos().float().to(device), table.sin().float().to(device)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [B, N, heads, head_dim]: neighbouring channels are the pairs (arXiv 2104.09864)."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).type_as(x)
