"""Ground-truth metrics of the miniature world: compare a video with the scene that its caption describes.

Detection reads only a frame's pixels. It estimates the background's colour in each row and a coverage map of the
foreground. Then it finds the shape template and the position on the torus that match the map best. The caption is used
only to compare detections with the scene, so a wrong colour does not affect the shape metric.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from evaluation.metrics import Metric, MetricCurve, quarter_change, quarter_distance
from evaluation.video_metrics import borders
from shapes import world
from shapes.world import SIZE, Scene

PRESENT = 0.8  # minimum overlap of a shape with the best template; a blob of half the area has 0.67
CONTRAST = 40.0  # minimum RGB distance between a shape and its background
LAG = 4  # frames between the two positions of a velocity: one latent frame
STILL = 0.25  # pixels per frame; a slower shape does not count as moving
_CHUNK = 256  # frames processed at once


# ---- Detection ----


@dataclass(frozen=True)
class ShapeDetections:
    """Objects detected in T frames, without reference to a caption.

    Attributes:
        present: [T] bool, whether a shape is present: it has enough overlap and contrast.
        overlap: [T] soft Dice overlap with the best template, 0 to 1.
        shape: [T] index into `world.SHAPES`.
        color: [T, 3] RGB of the foreground.
        position: [T, 2] centre (x, y) in pixels on the torus.
        background: [T, 2, 3] mean RGB of the upper and lower half of the background.
        background_errors: [T, backgrounds, 2] mean RGB distance from each plain and each graded background.
    """

    present: np.ndarray
    overlap: np.ndarray
    shape: np.ndarray
    color: np.ndarray
    position: np.ndarray
    background: np.ndarray
    background_errors: np.ndarray


def detect_shapes(frames: np.ndarray) -> ShapeDetections:
    """Detect background, shape, colour and position in every frame of uint8 [T, SIZE, SIZE, 3].

    Raises:
        ValueError: for frames of another size.
    """
    if frames.ndim != 4 or frames.shape[1:] != (SIZE, SIZE, 3) or not len(frames):
        raise ValueError(f"frames of the miniature world are [T, {SIZE}, {SIZE}, 3], not {list(frames.shape)}")
    chunks = [_detect(frames[i : i + _CHUNK].astype(np.float32)) for i in range(0, len(frames), _CHUNK)]
    return ShapeDetections(*(np.concatenate(column) for column in zip(*chunks, strict=True)))


def _detect(frames: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return the fields of `ShapeDetections` for float32 frames [T, H, W, 3]."""
    background = _background_rows(frames)
    difference = frames - background[:, :, None]
    distance = np.linalg.norm(difference, axis=-1).reshape(len(frames), -1)
    # The smallest shape covers a tenth of the frame, so the top 3% of the pixels lie inside it.
    strongest = np.quantile(distance, 0.97, axis=1)
    inside = distance >= 0.8 * strongest[:, None]
    pixels = frames.reshape(len(frames), -1, 3)
    color = np.stack([np.median(p[m], axis=0) for p, m in zip(pixels, inside, strict=True)])
    contrast = color[:, None, None] - background[:, :, None]  # [T, H, 1, 3]
    coverage = (difference * contrast).sum(-1) / np.maximum((contrast**2).sum(-1), 1.0)
    coverage = np.clip(coverage, 0, 1)
    coverage[coverage < 0.1] = 0  # otherwise compression noise over the whole frame outweighs the shape

    spectra, energies = _templates()
    correlation = np.fft.irfft2(np.fft.rfft2(coverage)[:, None] * spectra.conj(), s=(SIZE, SIZE))  # [T, shape, H, W]
    flat_correlation = correlation.reshape(*correlation.shape[:2], -1)
    overlap = 2 * flat_correlation.max(-1) / ((coverage**2).sum((1, 2))[:, None] + energies)
    shape = overlap.argmax(1)
    peak = flat_correlation[np.arange(len(frames)), shape].argmax(-1)
    position = _centroid(coverage, peak % SIZE, peak // SIZE)
    best = overlap.max(1)
    halves = background.reshape(len(frames), 2, SIZE // 2, 3).mean(2)
    errors = np.abs(background[:, None, None] - _known_backgrounds()).mean((3, 4))
    return (best >= PRESENT) & (strongest >= CONTRAST), best, shape, color, position, halves, errors


def _background_rows(frames: np.ndarray) -> np.ndarray:
    """Estimate the background's colour in each row of frames [T, H, W, 3]; returns [T, H, 3]."""
    background = _fit_line(np.median(frames, axis=2))
    # Replace the line by the mean of the nearby pixels of each row, twice with a smaller tolerance.
    for tolerance in (0.35, 0.15):
        distance = np.linalg.norm(frames - background[:, :, None], axis=-1)  # [T, H, W]
        behind = distance <= tolerance * np.quantile(distance, 0.97, axis=(1, 2), keepdims=True)
        count = behind.sum(2)[..., None]
        mean = (frames * behind[..., None]).sum(2) / np.maximum(count, 1)
        background = np.where(count >= SIZE // 8, mean, background)
    return background


def _fit_line(rows: np.ndarray) -> np.ndarray:
    """Fit a straight line to row colours [T, H, 3] with a robust slope (Theil-Sen).

    A triangle's base covers more than half a row. So the medians of a few rows have the colour of the shape.
    """
    lag = SIZE // 4
    slope = np.median((rows[:, lag:] - rows[:, :-lag]) / lag, axis=1, keepdims=True)
    ramp = np.arange(SIZE, dtype=np.float32)[None, :, None]
    return np.clip(np.median(rows - slope * ramp, axis=1, keepdims=True) + slope * ramp, 0, 255)


@cache
def _templates() -> tuple[np.ndarray, np.ndarray]:
    """Return spectrum [shape, H, W // 2 + 1] and energy [shape] of every shape's coverage, centred on pixel (0, 0)."""
    maps = np.stack([world.coverage(name, np.zeros(1), np.zeros(1))[0] for name in world.SHAPES])
    return np.fft.rfft2(maps), (maps**2).sum((1, 2))


def _centroid(coverage: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the centre of mass [T, 2] of the coverage around pixel (x, y), on the torus."""
    grid = np.arange(SIZE)
    dx, dy = torus_difference(grid[None] - x[:, None]), torus_difference(grid[None] - y[:, None])
    near = np.hypot(dx[:, None, :], dy[:, :, None]) < world.RADIUS * 1.4
    weight = coverage * near
    total = np.maximum(weight.sum((1, 2)), 1e-6)
    mean_x = (weight * dx[:, None, :]).sum((1, 2)) / total
    mean_y = (weight * dy[:, :, None]).sum((1, 2)) / total
    return np.stack([(x + mean_x) % SIZE, (y + mean_y) % SIZE], axis=1)


def torus_difference(step: np.ndarray) -> np.ndarray:
    """Wrap coordinate differences into [-SIZE / 2, SIZE / 2): the shortest path on the torus."""
    return (step + SIZE / 2) % SIZE - SIZE / 2


@cache
def _known_backgrounds() -> np.ndarray:
    """Return the row colours of every plain and graded background: [backgrounds, 2, SIZE, 3]."""
    scenes = [
        Scene("red", "circle", name, graded, "up", "fast") for name in world.BACKGROUNDS for graded in (False, True)
    ]
    rows = np.stack([world.background(scene)[:, 0] for scene in scenes])
    return rows.reshape(len(world.BACKGROUNDS), 2, SIZE, 3)


# ---- Comparison with the ground truth ----

_COLOR_CURVES = tuple(f"color_of_{channel}" for channel in range(3))
_BACKGROUND_CURVES = tuple(f"background_of_{half}{channel}" for half in range(2) for channel in range(3))
CAPTION_METRICS = (  # of every style of the world
    Metric("presence", "frames with a shape"),
    Metric("shape", "right shape, in frames with a shape"),
    Metric("color", "right colour, in frames with a shape"),
    Metric("direction", "right direction of motion, in frames with a shape"),
    Metric("speed", "right speed, in frames with a shape"),
    Metric("speed_ratio", "speed along the right direction over the caption's speed", "x", 1.0, 2),
    Metric("background", "frames with the right background"),
    Metric("grading", "frames with the right kind of background, graded or plain"),
    Metric("overlap", "overlap with the best template"),
)
SHAPE_METRICS = (
    *CAPTION_METRICS,
    Metric("color_error", "error of the shape's colour", "of 255", 1.0, 1),
    Metric("background_error", "error of the background's colour", "of 255", 1.0, 1),
    Metric("moving", f"frames in which the shape moves faster than {STILL} pixels"),
    Metric(
        *("color_drift", "change of the shape's colour from first to last quarter", "of 255", 1.0, 1),
        *(_COLOR_CURVES, quarter_distance),
    ),
    Metric(
        *("background_drift", "change of the background from first to last quarter", "of 255", 1.0, 1),
        *(_BACKGROUND_CURVES, quarter_distance),
    ),
    Metric("presence_drift", "presence, last quarter minus first", inputs=("presence",), reduce=quarter_change),
    Metric("speed_drift", "speed_ratio, last quarter minus first", "x", 1.0, 2, ("speed_ratio",), quarter_change),
    Metric("seam", "deviation from the usual step at block borders", "pixels", 1.0, 2),
    Metric("inside", "deviation from the usual step between latent frames inside blocks", "pixels", 1.0, 2),
)
# A frozen video does not drift: tables show the amount of motion directly before the drift.
assert [m.name for m in SHAPE_METRICS].index("moving") + 1 == [m.name for m in SHAPE_METRICS].index("color_drift")


def ground_truth_curves(detections: ShapeDetections, scene: Scene, block_frames: int = 3) -> dict[str, MetricCurve]:
    """Compare a video with its scene; return one curve per name.

    Presence and background are valid in every frame. Colour and shape are valid in frames with a shape. Direction and
    speed are valid if a shape is present in this frame and one latent frame later.

    Args:
        block_frames: latent frames per block, for `seam` (at block borders) and `inside` (at other latent frames).
    """
    present, position = detections.present, detections.position
    curves = _appearance_curves(detections, scene) | motion_curves(present, position, scene)
    curves |= seam_curves(present, position, block_frames)
    # Detected colours by channel, independent of the caption: input of the drift metrics.
    all_frames = np.ones(len(detections.present), dtype=bool)
    for channel in range(3):
        curves[f"color_of_{channel}"] = MetricCurve(detections.color[:, channel], detections.present)
        for half in range(2):
            name = f"background_of_{half}{channel}"
            curves[name] = MetricCurve(detections.background[:, half, channel], all_frames)
    return curves


def _appearance_curves(detections: ShapeDetections, scene: Scene) -> dict[str, MetricCurve]:
    num_frames, present = len(detections.present), detections.present
    all_frames = np.ones(num_frames, dtype=bool)
    labels = scene.labels
    palette = np.array(list(world.COLORS.values()), dtype=np.float32)
    nearest_color = np.linalg.norm(detections.color[:, None] - palette, axis=-1).argmin(1)
    errors = detections.background_errors
    nearest_background = errors.min(2).argmin(1)
    grading = errors[np.arange(num_frames), nearest_background].argmin(1)
    return {
        "presence": MetricCurve(present.astype(float), all_frames),
        "color": MetricCurve((nearest_color == labels["color"]).astype(float), present),
        "shape": MetricCurve((detections.shape == labels["shape"]).astype(float), present),
        "background": MetricCurve((nearest_background == labels["background"]).astype(float), all_frames),
        "grading": MetricCurve((grading == labels["graded"]).astype(float), all_frames),
        "color_error": MetricCurve(np.abs(detections.color - palette[labels["color"]]).mean(1), present),
        "background_error": MetricCurve(errors[:, labels["background"], labels["graded"]], all_frames),
        "overlap": MetricCurve(detections.overlap, present),
    }


def motion_curves(present: np.ndarray, position: np.ndarray, scene: Scene) -> dict[str, MetricCurve]:
    """Measure motion over one latent frame; valid if the shape is present at both ends and the caption names it.

    Args:
        present: [T] bool.
        position: [T, 2] in pixels of a frame of 64x64.
    """
    num_frames = len(present)
    velocity, known = np.zeros((num_frames, 2)), np.zeros(num_frames, dtype=bool)
    if num_frames > LAG:
        velocity[:-LAG] = torus_difference(position[LAG:] - position[:-LAG]) / LAG
        known[:-LAG] = present[LAG:] & present[:-LAG]
    speed = np.hypot(*velocity.T)
    along = velocity @ np.array(world.DIRECTIONS.get(scene.direction, (0, 0)))
    right_direction = (speed >= STILL) & (along >= np.cos(np.pi / 8) * speed)  # half the angle between two directions
    names, speeds = list(world.SPEEDS), list(world.SPEEDS.values())
    # The limit between two speeds is their geometric mean. Motion at twice the highest speed counts as a jump.
    limits = [STILL, *(np.sqrt(a * b) for a, b in itertools.pairwise(speeds)), 2 * speeds[-1]]
    right_speed = np.digitize(speed, limits) - 1 == (names.index(scene.speed) if scene.speed else -2)
    return {
        "direction": MetricCurve(right_direction.astype(float), known & bool(scene.direction)),
        "speed": MetricCurve(right_speed.astype(float), known & bool(scene.speed)),
        # The component along the direction: jitter across it does not add speed.
        "speed_ratio": MetricCurve(
            along / world.SPEEDS.get(scene.speed, 1.0), known & right_direction & bool(scene.speed)
        ),
        "moving": MetricCurve((speed >= STILL).astype(float), known),
    }


def seam_curves(present: np.ndarray, position: np.ndarray, block_frames: int) -> dict[str, MetricCurve]:
    """Measure how far each step deviates from the video's median step; arguments as in `motion_curves`."""
    num_frames = len(present)
    deviation, known = np.zeros(num_frames), np.zeros(num_frames, dtype=bool)
    if num_frames > 2:
        step = torus_difference(np.diff(position, axis=0))
        both = present[1:] & present[:-1]
        usual = np.median(step[both], axis=0) if both.any() else np.zeros(2)
        deviation[1:] = np.hypot(*(step - usual).T)
        known[1:] = both
    latent_border, block_border = borders(num_frames, block_frames)
    return {
        "seam": MetricCurve(deviation, block_border & known),
        "inside": MetricCurve(deviation, latent_border & ~block_border & known),
    }


class ShapesWorld:
    """The miniature world of 64x64 pixels as an `evaluation.measurements.World`."""

    size = SIZE
    metrics = SHAPE_METRICS
    plotted_curves = (
        *("presence", "shape", "color", "background", "grading", "direction", "speed_ratio", "moving"),
        *("overlap", "color_error", "background_error"),
    )
    source_files = (Path(__file__), Path(world.__file__))

    def is_caption(self, prompt: str) -> bool:
        return world.is_caption(prompt) and -1 not in world.parse_caption(prompt).labels.values()

    def detect(self, frames: np.ndarray) -> dict[str, np.ndarray]:
        return vars(detect_shapes(frames))

    def curves(self, detections: Mapping[str, np.ndarray], prompt: str, block_frames: int) -> dict[str, MetricCurve]:
        return ground_truth_curves(ShapeDetections(**detections), world.parse_caption(prompt), block_frames)
