"""The second style as a world of evaluation/: curves of what captions name, and of the attributes they do not name."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from evaluation.evaluate import all_captions
from evaluation.metrics import Metric, MetricCurve, quarter_change
from evaluation.videos import VideoFolder
from shapes import detection, drawing, look, world
from shapes.detection import FrameAttributes, detect_attributes
from shapes.drift import DRIFT_METRICS, SIZE, UNNAMED, drift_curves, hue
from shapes.look import BRIGHTNESS, HUE, STYLES, TONE, shift_color
from shapes.metrics import CAPTION_METRICS, STILL, ShapesWorld, motion_curves, seam_curves
from shapes.world import BLACK, Scene
from utils.clips import read_video

GRADED = 0.2  # minimum gradient of a graded background, relative to its brightness; clips have 0.35 or more

NAMED_METRICS = (
    *CAPTION_METRICS,
    Metric("color_error", "distance from the nearest shade of the named colour", "of 255", 1.0, 1),
    Metric("background_error", "distance from the nearest tone of the named background", "of 255", 1.0, 1),
    Metric("presence_drift", "presence, last quarter minus first", inputs=("presence",), reduce=quarter_change),
    Metric("speed_drift", "speed_ratio, last quarter minus first", "x", 1.0, 2, ("speed_ratio",), quarter_change),
    Metric("seam", "deviation from the usual step at block borders", "pixels", 1.0, 2),
    Metric("inside", "deviation from the usual step between latent frames inside blocks", "pixels", 1.0, 2),
    # A frozen video does not drift: tables show the amount of motion directly before the drift.
    Metric("moving", f"frames in which the shape moves faster than {STILL * SIZE / world.SIZE} pixels"),
)


def attribute_curves(attributes: FrameAttributes, scene: Scene, block_frames: int = 3) -> dict[str, MetricCurve]:
    """Compare a video with what its caption names, and with its own first second; return one curve per name.

    A curve has no valid frames if the caption does not name the attribute. Steps are in pixels of a frame of 64x64.
    """
    position = attributes.position * (world.SIZE / SIZE)
    return (
        _named_curves(attributes, scene)
        | motion_curves(attributes.present, position, scene)
        | seam_curves(attributes.present, position, block_frames)
        | drift_curves(attributes)
    )


def _named_curves(attributes: FrameAttributes, scene: Scene) -> dict[str, MetricCurve]:
    present, labels = attributes.present, scene.labels
    num_frames = len(present)
    always = np.ones(num_frames, dtype=bool)
    color_errors = np.stack([_color_error(attributes.color, name) for name in world.COLORS], axis=1)
    strength = np.linalg.norm(attributes.gradient, axis=1) / (attributes.tone.mean(1) + BLACK)
    # In the middle of a frame, a graded background has the mean brightness of its ramp.
    brightness = np.where(strength >= GRADED, np.mean(STYLES[SIZE].ramp), 1.0)[:, None]
    tone_errors, tone_distances = _tone_errors((attributes.tone + BLACK) / brightness - BLACK)

    def right(found: np.ndarray, name: str, valid: np.ndarray) -> MetricCurve:
        return MetricCurve((found == labels[name]).astype(float), valid & (labels[name] >= 0))

    return {
        "presence": MetricCurve(present.astype(float), always),
        "overlap": MetricCurve(attributes.overlap, present),
        "color": right(color_errors.argmin(1), "color", present),
        "shape": right(attributes.shape, "shape", present),
        "background": right(tone_distances.argmin(1), "background", always),
        "grading": right((strength >= GRADED).astype(int), "graded", always),
        "color_error": MetricCurve(color_errors[:, labels["color"]], present & bool(scene.color)),
        "background_error": MetricCurve(tone_errors[:, labels["background"]], always & bool(scene.background)),
    }


def _color_error(colors: np.ndarray, name: str) -> np.ndarray:
    """Return the distance [T] of colours [T, 3] from the nearest shade of a named colour, mean over channels."""
    base = world.COLORS[name]
    turn = (hue(colors) - hue(np.array(base, dtype=float)) + 180) % 360 - 180
    brightness = colors.max(1) / max(base)
    nearest = [
        shift_color(base, t, b) for t, b in zip(np.clip(turn, -HUE, HUE), np.clip(brightness, *BRIGHTNESS), strict=True)
    ]
    return np.abs(colors - np.array(nearest)).mean(1)


def _tone_errors(tones: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the distances of tones [T, 3] from the nearest tone of each background and from its named colour."""
    named = np.array(list(world.BACKGROUNDS.values()), dtype=float)
    nearest = np.clip(tones[:, None], np.clip(named - TONE, 0, 255), np.clip(named + TONE, 0, 255))
    return np.abs(tones[:, None] - nearest).mean(2), np.abs(tones[:, None] - named).mean(2)


def attribute_errors(truth: np.ndarray, found: np.ndarray) -> dict[str, MetricCurve]:
    """Return what a VAE changes: the errors `X_error` of every unnamed attribute, and of presence and shape.

    Args:
        truth: rendered frames, uint8 [T, H, W, 3].
        found: the same frames after the VAE.
    """
    expected, measured = detect_attributes(truth), detect_attributes(found)
    always = np.ones(len(truth), dtype=bool)
    curves = {f"{a.name}_error": a.error(expected, measured) for a in UNNAMED}
    curves["absent"] = MetricCurve((~measured.present).astype(float), always)
    curves["wrong_shape"] = MetricCurve((measured.shape != expected.shape).astype(float), measured.present)
    return curves


class UnnamedShapesWorld:
    """The miniature world of 96x96 pixels as an `evaluation.measurements.World`."""

    size = SIZE
    metrics = (*NAMED_METRICS, *DRIFT_METRICS)
    plotted_curves = (
        *("presence", "moving", "kept", "direction", "color_error"),
        *(f"{a.name}_distance" for a in UNNAMED),
    )
    source_files = tuple(Path(str(module.__file__)) for module in (detection, drawing, look, world))

    def is_caption(self, prompt: str) -> bool:
        return world.is_caption(prompt)

    def detect(self, frames: np.ndarray) -> dict[str, np.ndarray]:
        return vars(detect_attributes(frames))

    def curves(self, detections: Mapping[str, np.ndarray], prompt: str, block_frames: int) -> dict[str, MetricCurve]:
        return attribute_curves(FrameAttributes(**detections), world.parse_caption(prompt), block_frames)


def world_of_video(path: Path) -> ShapesWorld | UnnamedShapesWorld:
    """Return the world of a video's frame size; that of 64x64 pixels for a size that no style has.

    Raises:
        UserError: if the video cannot be read.
    """
    frames, _ = read_video(path, 1)
    return UnnamedShapesWorld() if frames.shape[1:3] == (SIZE, SIZE) else ShapesWorld()


def select_world(choice: str, folders: Sequence[VideoFolder]) -> ShapesWorld | UnnamedShapesWorld | None:
    """Return the world of the videos; None if they are measured without one.

    Args:
        choice: any for no world, shapes for a world, or auto for a world if every prompt is one of its captions.
    """
    if choice == "any":
        return None
    world = world_of_video(folders[0].videos[0].path)
    keys = [video.key for folder in folders for video in folder.videos]
    return world if choice == "shapes" or all_captions(world, keys) else None
