"""A plain implementation of the causal Wan DiT with a KV cache, as the public code of Self-Forcing and HiAR has it.

It is the second baseline of the benchmark. It has the same weights and gives the same results as `CausalWanModel`, with
none of its optimisations:

- A block's keys and values go into the cache in every pass. When the window is full, each layer moves the older ones.
- Each layer reads the positions in its cache from tensors, so the host waits for the device.
- Each layer rotates queries and keys in complex128, and computes the table for its positions again.
- Each pass embeds the timesteps of all frames and the text, and each layer computes its modulation.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.causal_wan import CausalWanModel
from model.weight_names import DIT_NAMES, inverse, rename

LayerCache = dict[str, Tensor]
"""`k` and `v` [B, N, heads, head_dim]; `global_end` and `local_end`: the end of the last block in tokens of the video
and of the cache, one-element integer tensors on the device."""

MAX_FRAMES = 1024  # length of the table of rotations


class PlainCache:
    """Keys and values of a window of frames, the current block included, for every layer."""

    def __init__(self, network: "PlainNetwork", batch_size: int, tokens_per_frame: int, frames: int, sink_frames: int):
        """
        Args:
            frames: frames of the window.
            sink_frames: frames at the start of the video that stay in the window.
        """
        self.frames, self.tokens_per_frame = frames, tokens_per_frame
        self.sink_tokens = sink_frames * tokens_per_frame
        shape = (batch_size, frames * tokens_per_frame, network.num_heads, network.head_dim)
        self.layers: list[LayerCache] = [
            {name: torch.zeros(shape, dtype=network.dtype, device=network.device) for name in ("k", "v")}
            for _ in network.blocks
        ]
        self.reset()

    def reset(self) -> None:
        """Empty the cache."""
        for layer in self.layers:
            for name in ("global_end", "local_end"):
                layer[name] = torch.tensor([0], dtype=torch.long, device=layer["k"].device)


class PlainNetwork(nn.Module):
    """Wan's causal DiT. The names of its parameters are those of Wan's own code."""

    def __init__(self, config: Mapping[str, Any], table: Tensor):
        """
        Args:
            config: arguments of `CausalWanModel`.
            table: from `rotation_table`.
        """
        super().__init__()
        self.num_heads, self.head_dim = config["num_attention_heads"], config["attention_head_dim"]
        self.patch_size, self.channels = tuple(config["patch_size"]), config["out_channels"]
        dim = self.num_heads * self.head_dim
        self.freq_dim, self.table = config["freq_dim"], table
        self.patch_embedding = nn.Conv3d(config["in_channels"], dim, self.patch_size, self.patch_size)
        self.text_embedding = nn.Sequential(
            nn.Linear(config["text_dim"], dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(nn.Linear(self.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        sizes = dim, config["ffn_dim"], self.num_heads, config["cross_attn_norm"], config["eps"]
        self.blocks = nn.ModuleList(PlainLayer(*sizes) for _ in range(config["num_layers"]))
        self.head = PlainHead(dim, self.channels * math.prod(self.patch_size), config["eps"])

    @classmethod
    def sharing(cls, net: CausalWanModel) -> "PlainNetwork":
        """Return a plain network that shares the weights of `net`.

        All weights have one dtype, as in the public code: the few that `net` keeps in float32 are converted copies.
        """
        with torch.device("meta"):
            plain = cls(net.config, table=torch.empty(0))
        state = rename(net.state_dict(), inverse(DIT_NAMES))
        plain.load_state_dict({name: value.to(net.dtype) for name, value in state.items()}, assign=True)
        plain.table = rotation_table(net.config.attention_head_dim).to(net.device)
        return plain.eval().requires_grad_(False)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of all weights."""
        return self.patch_embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        """Device of all weights."""
        return self.patch_embedding.weight.device

    def forward(
        self, x: Tensor, timestep: Tensor, text: Tensor, cache: PlainCache, text_cache: list[LayerCache], start: int
    ) -> Tensor:
        """Predict the flow [B, C, F, h, w] of one block, and put its keys and values into the cache.

        Args:
            x: [B, C, F, h, w].
            timestep: [B, F].
            text: prompt embeddings [B, L, text_dim].
            text_cache: one dict per layer, empty at first; keeps the keys and values of the text.
            start: index of the block's first token in the video.
        """
        patches = [self.patch_embedding(clip.unsqueeze(0)) for clip in x]
        grids = torch.stack([torch.tensor(clip.shape[2:], dtype=torch.long) for clip in patches])
        hidden = torch.cat([clip.flatten(2).transpose(1, 2) for clip in patches])
        time = self.time_embedding(sinusoid(self.freq_dim, timestep.flatten()).type_as(hidden))
        modulation = self.time_projection(time).unflatten(1, (6, -1)).unflatten(0, timestep.shape)
        text = self.text_embedding(text)
        for layer, layer_cache, layer_text in zip(self.blocks, cache.layers, text_cache, strict=True):
            rope = grids, self.table
            hidden = layer(hidden, modulation, rope, text, layer_cache, layer_text, start, cache.sink_tokens)
        return self.unpatchify(self.head(hidden, time.unflatten(0, timestep.shape).unsqueeze(2)), grids)

    def unpatchify(self, hidden: Tensor, grids: Tensor) -> Tensor:
        """Return tokens [B, N, values of a patch] as clips [B, C, F, h, w]."""
        clips = []
        for tokens, grid in zip(hidden, grids.tolist(), strict=True):
            clip = torch.einsum("fhwtpqc->cfthpwq", tokens.view(*grid, *self.patch_size, self.channels))
            clips.append(clip.reshape(self.channels, *(n * p for n, p in zip(grid, self.patch_size, strict=True))))
        return torch.stack(clips)


