"""Estimate the attributes of a frame of the second style from its pixels alone, for every frame on its own.

A plane fitted to each channel gives the background. The largest connected foreground is the shape; a disc outside of
it is the pebble. The moments of the shape's coverage give size and elongation, and a least-squares fit of stripes and
dots gives pattern and colour.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np

from shapes.drawing import pattern_shade, signed_distance, torus_offsets
from shapes.look import STYLES, Style
from shapes.world import SHAPES

PRESENT = 0.85  # minimum overlap of a shape with the best template
CONTRAST = 25.0  # minimum RGB distance between a shape and its background
SIZES = (0.5, 1.6)  # limits of the size of a present shape; clips have 0.75 to 1.15
PEBBLE = 0.75  # minimum fraction of the pebble's disc in the foreground
_CHUNK = 64  # frames processed at once
_SCALES = (80, 50, 30, 20, 12, 8)  # RGB distances at which the fit of the background discounts a pixel
_OFF_COLOR = 35.0  # maximum RGB distance of the shape's pixels from the shades of its colour


@dataclass(frozen=True)
class FrameAttributes:
    """Attributes of T frames, without reference to a caption. Lengths are in pixels, colours in [0, 255].

    Attributes:
        present: [T] bool, whether a shape is present: it has enough overlap and contrast, and a plausible size.
        overlap: [T] soft Dice overlap with the best template, 0 to 1.
        shape: [T] index into `world.SHAPES`.
        position: [T, 2] centre (x, y) on the torus.
        size, elongation: [T] as in `Look`.
        color: [T, 3] RGB of the shape without its pattern.
        pattern: [T, 2] depth of stripes and of dots: the part of the brightness that they remove.
        tone: [T, 3] RGB of the background in the middle of the frame.
        gradient: [T, 2] change of the background's mean brightness over the frame, to the right and downwards.
        pebble: [T] bool, whether the pebble is visible and nothing hides a part of it.
        pebble_position: [T, 2] its centre (x, y).
        pebble_color: [T, 3] its RGB.
    """

    present: np.ndarray
    overlap: np.ndarray
    shape: np.ndarray
    position: np.ndarray
    size: np.ndarray
    elongation: np.ndarray
    color: np.ndarray
    pattern: np.ndarray
    tone: np.ndarray
    gradient: np.ndarray
    pebble: np.ndarray
    pebble_position: np.ndarray
    pebble_color: np.ndarray


def detect_attributes(frames: np.ndarray) -> FrameAttributes:
    """Estimate the attributes of every frame of uint8 [T, H, W, 3].

    Raises:
        ValueError: for frames of a size without unnamed attributes.
    """
    sizes = [size for size, style in STYLES.items() if style.unnamed]
    size = frames.shape[1] if frames.ndim == 4 else 0
    if size not in sizes or frames.shape[1:] != (size, size, 3) or not len(frames):
        raise ValueError(f"frames with unnamed attributes are [T, {sizes[0]}, {sizes[0]}, 3], not {list(frames.shape)}")
    chunks = [_detect(frames[i : i + _CHUNK].astype(np.float32), STYLES[size]) for i in range(0, len(frames), _CHUNK)]
    return FrameAttributes(*(np.concatenate(column) for column in zip(*chunks, strict=True)))


def _detect(frames: np.ndarray, style: Style) -> tuple[np.ndarray, ...]:
    """Return the fields of `FrameAttributes` for float32 frames [T, H, W, 3]."""
    planes = _fit_background(frames)  # [T, 3 coefficients, 3 channels]
    behind = np.clip(np.einsum("khw,tkc->thwc", _plane_basis(style.size), planes), 0, 255)
    distance = np.linalg.norm(frames - behind, axis=-1)
    noise = np.median(distance, axis=(1, 2)) / 1.5  # of one channel: most pixels are background
    foreground = distance > np.maximum(20, 4 * noise)[:, None, None]
    region = _shape_region(frames, foreground)
    coverage = _coverage(distance, region)
    area, position, spread = _moments(coverage, style.size)
    overlap, shape, size, elongation = _best_template(coverage, area, position, spread, style)
    color, pattern = _fit_color(frames, _eroded(_eroded(region)), position, style)
    contrast = np.array([np.median(d[r]) if r.any() else 0.0 for d, r in zip(distance, region, strict=True)])
    present = (overlap >= PRESENT) & (contrast >= CONTRAST) & (size > SIZES[0]) & (size < SIZES[1])
    slopes = 2 * planes[:, 1:].mean(2)  # the basis runs from -1 to 1
    pebble = _find_pebble(frames, foreground, region, style)
    return (present, overlap, shape, position, size, elongation, color, pattern, planes[:, 0], slopes, *pebble)


# ---- Background ----


@cache
def _plane_basis(size: int) -> np.ndarray:
    """Return the functions 1, x and y on a frame, float32 [3, H, W], with x and y from -1 to 1."""
    grid = np.linspace(-1, 1, size, dtype=np.float32)
    x, y = np.meshgrid(grid, grid)
    return np.stack([np.ones_like(x), x, y])


def _fit_background(frames: np.ndarray) -> np.ndarray:
    """Fit a plane to each channel with iteratively reweighted least squares; returns [T, 3 coefficients, 3 channels].

    A quarter of the pixels suffices for nine numbers.
    """
    basis = _plane_basis(frames.shape[1])[:, ::2, ::2]
    frames = frames[:, ::2, ::2]
    planes = np.zeros((len(frames), 3, 3), dtype=np.float32)
    planes[:, 0] = np.median(frames.reshape(len(frames), -1, 3), axis=1)
    for scale in _SCALES:
        residual = frames - np.einsum("khw,tkc->thwc", basis, planes)
        weight = 1 / (1 + (residual**2).sum(-1) / scale**2) ** 2  # far pixels have nearly no weight
        weighted = weight[:, None] * basis  # [T, 3, H, W]
        normal = np.einsum("tkhw,lhw->tkl", weighted, basis) + 1e-3 * np.eye(3)
        planes = np.linalg.solve(normal, np.einsum("tkhw,thwc->tkc", weighted, frames)).astype(np.float32)
    return planes


# ---- Shape ----


def _dilated(mask: np.ndarray) -> np.ndarray:
    """Return a mask [T, H, W] grown by one pixel in eight directions, on the torus."""
    rows = mask | np.roll(mask, 1, axis=1) | np.roll(mask, -1, axis=1)
    return rows | np.roll(rows, 1, axis=2) | np.roll(rows, -1, axis=2)


def _eroded(mask: np.ndarray) -> np.ndarray:
    """Return a mask [T, H, W] shrunk by one pixel in eight directions, on the torus."""
    return ~_dilated(~mask)


def _shape_region(frames: np.ndarray, foreground: np.ndarray) -> np.ndarray:
    """Return the pixels of the shape, bool [T, H, W]: connected to the fullest disc, in shades of its colour."""
    num_frames, size = foreground.shape[:2]
    reach = size // 10  # the narrowest shape is wider than this on both sides of its centre
    peak = _disc_sum(foreground.astype(np.float32), 1.2 * reach).reshape(num_frames, -1).argmax(1)
    dx, dy = torus_offsets(peak % size + 0.5, peak // size + 0.5, size)
    region = foreground & (np.abs(dx) <= reach) & (np.abs(dy) <= reach)
    total = np.einsum("thw,thwc->tc", region.astype(np.float32), frames)
    direction = total / np.maximum(np.linalg.norm(total, axis=1, keepdims=True), 1e-6)
    shade = np.einsum("thwc,tc->thw", frames, direction)
    off_color = np.linalg.norm(frames - shade[..., None] * direction[:, None, None], axis=-1)
    allowed = foreground & (off_color < _OFF_COLOR)
    for _ in range(2 * size // 5):  # the longest way from there to a corner of a triangle
        region = _dilated(region) & allowed
    # Pixels of the soft edge are mixed with the background.
    return _dilated(region) & foreground


def _coverage(distance: np.ndarray, region: np.ndarray) -> np.ndarray:
    """Return the fraction of each pixel that the shape covers, [T, H, W]: at the edge, the contrast decides."""
    highest = np.where(region, distance, 0)
    for axis in (1, 2):  # the maximum within two pixels
        highest = np.max([np.roll(highest, shift, axis) for shift in range(-2, 3)], axis=0)
    edge = np.where(_dilated(region), distance / np.maximum(highest, 1e-6), 0)
    return np.where(_eroded(region), 1, np.clip(edge, 0, 1))


def _moments(coverage: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return area [T], centroid (x, y) [T, 2] on the torus, and standard deviations in x and y [T, 2], in pixels."""
    area = np.maximum(coverage.sum((1, 2)), 1e-6)
    turns = np.exp(2j * np.pi * (np.arange(size) + 0.5) / size)
    start = [np.angle((coverage.sum(axis) * turns).sum(1)) / (2 * np.pi) * size % size for axis in (1, 2)]
    dx, dy = torus_offsets(start[0], start[1], size)
    weights_x, weights_y = coverage.sum(1), coverage.sum(2)  # [T, W], [T, H]
    center, spread = [], []
    for offset, weight, first in ((dx[:, 0], weights_x, start[0]), (dy[:, :, 0], weights_y, start[1])):
        mean = (offset * weight).sum(1) / area
        variance = ((offset - mean[:, None]) ** 2 * weight).sum(1) / area
        center.append((first + mean) % size)
        spread.append(np.sqrt(np.maximum(variance, 1e-6)))
    return area, np.stack(center, axis=1), np.stack(spread, axis=1)


