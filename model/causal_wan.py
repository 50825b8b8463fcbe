"""The causal Wan DiT: one network that runs a whole clip, or one block at a time against a KV cache.

Parameters, names and arithmetic are those of diffusers' `WanTransformer3DModel`, so Wan2.1 weights load unchanged and
the bidirectional mode equals it. The additions are one timestep per frame, positions without an upper limit, and
block-causal and cached attention.

Shapes: B batch, C channels, F frames, h and w latent size, N tokens, D width, L text tokens.
"""

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Any, cast

import torch
import torch.nn as nn
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.normalization import FP32LayerNorm
from diffusers.models.transformers.transformer_wan import WanTimeTextImageEmbedding
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from model.attention import (
    BlockCausalAttention,
    CachedAttention,
    FrameMask,
    FullAttention,
    SelfAttention,
    WriteThenDenoiseAttention,
)
from model.compilation import compile_layers
from model.conditioning import Conditioning, TextContext, Tokens, modulated_norm, scale_rows
from model.kv_cache import KVCache
from model.quantized_cache import new_kv_cache
from model.rotary import RotaryTables
from model.wan_layer import CausalWanLayer
from model.weights import align_weights_


class CausalWanModel(ModelMixin, ConfigMixin, PeftAdapterMixin, AttentionMixin):
    """Wan2.1's text-to-video DiT (arXiv 2503.20314, section 4.2) with full, block-causal or cached self-attention.

    The passes predict the flow noise - x0. Their common arguments:

        x: noisy latents [B, C, F, h, w], any dtype; converted to the network's.
        timestep: 1000 sigma, [B] for one per clip or [B, F] for one per frame; or the result of `condition`.
        text: prompt embeddings [B, L, text_dim], or the result of `encode_text`.
        first_frame: absolute index of x's first frame in the video, without an upper limit.
    """

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
        """The arguments are those of `WanTransformer3DModel`; `rope_max_seq_len` and `pos_embed_seq_len` are ignored.

        Raises:
            ValueError: for image-to-video sizes, patches of several frames, or a different norm of queries and keys.
        """
        super().__init__()
        if image_dim is not None or added_kv_proj_dim is not None:
            raise ValueError("these are the sizes of an image-to-video network; choose a text-to-video network")
        if patch_size[0] != 1 or qk_norm != "rms_norm_across_heads":
            raise ValueError("the causal DiT requires patches of one frame and RMS norm across heads")
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
        self._prepared = self._compiled = False
        self._rotary_tables = RotaryTables(attention_head_dim)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load a network as diffusers does, then move its weights to aligned memory; see `align_weights_`."""
        loaded = super().from_pretrained(*args, **kwargs)
        align_weights_(loaded[0] if isinstance(loaded, tuple) else loaded)  # a tuple with output_loading_info=True
        return loaded

    @property
    def layers(self) -> list[CausalWanLayer]:
        """The transformer layers. diffusers names them `blocks`; in this repository, a block is a group of frames."""
        return cast("list[CausalWanLayer]", list(self.blocks))

    # ---- the four passes ----

    def forward(
        self,
        x: Tensor,
        timestep: Tensor | Conditioning,
        text: Tensor | TextContext,
        *,
        first_frame: int = 0,
        causal: FrameMask | None = None,
    ) -> Tensor:
        """Predict the flow of a whole clip. The class describes the common arguments.

        Args:
            causal: mask for block-causal attention; its `positions` are the frames of x. With teacher forcing, x is the
                clean clip followed by the noisy clip along F. None: every token attends to all tokens.

        Returns:
            The flow [B, C, F, h, w] in the network's dtype.

        Raises:
            ValueError: if h or w is not a multiple of the patch size. All passes raise it.
        """
        text = self._text_context(text)
        tokens = self._embed(x, timestep, first_frame, None if causal is None else causal.positions)
        attention: SelfAttention = FullAttention(self._attention_backend)
        if causal is not None:
            attention = BlockCausalAttention(self._attention_backend, causal, tokens.grid[1] * tokens.grid[2])
        return self._head(self._run_layers(tokens, text, attention))

    def denoise_block(
        self,
        x: Tensor,
        timestep: Tensor | Conditioning,
        text: Tensor | TextContext,
        cache: KVCache,
        first_frame: int = 0,
        append: bool = False,
    ) -> Tensor:
        """Predict the flow [B, C, F, h, w] of one block, with the context in the cache.

        The class describes the common arguments.

        Args:
            append: also append the block's keys and values to the cache.

        Raises:
            ValueError: if `append` is set while autograd and gradient checkpointing are on.
        """
        checkpointing = self.gradient_checkpointing and torch.is_grad_enabled()
        if append:
            self._refuse_checkpointing()
        text = self._text_context(text)
        tokens = self._embed(x, timestep, first_frame)
        copy_context = checkpointing and not cache.frozen
        attention = CachedAttention(self._attention_backend, cache, first_frame, append, copy_context)
        tokens = self._run_layers(tokens, text, attention)
        if append:
            cache.commit(x.shape[2])
        return self._head(tokens)

    def write_block(
        self,
        x: Tensor,
        timestep: Tensor | Conditioning,
        text: Tensor | TextContext,
        cache: KVCache,
        first_frame: int = 0,
        read_frames: int | None = None,
    ) -> None:
        """Append the keys and values of one block to the cache. The class describes the common arguments.

        The pass ends with the keys and values of the last layer. Only a prediction needs the rest.

        Args:
            read_frames: newest frames of the context that the block attends to; None for all and the sink.

        Raises:
            ValueError: if autograd and gradient checkpointing are on.
        """
        self._refuse_checkpointing()
        text = self._text_context(text)
        tokens = self._embed(x, timestep, first_frame)
        attention = CachedAttention(self._attention_backend, cache, first_frame, append=True, read_frames=read_frames)
        tokens = self._run_layers(tokens, text, attention, end=len(self.layers) - 1)
        self._append_last_layer(tokens, cache)
        cache.commit(x.shape[2])

    def write_then_denoise(
        self,
        x: Tensor,
        timestep: Tensor | Conditioning,
        text: Tensor | TextContext,
        cache: KVCache,
        written_frames: int,
        first_frame: int = 0,
        read_frames: int | None = None,
    ) -> Tensor:
        """Run `write_block` on one block and `denoise_block` on the next block in one pass, without autograd.

        Args:
            x: both blocks along F.
            timestep: [B, F], or the result of `condition` for timesteps [1, 2] if both blocks are equally long.
            written_frames: frames of the first block, which is written.
            read_frames: see `write_block`.

        Returns:
            The flow of the second block.

        Raises:
            ValueError: if autograd is on.
        """
        if torch.is_grad_enabled():
            raise ValueError("a pass over two blocks appends to the cache; run it under torch.no_grad()")
        text = self._text_context(text)
        tokens = self._embed(x, timestep, first_frame)
        attention = WriteThenDenoiseAttention(self._attention_backend, cache, written_frames, read_frames)
        last = len(self.blocks) - 1
        tokens = self._run_layers(tokens, text, attention, end=last)
        self._append_last_layer(tokens.frames(0, written_frames), cache)
        tokens = tokens.frames(written_frames, x.shape[2])
        tokens = self._run_layers(tokens, text, attention.second_block, start=last)
        cache.commit(written_frames)
        return self._head(tokens)

    # ---- parts of the passes ----

    def encode_text(self, embeddings: Tensor) -> TextContext:
        """Return the cross-attention keys and values of prompt embeddings [B, L, text_dim]."""
        hidden = self.condition_embedder.text_embedder(embeddings.to(self._dtype))
        pairs = [layer.text_kv(hidden) for layer in self.layers]
        return TextContext([k for k, _ in pairs], [v for _, v in pairs])

    def embed_timestep(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Return embedding [B, f, D] and modulation [B, f, 6, D] of timesteps [B] (f = 1) or [B, f]."""
        embedder = self.condition_embedder
        timestep = timestep if timestep.ndim == 2 else timestep[:, None]
        sinusoid = embedder.timesteps_proj(timestep.flatten())
        weight = embedder.time_embedder.linear_1.weight
        time = embedder.time_embedder(sinusoid.to(weight.dtype)).to(self._dtype).unflatten(0, timestep.shape)
        return time, embedder.time_proj(embedder.act_fn(time)).unflatten(2, (6, -1))

    @torch.no_grad()
    def condition(self, timestep: Tensor) -> Conditioning:
        """Return everything that passes compute from timesteps [B] or [B, f]. Passes without autograd may share it.

        One timestep [1] serves batches and blocks of any size.
        """
        time, modulation = self.embed_timestep(timestep)
        rows = [layer.rows(modulation) for layer in self.layers]
        head = scale_rows(self.scale_shift_table, time.unsqueeze(2), scales=(1,))
        if timestep.numel() == 1:
            rows = [tuple(row.flatten() for row in layer) for layer in rows]
            head = tuple(row.flatten() for row in head)
        return Conditioning(modulation, head, tuple(rows))

    def _text_context(self, text: Tensor | TextContext) -> TextContext:
        return self.encode_text(text) if isinstance(text, Tensor) else text

    def _embed(
        self,
        x: Tensor,
        timestep: Tensor | Conditioning,
        first_frame: int,
        positions: Sequence[tuple[int, int]] | None = None,
    ) -> Tokens:
        """Embed x as tokens. `positions`: runs (frame relative to `first_frame`, frames) if x is not one run."""
        frames, height, width = x.shape[2:]
        _, patch_h, patch_w = self.config.patch_size
        if height % patch_h or width % patch_w:
            size, patch = f"{height}x{width}", f"{patch_h}x{patch_w}"
            raise ValueError(f"latents of {size} do not divide into patches of {patch}; change the size")
        grid = (frames, height // patch_h, width // patch_w)
        hidden = self.patch_embedding(x.to(self._dtype)).flatten(2).transpose(1, 2).contiguous()
        if isinstance(timestep, Tensor):
            time, modulation = self.embed_timestep(timestep)
            head = scale_rows(self.scale_shift_table, time.unsqueeze(2), scales=(1,))
            timestep = Conditioning(modulation, head)
        runs = tuple((first_frame + start, count) for start, count in positions or [(0, frames)])
        rope = self._rotary_tables.get(runs, grid[1:], hidden.device)
        if self._prepared:
            for layer in self.layers:
                layer.prepare_inference(plain=not self._compiled)
        return Tokens(hidden, timestep, rope, grid)

    def _run_layers(
        self, tokens: Tokens, text: TextContext, attention: SelfAttention, start: int = 0, end: int | None = None
    ) -> Tokens:
        """Run layers start to end - 1. Default: all layers."""
        checkpointing = self.gradient_checkpointing and torch.is_grad_enabled()
        hidden, layers = tokens.hidden, self.layers
        for index in range(start, len(layers) if end is None else end):
            modulation, layer = tokens.conditioning.of_layer(index), layers[index]
            arguments = (index, hidden, modulation, tokens.rope, text.k[index], text.v[index], attention)
            hidden = checkpoint(layer, *arguments, use_reentrant=False) if checkpointing else layer(*arguments)
        return replace(tokens, hidden=hidden)

    def _append_last_layer(self, tokens: Tokens, cache: KVCache) -> None:
        """Append the last layer's keys and values without running the rest of this layer."""
        last = len(self.blocks) - 1
        modulation = tokens.conditioning.of_layer(last)
        cache.append(last, *self.layers[last].kv(tokens.hidden, modulation, tokens.rope))

    def _head(self, tokens: Tokens) -> Tensor:
        """Project the last layer's output to the flow [B, C, F, h, w]."""
        frames, rows, columns = tokens.grid
        _, patch_h, patch_w = self.config.patch_size
        shift, scale = tokens.conditioning.head
        hidden = self.proj_out(modulated_norm(tokens.hidden, shift, scale, self.norm_out.eps))
        patches = hidden.view(-1, frames, rows, columns, patch_h, patch_w, self.config.out_channels)
        patches = patches.permute(0, 6, 1, 2, 4, 3, 5)  # [B, C, F, rows, patch_h, columns, patch_w]
        return patches.reshape(-1, self.config.out_channels, frames, rows * patch_h, columns * patch_w)

    def _refuse_checkpointing(self) -> None:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            raise ValueError("a checkpointed pass would append twice; write the context under torch.no_grad()")

    @property
    def _dtype(self) -> torch.dtype:
        """Dtype of the computation. diffusers' `dtype` is the same, but it searches all modules and is slow."""
        return self.patch_embedding.weight.dtype

    @property
    def _attention_backend(self) -> Any:
        return self.layers[0].attn1.processor._attention_backend

    # ---- setup ----

    def init_weights(self) -> None:
        """Initialise for training from scratch as Wan2.1 does: Xavier for linear layers, zeros for the head."""
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
        moving_sink: bool = False,
    ) -> KVCache:
        """Return an empty cache for latents of height x width, on this network's device; see `KVCache`.

        Args:
            dtype: default: the network's. 8-bit types: see `QuantizedKVCache`.
        """
        _, patch_h, patch_w = self.config.patch_size
        return new_kv_cache(
            num_layers=len(self.layers),
            batch_size=batch_size,
            num_heads=self.config.num_attention_heads,
            head_dim=self.config.attention_head_dim,
            tokens_per_frame=(height // patch_h) * (width // patch_w),
            context_frames=context_frames,
            block_frames=block_frames,
            sink_frames=sink_frames,
            history_frames=history_frames,
            moving_sink=moving_sink,
            dtype=dtype or self.dtype,
            device=self.device,
        )

    def prepare_inference(self) -> None:
        """Let all passes without autograd use the weights in a faster form; see `FusedQK` and `PlainLayer`."""
        self._prepared = True

    def compile_layers(self, fall_back: bool = True) -> None:
        """Compile all layers; see model/compilation.py for the arguments and errors."""
        compile_layers(self.layers, fall_back)
        self._compiled = True
