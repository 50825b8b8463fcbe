"""Rotary position embedding over time, height and width, without an upper limit on the frame index."""

import torch
from torch import Tensor

Runs = tuple[tuple[int, int], ...]  # of frames: (first frame, frames) each


def rotary_table(
    head_dim: int, first_frame: int, grid: tuple[int, int, int], device: torch.device, theta: float = 10000.0
) -> Tensor:
    """Return cosines and sines of the N tokens of a grid, float32 [N, 1, head_dim / 2, 2].

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
    return torch.stack((table.cos(), table.sin()), dim=-1).float().to(device)


class RotaryTables:
    """The newest tables of positions. All passes over a block, and often several caches, use the same table."""

    def __init__(self, head_dim: int, capacity: int = 16):
        self.head_dim, self.capacity = head_dim, capacity
        self._tables: dict[tuple[Runs, tuple[int, int], torch.device], Tensor] = {}

    def get(self, runs: Runs, frame_grid: tuple[int, int], device: torch.device) -> Tensor:
        """Return the cosines and sines of several runs of frames in one table; see `rotary_table`.

        Args:
            runs: (first frame, frames) of each run.
            frame_grid: numbers of rows and columns.
        """
        key = runs, frame_grid, device
        table = self._tables.get(key)
        if table is None:
            if len(runs) > 1:  # other passes use the same runs in other combinations
                table = torch.cat([self.get((run,), frame_grid, device) for run in runs])
            else:
                [(first, frames)] = runs
                table = rotary_table(self.head_dim, first, (frames, *frame_grid), device)
            if len(self._tables) >= self.capacity:
                del self._tables[next(iter(self._tables))]  # the oldest
            self._tables[key] = table
        return table


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate pairs of neighbouring channels of x [B, N, ..., heads, head_dim] (RoPE, arXiv 2104.09864).

    Args:
        rope: cosines and sines [N, ..., 1, head_dim / 2, 2].
    """
    pairs = x.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling() or x.device.type == "mps":  # neither has kernels for complex numbers
        (even, odd), (cos, sin) = pairs.unbind(-1), rope.unbind(-1)
        rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    else:
        rotated = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rope))
    return rotated.flatten(-2).type_as(x)