# Area of each shape of radius 1, and width over height of its standard deviations at elongation 1.
_AREAS = {"circle": np.pi, "square": 1.78**2, "triangle": 2.16**2 / 2 * 2 * 0.5 / 0.866}
_RATIOS = {"circle": 1.0, "square": 1.0, "triangle": 2 * 0.5 / 0.866 * np.sqrt(18 / 24)}


def _best_template(
    coverage: np.ndarray, area: np.ndarray, position: np.ndarray, spread: np.ndarray, style: Style
) -> tuple[np.ndarray, ...]:
    """Compare coverage with every shape of the same area and proportions; returns overlap, shape, size, elongation."""
    dx, dy = torus_offsets(position[:, 0], position[:, 1], style.size)
    energy = (coverage**2).sum((1, 2))
    overlaps, radii, elongations = [], [], []
    for name in SHAPES:
        radius, elongation = np.sqrt(area / _AREAS[name]), spread[:, 0] / spread[:, 1] / _RATIOS[name]
        elongation = np.clip(elongation, 0.2, 5)
        distance = signed_distance(name, dx, dy, radius[:, None, None], elongation[:, None, None])
        template = np.clip(0.5 - distance / style.edge, 0, 1)
        product = (coverage * template).sum((1, 2))
        overlaps.append(2 * product / np.maximum(energy + (template**2).sum((1, 2)), 1e-6))
        radii.append(radius)
        elongations.append(elongation)
    shape = np.argmax(overlaps, axis=0)
    chosen = (shape, np.arange(len(shape)))
    size = np.stack(radii)[chosen] / style.radius
    return np.stack(overlaps)[chosen], shape, size, np.stack(elongations)[chosen]


