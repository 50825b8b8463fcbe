"""The miniature world: coloured shapes that move over a background, rendered with exact ground truth.

A few attributes define a scene and its caption. A clip of a scene can be rendered at any length: a shape that leaves on
one side enters on the other, so its direction never changes.
"""

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

SIZE = 64  # pixels, height and width
FPS = 16
RADIUS = 15.0  # pixels, of the circle; the other shapes have about the same area
EDGE = 3.0  # pixels; width of the soft edge, so that latents of 8x8 pixels encode positions well

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
SPEEDS = {"slowly": 0.75, "fast": 2.25}  # pixels per frame

_CAPTION = re.compile(
    r"an? (?P<color>\w+) (?P<shape>\w+) moving (?P<direction>(?:up|down|left|right)(?: left| right)?) "
    r"(?P<speed>\w+) on a (?P<graded>graded )?(?P<background>\w+) background"
)


@dataclass(frozen=True)
class Scene:
    """The content of a caption: everything about a clip except its start position."""

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
        return (
            f"{article} {self.color} {self.shape} moving {self.direction} {self.speed} "
            f"on a {graded}{self.background} background"
        )

    @property
    def held_out(self) -> bool:
        """Whether this combination of colour, shape and background is held out from training."""
        key = (
            list(COLORS).index(self.color) + 2 * SHAPES.index(self.shape) + 3 * list(BACKGROUNDS).index(self.background)
        )
        return key % 7 == 3

    @property
    def labels(self) -> dict[str, int]:
        """The class index of each attribute."""
        return {
            "color": list(COLORS).index(self.color),
            "shape": SHAPES.index(self.shape),
            "background": list(BACKGROUNDS).index(self.background),
            "graded": int(self.graded),
            "direction": list(DIRECTIONS).index(self.direction),
            "speed": list(SPEEDS).index(self.speed),
        }


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
    """Parse a caption.

    Raises:
        ValueError: if this world has no such caption.
    """
    match = _CAPTION.fullmatch(" ".join(caption.split()).rstrip("."))
    if match is None:
        raise ValueError(f"not a caption of the miniature world: {caption!r}")
    fields: dict = match.groupdict()
    fields["graded"] = fields["graded"] is not None
    scene = Scene(**fields)
    known = scene.color in COLORS and scene.shape in SHAPES and scene.background in BACKGROUNDS
    if not (known and scene.speed in SPEEDS and scene.direction in DIRECTIONS):
        raise ValueError(f"not a caption of the miniature world: {caption!r}")
    return scene


def is_caption(text: str) -> bool:
    """Return whether a prompt is a caption of this world."""
    try:
        parse_caption(text)
    except ValueError:
        return False
    return True


@dataclass(frozen=True)
class Clip:
    """A scene with the position of the shape's centre in frame 0, in pixels."""

    scene: Scene
    x: float
    y: float

    def position(self, frame: np.ndarray | int) -> tuple[np.ndarray, np.ndarray]:
        """Return the centre (x, y) in pixels at pixel frames `frame`, wrapped into [0, SIZE)."""
        step_x, step_y = DIRECTIONS[self.scene.direction]
        distance = SPEEDS[self.scene.speed] * np.asarray(frame, dtype=np.float64)
        return (self.x + step_x * distance) % SIZE, (self.y + step_y * distance) % SIZE


def sample_clip(seed: int, index: int, held_out: bool = False) -> Clip:
    """Return clip number `index` of the endless data set `seed`. The result depends on the arguments only."""
    rng = np.random.default_rng([seed, index, int(held_out)])
    scenes = _SCENES[held_out]
    return Clip(scenes[rng.integers(len(scenes))], *rng.uniform(0, SIZE, 2))


_SCENES = {held_out: tuple(all_scenes(held_out)) for held_out in (False, True)}


def render(clip: Clip, num_frames: int, first_frame: int = 0) -> np.ndarray:
    """Render `num_frames` pixel frames from `first_frame` on; uint8 [T, H, W, 3]."""
    scene = clip.scene
    opacity = coverage(scene.shape, *clip.position(np.arange(first_frame, first_frame + num_frames)))[..., None]
    behind = background(scene)[None]
    color = np.array(COLORS[scene.color], dtype=np.float32)
    return np.round(behind + opacity * (color - behind)).astype(np.uint8)


def coverage(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the fraction of each pixel that a shape centred at (x, y) covers, [T, SIZE, SIZE] in [0, 1]."""
    grid = np.arange(SIZE, dtype=np.float32) + 0.5
    half = SIZE / 2
    # Distances on the torus.
    dx = (grid[None, None, :] - x[:, None, None] + half) % SIZE - half
    dy = (grid[None, :, None] - y[:, None, None] + half) % SIZE - half
    return np.clip(0.5 - _signed_distance(shape, dx, dy) / EDGE, 0, 1)


def _signed_distance(shape: str, dx: np.ndarray, dy: np.ndarray) -> np.ndarray:
    """Return the distance to the outline in pixels, negative inside, at offsets (dx, dy) from the centre."""
    if shape == "circle":
        return np.hypot(dx, dy) - RADIUS
    if shape == "square":
        return np.maximum(np.abs(dx), np.abs(dy)) - 0.89 * RADIUS
    # An upright triangle: a horizontal base below, two slanted sides above.
    slant = np.abs(dx) * 0.866 - dy * 0.5
    return np.maximum(slant, dy) - 0.72 * RADIUS


def background(scene: Scene) -> np.ndarray:
    """Render the background, float32 [H, W, 3]; if graded, brightness falls from 1.25x (top) to 0.55x (bottom)."""
    color = np.array(BACKGROUNDS[scene.background], dtype=np.float32)
    ramp = np.linspace(1.25, 0.55, SIZE, dtype=np.float32) if scene.graded else np.ones(SIZE, dtype=np.float32)
    image = np.broadcast_to((color[None, :] + 12) * ramp[:, None] - 12 * np.ones((SIZE, 1)), (SIZE, 3))
    return np.clip(np.broadcast_to(image[:, None, :], (SIZE, SIZE, 3)), 0, 255).astype(np.float32)


def to_pixels(frames: np.ndarray) -> Tensor:
    """Convert frames, uint8 [T, H, W, 3], to the VAE's input, float32 [3, T, H, W] in [-1, 1]."""
    return torch.from_numpy(frames).permute(3, 0, 1, 2).float() / 127.5 - 1