class PlainLayer(nn.Module):
    """Self-attention with a cache, cross-attention to the text, feed-forward."""

    def __init__(self, dim: int, ffn_dim: int, num_heads: int, cross_attn_norm: bool, eps: float):
        super().__init__()
        self.norm1, self.norm2 = PlainLayerNorm(dim, eps), PlainLayerNorm(dim, eps)
        self.norm3 = PlainLayerNorm(dim, eps, elementwise_affine=True) if cross_attn_norm else nn.Identity()
        self.self_attn = PlainSelfAttention(dim, num_heads, eps)
        self.cross_attn = PlainCrossAttention(dim, num_heads, eps)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(ffn_dim, dim))
        self.modulation = nn.Parameter(torch.empty(1, 6, dim))

    def forward(
        self,
        hidden: Tensor,
        modulation: Tensor,
        rope: tuple[Tensor, Tensor],
        text: Tensor,
        cache: LayerCache,
        text_cache: LayerCache,
        start: int,
        sink_tokens: int,
    ) -> Tensor:
        """Return the layer's output [B, N, D]. The arguments are those of `PlainNetwork.forward`."""
        rows = (self.modulation.unsqueeze(1) + modulation).chunk(6, dim=2)  # [B, F, 1, D] each
        per_frame = (modulation.shape[1], hidden.shape[1] // modulation.shape[1])
        normed = self.norm1(hidden).unflatten(1, per_frame) * (1 + rows[1]) + rows[0]
        update = self.self_attn(normed.flatten(1, 2), rope, cache, start, sink_tokens)
        hidden = hidden + (update.unflatten(1, per_frame) * rows[2]).flatten(1, 2)
        hidden = hidden + self.cross_attn(self.norm3(hidden), text, text_cache)
        normed = self.norm2(hidden).unflatten(1, per_frame) * (1 + rows[4]) + rows[3]
        update = self.ffn(normed.flatten(1, 2))
        return hidden + (update.unflatten(1, per_frame) * rows[5]).flatten(1, 2)


class PlainAttention(nn.Module):
    """Projections of an attention with normalised queries and keys."""

    def __init__(self, dim: int, num_heads: int, eps: float):
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = PlainRMSNorm(dim, eps), PlainRMSNorm(dim, eps)

    def heads(self, x: Tensor) -> Tensor:
        """Return x [B, N, D] as [B, N, heads, head_dim]."""
        return x.view(*x.shape[:2], self.num_heads, -1)


class PlainSelfAttention(PlainAttention):
    """A block attends to the window in the cache, which holds the block itself."""

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], cache: LayerCache, start: int, sink_tokens: int
    ) -> Tensor:
        """Return the attention's output [B, N, D]. The arguments are those of `PlainLayer.forward`."""
        q, k, v = self.heads(self.norm_q(self.q(x))), self.heads(self.norm_k(self.k(x))), self.heads(self.v(x))
        grids, table = rope
        first_frame = start // int(math.prod(grids[0][1:]).item())  # type: ignore[attr-defined]
        q = rotate_complex(q, grids, table, first_frame).type_as(v)
        k = rotate_complex(k, grids, table, first_frame).type_as(v)

        count, end, size = k.shape[1], start + k.shape[1], cache["k"].shape[1]
        evicted = 0
        if end > cache["global_end"].item() and count + cache["local_end"].item() > size:
            evicted = count + int(cache["local_end"].item()) - size
            kept = int(cache["local_end"].item()) - evicted - sink_tokens
            for name in ("k", "v"):  # move what stays in the window to the front
                source = cache[name][:, sink_tokens + evicted : sink_tokens + evicted + kept].clone()
                cache[name][:, sink_tokens : sink_tokens + kept] = source
        local_end = int(cache["local_end"].item()) + end - int(cache["global_end"].item()) - evicted
        cache["k"][:, local_end - count : local_end] = k
        cache["v"][:, local_end - count : local_end] = v
        attended = plain_attention(q, cache["k"][:, :local_end], cache["v"][:, :local_end])
        cache["global_end"].fill_(end)
        cache["local_end"].fill_(local_end)
        return self.o(attended.flatten(2))


