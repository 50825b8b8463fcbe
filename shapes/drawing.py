"""Draw the parts of a frame: how much of each pixel a shape covers, its pattern, and a background's ramp."""

import numpy as np

from shapes.look import AS_NAMED, FIRST_STYLE, Look, Style

# The slanted sides of the triangle: 0.866 |x| - 0.5 y <= 0.72 radius. The base: y <= 0.72 radius.
_SLANT = (0.866, 0.5)


def torus_offsets(x: np.ndarray, y: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the shortest offsets on the torus from centres (x, y) [T] to every pixel, [T, 1, W] and [T, H, 1]."""
    grid = np.arange(size, dtype=np.float32) + 0.5
    half = size / 2
    dx = (grid[None, None, :] - x[:, None, None] + half) % size - half
    dy = (grid[None, :, None] - y[:, None, None] + half) % size - half
    return dx, dy


def coverage(shape: str, x: np.ndarray, y: np.ndarray, look: Look = AS_NAMED, style: Style = FIRST_STYLE) -> np.ndarray:
    """Return the fraction of each pixel that a shape centred at (x, y) covers, [T, H, W] in [0, 1]."""
    dx, dy = torus_offsets(x, y, style.size)
    distance = signed_distance(shape, dx, dy, look.size * style.radius, look.elongation)
    return np.clip(0.5 - distance / style.edge, 0, 1)


def signed_distance(
    shape: str, dx: np.ndarray, dy: np.ndarray, radius: float | np.ndarray, elongation: float | np.ndarray
) -> np.ndarray:
    """Return the distance to the outline in pixels, negative inside, at offsets (dx, dy) from the centre.

    For an ellipse, the distance is exact to first order.

    Args:
        radius: of the circle with the same area and the same size attribute; one number, or [T, 1, 1].
        elongation: width over height, at equal area; one number, or [T, 1, 1].
    """
    a, b = elongation**0.5, elongation**-0.5  # factors of width and height
    if shape == "circle":
        u, v = dx / a, dy / b
        length = np.hypot(u, v)
        slope = np.hypot(u / a, v / b) / np.maximum(length, 1e-6)
        return (length - radius) / np.maximum(slope, 1e-6)
    if shape == "square":
        return np.maximum(np.abs(dx) - 0.89 * radius * a, np.abs(dy) - 0.89 * radius * b)
    # An upright triangle: a horizontal base below, two slanted sides above.
    steepness = np.hypot(_SLANT[0] / a, _SLANT[1] / b) / np.hypot(*_SLANT)
    slant = (np.abs(dx) / a * _SLANT[0] - dy / b * _SLANT[1] - 0.72 * radius) / steepness
    return np.maximum(slant, dy - 0.72 * radius * b)


def pattern_shade(pattern: str, dx: np.ndarray, dy: np.ndarray, period: float) -> np.ndarray:
    """Return how dark a pattern is at offsets (dx, dy) from the centre, [T, H, W] in [0, 1]."""
    if pattern == "stripes":
        wave = np.cos(2 * np.pi / period * np.sqrt(0.5) * (dx + dy))
        return np.clip(0.5 + wave, 0, 1)
    wave = np.cos(2 * np.pi / period * dx) + np.cos(2 * np.pi / period * dy)
    return np.clip(1.2 * wave - 0.7, 0, 1)


def ramp(direction: float, ends: tuple[float, float], size: int) -> np.ndarray:
    """Return a linear ramp over a frame, float32 [H, W]: from `ends[0]` to `ends[1]` along a direction in degrees."""
    along_x, along_y = np.cos(np.radians(direction)), np.sin(np.radians(direction))
    grid = np.linspace(-1, 1, size)
    position = (grid[None, :] * along_x + grid[:, None] * along_y) / (abs(along_x) + abs(along_y))
    return (np.mean(ends) + position * (ends[1] - ends[0]) / 2).astype(np.float32)
