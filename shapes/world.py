"""The miniature world: coloured shapes that move over a background, rendered with exact ground truth.

A few attributes define a scene and its caption. A clip of a scene can be rendered at any length: a shape that leaves on
one side enters on the other, so its direction never changes.

The frame size selects one of two styles (shapes/look.py). Clips of 64x64 pixels show what their captions name and
nothing else. Clips of 96x96 pixels also have attributes that no caption names, and half of their captions omit some
attributes.
"""

import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shapes import drawing
from shapes.drawing import coverage
from shapes.look import AS_NAMED, FIRST_STYLE, STYLES, Look, Style, sample_look, shift_color

SIZE = FIRST_STYLE.size  # pixels, height and width of the first style
RADIUS = FIRST_STYLE.radius
FPS = 16

COLORS = {
    "red": (225, 40, 45),
    "green": (40, 185, 70),
    "blue": (45, 85, 235),
    "yellow": (245, 215, 45),
    "purple": (160, 50, 205),
    "orange": (250, 140, 30),
}
BACKGROUNDS = {
    "black": (15, 15, 20),
    "gray": (125, 125, 130),
    "white": (238, 238, 232),
    "blue": (35, 70, 160),
    "green": (30, 110, 60),
}
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = {  # unit steps (right, down)
    "right": (1.0, 0.0),
    "left": (-1.0, 0.0),
    "up": (0.0, -1.0),
    "down": (0.0, 1.0),
    "up right": (0.5**0.5, -(0.5**0.5)),
    "up left": (-(0.5**0.5), -(0.5**0.5)),
    "down right": (0.5**0.5, 0.5**0.5),
    "down left": (-(0.5**0.5), 0.5**0.5),
}
SPEEDS = {"slowly": 0.75, "fast": 2.25}  # pixels per frame at 64x64 pixels; larger frames move proportionally
PATTERN_DEPTH = 0.4  # part of a shape's brightness that the pattern removes
BLACK = 12  # brightness of black in a graded background; without it, the ramp of black would be invisible
OMITTABLE = ("color", "shape", "background", "direction", "speed")


def _words(values: Iterable[str]) -> str:
    return "|".join(sorted(values, key=len, reverse=True))


_CAPTION = re.compile(
    rf"an? (?:(?P<color>{_words(COLORS)}) )?(?P<shape>{_words(SHAPES)}|shape) moving"
    rf"(?: (?P<direction>{_words(DIRECTIONS)}))?(?: (?P<speed>{_words(SPEEDS)}))?"
    rf"(?: on a (?P<graded>graded )?(?P<background>{_words(BACKGROUNDS)}) background)?"
)


@dataclass(frozen=True)
class Scene:
    """The content of a caption. An empty attribute is not named; a scene to render has no empty attribute."""

    color: str
    shape: str
    background: str
    graded: bool
    direction: str
    speed: str

    @property
    def caption(self) -> str:
        """The scene's only caption."""
        article = "an" if self.color == "orange" else "a"
        graded = "graded " if self.graded else ""
        behind = f"on a {graded}{self.background} background" if self.background else ""
        words = article, self.color, self.shape or "shape", "moving", self.direction, self.speed, behind
        return " ".join(word for word in words if word)

    @property
    def held_out(self) -> bool:
        """Whether this combination of colour, shape and background is held out from training."""
        key = (
            list(COLORS).index(self.color) + 2 * SHAPES.index(self.shape) + 3 * list(BACKGROUNDS).index(self.background)
        )
        return key % 7 == 3

    @property
    def labels(self) -> dict[str, int]:
        """The class index of each attribute; -1 for an attribute that is not named."""
        named = {name: list(values).index(value) if value else -1 for name, values, value in self._named()}
        return named | {"graded": int(self.graded) if self.background else -1}

    def _named(self) -> Iterator[tuple[str, Iterable[str], str]]:
        vocabulary: dict[str, Iterable[str]] = {
            **{"color": COLORS, "shape": SHAPES, "background": BACKGROUNDS},
            **{"direction": DIRECTIONS, "speed": SPEEDS},
        }
        return ((name, values, getattr(self, name)) for name, values in vocabulary.items())

    def without(self, omitted: Iterable[str]) -> "Scene":
        """Return this scene with some attributes not named. A background that is not named has no named grading."""
        names = tuple(omitted)
        blank: dict[str, Any] = dict.fromkeys(names, "")
        if "background" in names:
            blank["graded"] = False
        return replace(self, **blank)


NUM_CLASSES = {
    "color": len(COLORS),
    "shape": len(SHAPES),
    "background": len(BACKGROUNDS),
    "graded": 2,
    "direction": len(DIRECTIONS),
    "speed": len(SPEEDS),
}


def all_scenes(held_out: bool) -> Iterator[Scene]:
    """Yield every scene in a fixed order: those held out from training, or the others.

    Shape and background never have the same colour name.
    """
    for color, shape, background, graded, direction, speed in itertools.product(
        COLORS, SHAPES, BACKGROUNDS, (False, True), DIRECTIONS, SPEEDS
    ):
        scene = Scene(color, shape, background, graded, direction, speed)
        if color != background and scene.held_out == held_out:
            yield scene


def parse_caption(caption: str) -> Scene:
    """Parse a caption. Attributes that it does not name are empty.

    Raises:
        ValueError: if this world has no such caption.
    """
    match = _CAPTION.fullmatch(" ".join(caption.split()).rstrip("."))
    if match is None:
        raise ValueError(f"not a caption of the miniature world: {caption!r}")
    named = {name: value or "" for name, value in match.groupdict().items()}
    if named["shape"] == "shape":
        named["shape"] = ""
    graded = bool(named.pop("graded"))
    return Scene(**named, graded=graded)