class PlainCrossAttention(PlainAttention):
    """A block attends to the text."""

    def forward(self, x: Tensor, text: Tensor, cache: LayerCache) -> Tensor:
        """Return the attention's output [B, N, D]. The first pass fills the empty cache."""
        q = self.heads(self.norm_q(self.q(x)))
        if not cache:
            cache["k"], cache["v"] = self.heads(self.norm_k(self.k(text))), self.heads(self.v(text))
        return self.o(plain_attention(q, cache["k"], cache["v"]).flatten(2))


class PlainHead(nn.Module):
    """Projection of the tokens to values of patches."""

    def __init__(self, dim: int, out_dim: int, eps: float):
        super().__init__()
        self.norm = PlainLayerNorm(dim, eps)
        self.head = nn.Linear(dim, out_dim)
        self.modulation = nn.Parameter(torch.empty(1, 2, dim))

    def forward(self, hidden: Tensor, time: Tensor) -> Tensor:
        """Return [B, N, values of a patch]; `time` is [B, F, 1, D]."""
        shift, scale = (self.modulation.unsqueeze(1) + time).chunk(2, dim=2)
        normed = self.norm(hidden).unflatten(1, (time.shape[1], -1))
        return self.head((normed * (1 + scale) + shift).flatten(1, 2))


class PlainLayerNorm(nn.LayerNorm):
    """Layer norm in the dtype of its input."""

    def __init__(self, dim: int, eps: float, elementwise_affine: bool = False):
        super().__init__(dim, eps, elementwise_affine)

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised x."""
        return super().forward(x).type_as(x)


class PlainRMSNorm(nn.Module):
    """RMS norm in float32."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised x."""
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).type_as(x) * self.weight


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return attention [B, N, heads, head_dim] by torch's default kernel."""
    attended = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return attended.transpose(1, 2).contiguous()


def sinusoid(dim: int, position: Tensor) -> Tensor:
    """Return the embedding [n, dim] of positions [n], computed in float64."""
    position, half = position.double(), dim // 2
    angles = torch.outer(position, 10000 ** -(torch.arange(half).to(position) / half))
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def rotation_table(head_dim: int) -> Tensor:
    """Return rotations of positions 0..MAX_FRAMES-1, complex128 [MAX_FRAMES, head_dim / 2]: time, height, width."""
    spatial = 2 * (head_dim // 6)
    angles = [
        torch.outer(torch.arange(MAX_FRAMES).double(), 10000 ** -(torch.arange(0, dim, 2).double() / dim))
        for dim in (head_dim - 2 * spatial, spatial, spatial)
    ]
    phases = torch.cat(angles, dim=1)
    return torch.polar(torch.ones_like(phases), phases)


def rotate_complex(x: Tensor, grids: Tensor, table: Tensor, first_frame: int) -> Tensor:
    """Rotate x [B, N, heads, head_dim] by the positions of its tokens, clip by clip, in complex128."""
    pairs, spatial = x.shape[3] // 2, x.shape[3] // 6
    time, height, width = table.split([pairs - 2 * spatial, spatial, spatial], dim=1)
    rotated = []
    for clip, (frames, rows, columns) in zip(x, grids.tolist(), strict=True):
        shape = frames, rows, columns, -1
        factors = torch.cat([
            time[first_frame : first_frame + frames].view(frames, 1, 1, -1).expand(shape),
            height[:rows].view(1, rows, 1, -1).expand(shape),
            width[:columns].view(1, 1, columns, -1).expand(shape),
        ], dim=-1)  # fmt: skip
        numbers = torch.view_as_complex(clip.double().reshape(clip.shape[0], x.shape[2], -1, 2))
        rotated.append(torch.view_as_real(numbers * factors.reshape(clip.shape[0], 1, -1)).flatten(2))
    return torch.stack(rotated)