def _fit_color(
    frames: np.ndarray, inside: np.ndarray, position: np.ndarray, style: Style
) -> tuple[np.ndarray, np.ndarray]:
    """Fit colour x (1 - depth x pattern) to the pixels inside a shape; returns colour [T, 3] and depths [T, 2]."""
    dx, dy = torus_offsets(position[:, 0], position[:, 1], style.size)
    maps = [pattern_shade(name, dx, dy, style.period) for name in ("stripes", "dots")]
    basis = np.stack([np.ones_like(maps[0]), *maps], axis=1).astype(np.float32)  # [T, 3, H, W]
    weighted = basis * inside[:, None]
    normal = np.einsum("tkhw,tlhw->tkl", weighted, basis, optimize=True) + 1e-2 * np.eye(3)
    fit = np.linalg.solve(normal, np.einsum("tkhw,thwc->tkc", weighted, frames, optimize=True))
    color = fit[:, 0]
    depth = -(fit[:, 1:] * color[:, None]).sum(-1) / np.maximum((color**2).sum(-1), 1.0)[:, None]
    return np.clip(color, 0, 255), depth


# ---- Pebble ----


def _find_pebble(
    frames: np.ndarray, foreground: np.ndarray, region: np.ndarray, style: Style
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find the disc outside of the shape; returns visible [T], position [T, 2] and colour [T, 3]."""
    size, radius = style.size, style.pebble_radius
    outside = (foreground & ~_dilated(region)).astype(np.float32)
    fullness = _disc_sum(outside, radius) / (np.pi * radius**2)
    peak = fullness.reshape(len(frames), -1).argmax(1)
    visible = fullness.reshape(len(frames), -1).max(1) >= PEBBLE
    hidden = _disc_sum(region.astype(np.float32), radius + 1.5).reshape(len(frames), -1)[np.arange(len(frames)), peak]
    dx, dy = torus_offsets(peak % size + 0.5, peak // size + 0.5, size)
    weight = outside * (np.hypot(dx, dy) <= radius + 2)
    total = np.maximum(weight.sum((1, 2)), 1e-6)
    x = peak % size + 0.5 + (weight * dx).sum((1, 2)) / total
    y = peak // size + 0.5 + (weight * dy).sum((1, 2)) / total
    inner = np.hypot(*torus_offsets(x, y, size)) <= 0.6 * radius
    color = np.einsum("thw,thwc->tc", inner.astype(np.float32), frames) / inner.sum((1, 2))[:, None]
    return visible & (hidden < 1), np.stack([x % size, y % size], axis=1), color


def _disc_sum(maps: np.ndarray, radius: float) -> np.ndarray:
    """Return the sum of maps [T, H, W] over a disc around every pixel, on the torus."""
    size = maps.shape[1]
    center = np.array([0.5])
    disc = np.hypot(*torus_offsets(center, center, size))[0] <= radius
    spectrum = np.fft.rfft2(maps) * np.fft.rfft2(disc.astype(np.float32)).conj()
    return np.fft.irfft2(spectrum, s=(size, size))
