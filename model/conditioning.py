"""What a pass computes once for all layers: text keys and values, modulation by the noise level, and positions."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Rows = tuple[Tensor, ...]
"""Shifts, scales and gates in float32: each [D] for one noise level, or [B, f, 1, D] for one row per N / f tokens.

A layer has six rows: shift, 1 + scale and gate of the self-attention, then of the feed-forward. The head has two:
shift and 1 + scale.
"""


@dataclass(frozen=True)
class TextContext:
    """Cross-attention keys and values of a prompt; computed once and shared by all caches and steps."""

    k: list[Tensor]  # per layer [B, L, heads, head_dim]
    v: list[Tensor]


@dataclass(frozen=True)
class Conditioning:
    """The effect of the noise levels on every layer. It does not depend on the latents, so passes can share it."""

    modulation: Tensor  # [B, f, 6, D]; f = 1 for one noise level per clip, F for one per frame
    head: Rows
    layers: tuple[Rows, ...] = ()  # empty: every layer computes its rows from `modulation`

    def of_layer(self, index: int) -> Tensor | Rows:
        """Return the argument `modulation` of a layer."""
        return self.layers[index] if self.layers else self.modulation

    def part(self, start: int, end: int, frames: int) -> "Conditioning":
        """Return the conditioning of frames start to end - 1 of a pass over `frames` frames."""
        rows = self.modulation.shape[1]
        if rows == 1:
            return self
        span = slice(start * rows // frames, end * rows // frames)
        return Conditioning(self.modulation[:, span], tuple(row[:, span] for row in self.head))


@dataclass(frozen=True)
class Tokens:
    """Tokens of a clip between two layers, with everything that all layers read except for the text."""

    hidden: Tensor  # [B, N, D]
    conditioning: Conditioning
    rope: Tensor  # cosines and sines of the N positions, [N, 1, head_dim / 2, 2]
    grid: tuple[int, int, int]  # frames, rows, columns

    def frames(self, start: int, end: int) -> "Tokens":
        """Return the tokens of frames start to end - 1."""
        frames, rows, columns = self.grid
        tokens = slice(start * rows * columns, end * rows * columns)
        part = self.conditioning.part(start, end, frames)
        return Tokens(self.hidden[:, tokens], part, self.rope[tokens], (end - start, rows, columns))


def scale_rows(table: Tensor, modulation: Tensor, scales: Sequence[int]) -> Rows:
    """Return the rows [B, f, 1, D] of a table [1, r, D] and a modulation [B, f, r, D] by noise levels.

    Args:
        scales: rows to which 1 is added.
    """
    rows = list((table.unsqueeze(1) + modulation.float()).unsqueeze(3).unbind(2))
    for scale in scales:
        rows[scale] = 1 + rows[scale]
    return tuple(rows)


def modulated_norm(hidden: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Return the layer norm of hidden [B, N, D], times scale plus shift, computed in float32; `Rows` has the shapes."""
    dim = hidden.shape[-1]
    if scale.ndim == 1:
        return F.layer_norm(hidden.float(), (dim,), scale, shift, eps).type_as(hidden)
    normed = F.layer_norm(hidden.float(), (dim,), eps=eps)
    normed = normed.view(hidden.shape[0], scale.shape[1], -1, dim)
    return torch.addcmul(shift, normed, scale).view(hidden.shape).type_as(hidden)


def gated_sum(hidden: Tensor, update: Tensor, gate: Tensor) -> Tensor:
    """Return hidden + gate update [B, N, D], computed in float32; `Rows` has the shapes of `gate`."""
    if gate.ndim > 1:
        shape = hidden.shape[0], gate.shape[1], -1, hidden.shape[2]
        return torch.addcmul(hidden.view(shape), update.view(shape), gate).view(hidden.shape).type_as(hidden)
    return torch.addcmul(hidden, update, gate).type_as(hidden)
