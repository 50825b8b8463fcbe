"""Measuring videos of the miniature world against the truth that their prompts state.

Every frame is explained from its pixels alone: a background (a colour for every row), a coverage map of what stands out
from it, the shape template and the position on the torus that explain the coverage best. The prompt enters only when
those findings are judged, so that a wrong colour does not cost the shape its shape.
"""

import itertools
from dataclasses import dataclass, fields
from functools import cache

import numpy as np

from evaluation.figures import Curve, Figure, change, distance
from evaluation.video_metrics import borders
from shapes import world as shapes
from shapes.world import SIZE, Scene

PRESENT = 0.8  # overlap with the best template from which on a shape counts as there; a blob of half the area has .67
CONTRAST = 40.0  # least distance in RGB of what stands out from its background
LAG = 4  # frames over which velocities are taken: one latent frame
STILL = 0.25  # pixels per frame; slower is standing still
_CHUNK = 256  # frames explained at once


@dataclass(frozen=True)
class Findings:
    """What is seen in each of T frames, without knowing the prompt."""

    present: np.ndarray  # [T] bool: something of the size of a shape stands out
    overlap: np.ndarray  # [T] soft Dice overlap with the best template, 0..1
    shape: np.ndarray  # [T] index into SHAPES
    color: np.ndarray  # [T, 3] RGB of what stands out
    position: np.ndarray  # [T, 2] its centre (x, y) in pixels on the torus
    background: np.ndarray  # [T, 2, 3] mean RGB of its upper and lower half
    background_errors: np.ndarray  # [T, background, plain or graded] mean distance from each there is

    def beginning(self, num_frames: int) -> "Findings":
        """Those of the first frames."""
        return Findings(*(getattr(self, column.name)[:num_frames] for column in fields(self)))


