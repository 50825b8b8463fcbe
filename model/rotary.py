"""Rotary position embedding over time, height and width, without an upper limit on the frame index."""

from collections.abc import Sequence

import torch
from torch import Tensor

Rope = tuple[Tensor, Tensor]  # cosines and sines, float32 [N, 1, head_dim / 2] each


def rotary_table(
    head_dim: int, first_frame: int, grid: tuple[int, int, int], device: torch.device, theta: float = 10000.0
) -> Rope:
    """Return cosines and sines, float32 [N, 1, head_dim / 2] each, for the N tokens of a grid.

    Wan2.1 splits the pairs of channels over time, height and width. Angles are computed in float64, so frame indices
    have no upper limit.

    Args:
        first_frame: absolute index of the grid's first frame.
        grid: numbers of frames, rows and columns.
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


def rotary_table_of_runs(
    head_dim: int, runs: Sequence[tuple[int, int]], frame_grid: tuple[int, int], device: torch.device
) -> Rope:
    """Return the cosines and sines of several runs of frames, (first frame, frames) each, in one table."""
    tables = [rotary_table(head_dim, first, (count, *frame_grid), device) for first, count in runs]
    cos, sin = (torch.cat(parts) if len(parts) > 1 else parts[0] for parts in zip(*tables, strict=True))
    return cos, sin


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs of neighbouring channels of x [B, N, heads, head_dim] (RoPE, arXiv 2104.09864)."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).type_as(x)
