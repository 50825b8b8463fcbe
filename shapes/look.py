"""Everything about a clip's look that its caption does not name, and the two styles of rendering.

The first style (64x64 pixels) has no such attributes: every clip has the default `Look`. In the second (96x96), each
clip draws its own look, which must persist over the whole video. Only the video itself shows it.
"""

import colorsys
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

PATTERNS = ("plain", "stripes", "dots")
RGB = tuple[float, float, float]

# Ranges of the attributes: shifts in degrees and RGB values, and factors.
HUE = 10.0
BRIGHTNESS = (0.72, 1.02)
SIZES = (0.75, 1.15)
ELONGATION = 0.35  # natural logarithm
COMMON_TONE, CHANNEL_TONE = 24.0, 16.0
TONE = COMMON_TONE + CHANNEL_TONE


@dataclass(frozen=True)
class Style:
    """How clips of one frame size are rendered.

    Attributes:
        size: height and width in pixels.
        edge: width of a shape's soft edge in pixels.
        ramp: brightness of a graded background at its bright and at its dark end.
        unnamed: whether clips have attributes that no caption names, and captions may omit attributes.
    """

    size: int
    edge: float
    ramp: tuple[float, float]
    unnamed: bool

    @property
    def radius(self) -> float:
        """Radius in pixels of a circle of size 1; the other shapes have about the same area."""
        return self.size * 15 / 64

    @property
    def period(self) -> float:
        """Period in pixels of stripes and dots."""
        return self.size / 7

    @property
    def pebble_radius(self) -> float:
        """Radius in pixels of the second object."""
        return self.size / 16


# The soft edge of 3 pixels helped a VAE with latents of 8x8 pixels at the first size.
STYLES: Mapping[int, Style] = {
    64: Style(64, edge=3.0, ramp=(1.25, 0.55), unnamed=False),
    96: Style(96, edge=1.5, ramp=(1.1, 0.6), unnamed=True),
}
FIRST_STYLE = STYLES[64]


@dataclass(frozen=True)
class Pebble:
    """A second, small object at rest behind the moving shape: a disc at (x, y), in fractions of the frame."""

    color: RGB
    x: float
    y: float


@dataclass(frozen=True)
class Look:
    """The attributes of a clip that no caption names; the defaults are those of the first style.

    Attributes:
        hue: shift in degrees from the named colour of the shape.
        brightness: factor of the named colour.
        size: length relative to the style's radius.
        elongation: width over height; the area does not depend on it.
        pattern: one of `PATTERNS`, moving with the shape.
        tone: shift of the background's RGB values.
        gradient: direction in degrees in which a graded background darkens: 0 is right, 90 is down.
        pebble: the second object; None for none.
    """

    hue: float = 0.0
    brightness: float = 1.0
    size: float = 1.0
    elongation: float = 1.0
    pattern: str = "plain"
    tone: RGB = (0.0, 0.0, 0.0)
    gradient: float = 90.0
    pebble: Pebble | None = None


AS_NAMED = Look()  # the look of every clip of the first style


def sample_look(rng: np.random.Generator, pebble_colors: list[tuple[int, int, int]]) -> Look:
    """Draw a look.

    Args:
        pebble_colors: colours that the pebble may have, before its own shift of hue and brightness.
    """
    common, channels = rng.uniform(-COMMON_TONE, COMMON_TONE), rng.uniform(-CHANNEL_TONE, CHANNEL_TONE, 3)
    red, green, blue = (float(common + channel) for channel in channels)
    color = pebble_colors[int(rng.integers(len(pebble_colors)))]
    return Look(
        hue=float(rng.uniform(-HUE, HUE)),
        brightness=float(rng.uniform(*BRIGHTNESS)),
        size=float(rng.uniform(*SIZES)),
        elongation=float(np.exp(rng.uniform(-ELONGATION, ELONGATION))),
        pattern=PATTERNS[int(rng.integers(len(PATTERNS)))],
        tone=(red, green, blue),
        gradient=float(rng.uniform(0, 360)),
        pebble=Pebble(
            shift_color(color, float(rng.uniform(-HUE, HUE)), float(rng.uniform(*BRIGHTNESS))),
            *map(float, rng.uniform(0, 1, 2)),
        ),
    )


def shift_color(color: tuple[int, int, int], hue: float, brightness: float) -> RGB:
    """Return an RGB colour with its hue shifted in degrees and its brightness scaled; values stay in [0, 255]."""
    if hue == 0 and brightness == 1:
        return color
    h, s, v = colorsys.rgb_to_hsv(*(channel / 255 for channel in color))
    red, green, blue = colorsys.hsv_to_rgb((h + hue / 360) % 1, s, min(1.0, v * brightness))
    return 255 * red, 255 * green, 255 * blue