def is_caption(text: str) -> bool:
    """Return whether a prompt is a caption of this world."""
    try:
        parse_caption(text)
    except ValueError:
        return False
    return True


@dataclass(frozen=True)
class Clip:
    """A scene with everything else that its frames depend on.

    Attributes:
        x, y: position of the shape's centre in frame 0, in pixels.
        omitted: attributes of the scene that the caption does not name.
    """

    scene: Scene
    x: float
    y: float
    look: Look = AS_NAMED
    style: Style = FIRST_STYLE
    omitted: tuple[str, ...] = ()

    @property
    def caption(self) -> str:
        """The clip's caption."""
        return self.scene.without(self.omitted).caption

    def position(self, frame: np.ndarray | int) -> tuple[np.ndarray, np.ndarray]:
        """Return the centre (x, y) in pixels at pixel frames `frame`, wrapped into the frame."""
        size = self.style.size
        step_x, step_y = DIRECTIONS[self.scene.direction]
        distance = SPEEDS[self.scene.speed] * (size / FIRST_STYLE.size) * np.asarray(frame, dtype=np.float64)
        return (self.x + step_x * distance) % size, (self.y + step_y * distance) % size

    @property
    def color(self) -> np.ndarray:
        """The exact colour of the shape, float32 RGB."""
        return np.array(shift_color(COLORS[self.scene.color], self.look.hue, self.look.brightness), dtype=np.float32)


def sample_clip(seed: int, index: int, held_out: bool = False, size: int = SIZE) -> Clip:
    """Return clip number `index` of the endless data set `seed`. The result depends on the arguments only.

    Args:
        held_out: draw a scene that is held out from training.
        size: frame size in pixels, a key of `STYLES`.
    """
    rng = np.random.default_rng([seed, index, int(held_out)])
    scenes = _SCENES[held_out]
    clip = draw_clip(scenes[rng.integers(len(scenes))], rng, size)
    if not STYLES[size].unnamed or rng.random() >= 0.5:
        return clip
    chosen = rng.random(len(OMITTABLE))
    omitted = tuple(n for n, u in zip(OMITTABLE, chosen, strict=True) if u < max(0.35, chosen.min() + 1e-9))
    return replace(clip, omitted=omitted)


def draw_clip(scene: Scene, rng: np.random.Generator, size: int) -> Clip:
    """Draw everything about a clip that its caption does not name: start position, look and omitted attributes.

    Args:
        scene: its empty attributes are drawn too.
        size: frame size in pixels, a key of `STYLES`.
    """
    style = STYLES[size]
    omitted = tuple(name for name in OMITTABLE if not getattr(scene, name))
    if omitted:
        matching = [s for held_out in _SCENES for s in _SCENES[held_out] if s.without(omitted) == scene]
        scene = matching[rng.integers(len(matching))]
    x, y = rng.uniform(0, size, 2)
    if not style.unnamed:
        return Clip(scene, x, y, style=style, omitted=omitted)
    others = [color for name, color in COLORS.items() if name not in (scene.color, scene.background)]
    return Clip(scene, float(x), float(y), sample_look(rng, others), style, omitted)


_SCENES = {held_out: tuple(all_scenes(held_out)) for held_out in (False, True)}


def render(clip: Clip, num_frames: int, first_frame: int = 0) -> np.ndarray:
    """Render `num_frames` pixel frames from `first_frame` on; uint8 [T, H, W, 3]."""
    look, style = clip.look, clip.style
    x, y = clip.position(np.arange(first_frame, first_frame + num_frames))
    opacity = coverage(clip.scene.shape, x, y, look, style)[..., None]
    behind = background(clip.scene, look, style)[None]
    color = clip.color
    if look.pattern != "plain":
        shade = drawing.pattern_shade(look.pattern, *drawing.torus_offsets(x, y, style.size), style.period)
        color = color * (1 - PATTERN_DEPTH * shade[..., None])
    return np.round(behind + opacity * (color - behind)).astype(np.uint8)


def background(scene: Scene, look: Look = AS_NAMED, style: Style = FIRST_STYLE) -> np.ndarray:
    """Render everything behind the shape, float32 [H, W, 3]."""
    size = style.size
    color = np.array(BACKGROUNDS[scene.background], dtype=np.float32) + np.array(look.tone, dtype=np.float32)
    brightness = drawing.ramp(look.gradient, style.ramp, size) if scene.graded else np.ones((size, size), np.float32)
    image = np.clip((color + BLACK) * brightness[..., None] - BLACK, 0, 255)
    if look.pebble is not None:
        x, y = np.array([look.pebble.x * size]), np.array([look.pebble.y * size])
        distance = np.hypot(*drawing.torus_offsets(x, y, size))[0] - style.pebble_radius
        opacity = np.clip(0.5 - distance / style.edge, 0, 1)[..., None]
        image = image + opacity * (np.array(look.pebble.color) - image)
    return image.astype(np.float32)


def to_pixels(frames: np.ndarray) -> Tensor:
    """Convert frames, uint8 [T, H, W, 3], to the VAE's input, float32 [3, T, H, W] in [-1, 1]."""
    return torch.from_numpy(frames).permute(3, 0, 1, 2).float() / 127.5 - 1