def explain(frames: np.ndarray) -> Findings:
    """Find background, shape, colour and position in every frame of uint8 [T, SIZE, SIZE, 3].

    Raises:
        ValueError: for frames of another size.
    """
    if frames.ndim != 4 or frames.shape[1:] != (SIZE, SIZE, 3) or not len(frames):
        raise ValueError(f"frames of the shapes world are [T, {SIZE}, {SIZE}, 3], not {list(frames.shape)}")
    parts = [_explain(frames[i : i + _CHUNK].astype(np.float32)) for i in range(0, len(frames), _CHUNK)]
    return Findings(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _explain(frames: np.ndarray) -> tuple[np.ndarray, ...]:
    background = _straight(np.median(frames, axis=2))  # [T, H, 3]
    for tolerance in (0.35, 0.15):  # then whatever it is between the edges: means of the pixels that are near it
        distance = np.linalg.norm(frames - background[:, :, None], axis=-1)  # [T, H, W]
        behind = distance <= tolerance * np.quantile(distance, 0.97, axis=(1, 2), keepdims=True)
        count = behind.sum(2)[..., None]
        mean = (frames * behind[..., None]).sum(2) / np.maximum(count, 1)
        background = np.where(count >= SIZE // 8, mean, background)
    difference = frames - background[:, :, None]
    flat = np.linalg.norm(difference, axis=-1).reshape(len(frames), -1)
    # The smallest shape covers a tenth of the frame, so that its inside holds the top percents.
    strongest = np.quantile(flat, 0.97, axis=1)
    inside = flat >= 0.8 * strongest[:, None]
    pixels = frames.reshape(len(frames), -1, 3)
    color = np.stack([np.median(p[m], axis=0) for p, m in zip(pixels, inside, strict=True)])
    contrast = color[:, None, None] - background[:, :, None]  # [T, H, 1, 3]
    coverage = (difference * contrast).sum(-1) / np.maximum((contrast**2).sum(-1), 1.0)
    coverage = np.clip(coverage, 0, 1)
    coverage[coverage < 0.1] = 0  # compression noise all over the frame would outweigh the shape

    spectra, energies = _templates()
    correlation = np.fft.irfft2(np.fft.rfft2(coverage)[:, None] * spectra.conj(), s=(SIZE, SIZE))  # [T, shape, H, W]
    flat_correlation = correlation.reshape(*correlation.shape[:2], -1)
    overlap = 2 * flat_correlation.max(-1) / ((coverage**2).sum((1, 2))[:, None] + energies)
    shape = overlap.argmax(1)
    peak = flat_correlation[np.arange(len(frames)), shape].argmax(-1)
    position = _centroid(coverage, peak % SIZE, peak // SIZE)
    best = overlap.max(1)
    halves = background.reshape(len(frames), 2, SIZE // 2, 3).mean(2)
    errors = np.abs(background[:, None, None] - _backgrounds()).mean((3, 4))
    return (best >= PRESENT) & (strongest >= CONTRAST), best, shape, color, position, halves, errors


def _straight(rows: np.ndarray) -> np.ndarray:
    """Row colours [T, H, 3] as a straight line through most of them (Theil-Sen): a triangle's base is wider than half
    a row and has the median of a few rows for itself."""
    lag = SIZE // 4
    slope = np.median((rows[:, lag:] - rows[:, :-lag]) / lag, axis=1, keepdims=True)
    ramp = np.arange(SIZE, dtype=np.float32)[None, :, None]
    return np.clip(np.median(rows - slope * ramp, axis=1, keepdims=True) + slope * ramp, 0, 255)


@cache
def _templates() -> tuple[np.ndarray, np.ndarray]:
    """Spectrum [shape, H, W // 2 + 1] and energy [shape] of every shape's coverage, centred on pixel (0, 0)."""
    maps = np.stack([shapes.coverage(name, np.zeros(1), np.zeros(1))[0] for name in shapes.SHAPES])
    return np.fft.rfft2(maps), (maps**2).sum((1, 2))


def _centroid(coverage: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Centre of mass [T, 2] of the coverage within a shape's reach of pixel (x, y), on the torus."""
    grid = np.arange(SIZE)
    dx, dy = wrapped(grid[None] - x[:, None]), wrapped(grid[None] - y[:, None])
    reach = np.hypot(dx[:, None, :], dy[:, :, None]) < shapes.RADIUS * 1.4
    weight = coverage * reach
    total = np.maximum(weight.sum((1, 2)), 1e-6)
    mean_x = (weight * dx[:, None, :]).sum((1, 2)) / total
    mean_y = (weight * dy[:, :, None]).sum((1, 2)) / total
    return np.stack([(x + mean_x) % SIZE, (y + mean_y) % SIZE], axis=1)


def wrapped(step: np.ndarray) -> np.ndarray:
    """The shortest way between two points on the torus: each coordinate into [-SIZE / 2, SIZE / 2)."""
    return (step + SIZE / 2) % SIZE - SIZE / 2


# ---- Judging ----

COLOR_CURVES = tuple(f"color_of_{channel}" for channel in range(3))
BACKGROUND_CURVES = tuple(f"background_of_{half}{channel}" for half in range(2) for channel in range(3))
FIGURES = (
    Figure("presence", "frames in which a shape is there"),
    Figure("shape", "of those, with the right shape"),
    Figure("color", "of those, in the right colour"),
    Figure("direction", "of those, moving in the right direction"),
    Figure("speed", "of those, at the right one of the speeds"),
    Figure("speed_ratio", "speed along the right direction over the prompt's", "x", 1.0, 2),
    Figure("background", "frames with the right background"),
    Figure("grading", "frames whose background is graded or plain, as it should be"),
    Figure("overlap", "overlap with the best fitting shape"),
    Figure("color_error", "shape's colour against the prompt's", "of 255", 1.0, 1),
    Figure("background_error", "background against the prompt's", "of 255", 1.0, 1),
    Figure("moving", f"frames in which the shape moves faster than {STILL} pixels"),
    Figure("color_drift", "shape's colour, last quarter against first", "of 255", 1.0, 1, COLOR_CURVES, distance),
    Figure("background_drift", "background, last quarter against first", "of 255", 1.0, 1, BACKGROUND_CURVES, distance),
    Figure("presence_drift", "presence, last quarter minus first", of=("presence",), take=change),
    Figure("speed_drift", "speed_ratio, last quarter minus first", "x", 1.0, 2, ("speed_ratio",), change),
    Figure("seam", "step that departs from the usual, at block borders", "pixels", 1.0, 2),
    Figure("inside", "the same between latent frames inside blocks", "pixels", 1.0, 2),
)
# A frozen video does not drift: what drifts is never shown without what moves.
assert [f.name for f in FIGURES].index("moving") + 1 == [f.name for f in FIGURES].index("color_drift")
CURVES = (
    *("presence", "shape", "color", "background", "grading", "direction", "speed_ratio", "moving"),
    *("overlap", "color_error", "background_error"),
)


def judge(found: Findings, scene: Scene, block_frames: int = 3) -> dict[str, Curve]:
    """Every figure of a video over time, against the scene that its prompt states.

    Presence and background count in every frame; colour and shape where a shape is present; direction and speed where
    it is present and present again one latent frame later.

    Args:
        found: what `explain` saw in it.
        scene: what the prompt says.
        block_frames: latent frames per block; `seam` and `inside` compare positions across the borders between
            blocks and across those between latent frames inside of them.
    """
    num_frames = len(found.present)
    always = np.ones(num_frames, dtype=bool)
    labels = scene.labels
    palette = np.array(list(shapes.COLORS.values()), dtype=np.float32)
    nearest_color = np.linalg.norm(found.color[:, None] - palette, axis=-1).argmin(1)
    errors = found.background_errors
    nearest_background = errors.min(2).argmin(1)
    grading = errors[np.arange(num_frames), nearest_background].argmin(1)

    curves = {
        "presence": Curve(found.present.astype(float), always),
        "color": Curve((nearest_color == labels["color"]).astype(float), found.present),
        "shape": Curve((found.shape == labels["shape"]).astype(float), found.present),
        "background": Curve((nearest_background == labels["background"]).astype(float), always),
        "grading": Curve((grading == labels["graded"]).astype(float), always),
        "color_error": Curve(np.abs(found.color - palette[labels["color"]]).mean(1), found.present),
        "background_error": Curve(errors[:, labels["background"], labels["graded"]], always),
        "overlap": Curve(found.overlap, found.present),
    }

    # Motion over one latent frame, where the shape is seen at both ends.
    velocity, known = np.zeros((num_frames, 2)), np.zeros(num_frames, dtype=bool)
    if num_frames > LAG:
        velocity[:-LAG] = wrapped(found.position[LAG:] - found.position[:-LAG]) / LAG
        known[:-LAG] = found.present[LAG:] & found.present[:-LAG]
    speed = np.hypot(*velocity.T)
    true_speed = shapes.SPEEDS[scene.speed]
    along = velocity @ np.array(shapes.DIRECTIONS[scene.direction])
    right_way = (speed >= STILL) & (along >= np.cos(np.pi / 8) * speed)  # within half the angle between two directions
    names, speeds = list(shapes.SPEEDS), list(shapes.SPEEDS.values())
    # Between two speeds, their geometric mean; beyond the fastest, twice it: faster is a jump and no motion.
    limits = [STILL, *(np.sqrt(a * b) for a, b in itertools.pairwise(speeds)), 2 * speeds[-1]]
    curves["direction"] = Curve(right_way.astype(float), known)
    curves["speed"] = Curve((np.digitize(speed, limits) - 1 == names.index(scene.speed)).astype(float), known)
    # Along the way: what a shape trembles across it makes it no faster.
    curves["speed_ratio"] = Curve(along / true_speed, known & right_way)
    curves["moving"] = Curve((speed >= STILL).astype(float), known)

    jump, seen = np.zeros(num_frames), np.zeros(num_frames, dtype=bool)
    if num_frames > 2:
        step = wrapped(np.diff(found.position, axis=0))
        both = found.present[1:] & found.present[:-1]
        usual = np.median(step[both], axis=0) if both.any() else np.zeros(2)
        jump[1:] = np.hypot(*(step - usual).T)
        seen[1:] = both
    latent_border, block_border = borders(num_frames, block_frames)
    curves["seam"] = Curve(jump, block_border & seen)
    curves["inside"] = Curve(jump, latent_border & ~block_border & seen)

    # The looks themselves, whatever the prompt said: channel by channel, and the background's halves apart.
    for channel in range(3):
        curves[f"color_of_{channel}"] = Curve(found.color[:, channel], found.present)
        for half in range(2):
            curves[f"background_of_{half}{channel}"] = Curve(found.background[:, half, channel], always)
    return curves


@cache
def _backgrounds() -> np.ndarray:
    """Row colours of every background, plain and graded: [background, graded, SIZE, 3]."""
    scenes = [
        Scene("red", "circle", name, graded, "up", "fast") for name in shapes.BACKGROUNDS for graded in (False, True)
    ]
    rows = np.stack([shapes.background(scene)[:, 0] for scene in scenes])
    return rows.reshape(len(shapes.BACKGROUNDS), 2, SIZE, 3)
