"""shapes/metrics.py: perfect scores on the ground truth; a degradation changes its own metrics and no others."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from evaluation.metrics import video_sums
from shapes import world
from shapes.metrics import SHAPE_METRICS, detect_shapes, ground_truth_curves, torus_difference
from shapes.world import SIZE, Clip, Scene

SCENE = Scene("red", "square", "gray", False, "right", "fast")
CLIP = Clip(SCENE, 20.0, 30.0)
FRAMES = 45

# Each metric's value on the ground truth, and the tolerated difference.
TRUTH = {
    "presence": (1, 0), "shape": (1, 0), "color": (1, 0), "direction": (1, 0), "speed": (1, 0), "background": (1, 0),
    "grading": (1, 0),
    "speed_ratio": (1, 0.02), "overlap": (1, 0.02), "color_error": (0, 1), "background_error": (0, 1), "moving": (1, 0),
    "color_drift": (0, 0.5), "background_drift": (0, 1.5), "presence_drift": (0, 0), "speed_drift": (0, 0.05),
    "seam": (0, 0.3), "inside": (0, 0.3),
}  # fmt: skip


def measured(frames: np.ndarray, scene: Scene = SCENE) -> dict[str, float]:
    """Return every metric of a video; NaN where no frame is valid."""
    sums = video_sums(SHAPE_METRICS, ground_truth_curves(detect_shapes(frames), scene))
    return {name: total / count if count else float("nan") for name, (total, count) in sums.items()}


def wrong(metrics: dict[str, float]) -> set[str]:
    """Return the names of the metrics that differ from the ground truth."""
    return {name for name, (value, slack) in TRUTH.items() if abs(metrics[name] - value) > slack + 1e-9}


@pytest.mark.parametrize("index", range(24))
def test_the_ground_truth_scores_perfectly(index):
    clip = world.sample_clip(11, index, held_out=index % 2 == 0)
    assert wrong(measured(world.render(clip, 21), clip.scene)) == set()


@pytest.mark.parametrize("scene", list(world.all_scenes(False))[::37] + list(world.all_scenes(True))[::13])
def test_every_kind_of_scene_is_detected(scene):
    frames = world.render(Clip(scene, 57.0, 5.0), 17)
    assert wrong(measured(frames, scene)) == set()


def test_positions_are_accurate_to_a_quarter_of_a_pixel():
    for shape in world.SHAPES:
        clip = Clip(Scene("yellow", shape, "blue", True, "down left", "slowly"), 3.3, 60.8)
        steps = torus_difference(np.diff(detect_shapes(world.render(clip, 60)).position, axis=0))
        truth = 0.75 * np.array(world.DIRECTIONS["down left"])
        assert np.abs(steps - truth).max() < 0.25


# ---- Degradations ----


def paint(change: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]) -> np.ndarray:
    """Render the clip with `change(opacity, shape's colour, background)`; arrays are [T, H, W, 1 or 3]."""
    opacity = world.coverage(SCENE.shape, *CLIP.position(np.arange(FRAMES)))[..., None]
    color = np.broadcast_to(np.array(world.COLORS[SCENE.color], dtype=np.float64), (FRAMES, SIZE, SIZE, 3)).copy()
    behind = np.broadcast_to(world.background(SCENE), (FRAMES, SIZE, SIZE, 3)).astype(np.float64)
    return np.round(np.clip(change(opacity, color, behind), 0, 255)).astype(np.uint8)


def moved(x: np.ndarray, y: np.ndarray, scene: Scene = SCENE) -> np.ndarray:
    """Render a scene with its shape at the positions (x, y)."""
    opacity = world.coverage(scene.shape, np.asarray(x), np.asarray(y))[..., None]
    behind = world.background(scene)[None]
    return np.round(behind + opacity * (np.array(world.COLORS[scene.color]) - behind)).astype(np.uint8)


TIME = np.arange(FRAMES)
LATE = (TIME >= FRAMES // 2)[:, None, None, None]


def recolored(opacity, color, behind):
    color = np.where(LATE, np.array(world.COLORS["purple"]), color)
    return behind + opacity * (color - behind)


def another_background(opacity, color, behind):
    return behind + opacity * (color - behind) + np.where(LATE, 1 - opacity, 0) * (world.BACKGROUNDS["white"] - behind)


def graded(opacity, color, behind):
    behind = np.where(LATE, world.background(replace(SCENE, graded=True)), behind)
    return behind + opacity * (color - behind)


def fading(opacity, color, behind):
    """The shape's colour moves a third of the way to gray, and red remains the nearest colour."""
    part = (TIME / FRAMES)[:, None, None, None] / 3
    return behind + opacity * (color + part * (125 - color) - behind)


def brightening(opacity, color, behind):
    behind = behind + 25 * (TIME / FRAMES)[:, None, None, None]
    return behind + opacity * (color - behind)


def vanishing(opacity, color, behind):
    return behind + np.where(LATE, 0, opacity) * (color - behind)


def instead(**changes: str) -> np.ndarray:
    """Render another scene from the same start position."""
    return world.render(Clip(replace(SCENE, **changes), CLIP.x, CLIP.y), FRAMES)


def another_shape() -> np.ndarray:
    return np.where(LATE, instead(shape="circle"), paint(plain))


def plain(opacity, color, behind):
    return behind + opacity * (color - behind)


def jumping() -> np.ndarray:
    """The shape jumps by two pixels at every block border: a visible seam."""
    block = np.maximum(0, (TIME + 3) // 12)
    x, y = CLIP.position(TIME)
    return moved(x, y + 2 * (block % 2))


DEGRADED = {
    "colour": (lambda: paint(recolored), {"color", "color_error", "color_drift"}),
    "background": (lambda: paint(another_background), {"background", "background_error", "background_drift"}),
    "grading": (lambda: paint(graded), {"grading", "background_error", "background_drift"}),
    "saturation": (lambda: paint(fading), {"color_error", "color_drift"}),
    "brightness": (lambda: paint(brightening), {"background_error", "background_drift"}),
    "presence": (lambda: paint(vanishing), {"presence", "presence_drift"}),
    "shape": (another_shape, {"shape"}),
    "direction": (lambda: instead(direction="up right"), {"direction"}),
    "speed": (lambda: instead(speed="slowly"), {"speed", "speed_ratio"}),
    "continuity": (jumping, {"seam"}),
}  # fmt: skip


@pytest.mark.parametrize("degradation", DEGRADED)
def test_a_degradation_changes_its_own_metrics_and_no_others(degradation):
    make, expected = DEGRADED[degradation]
    assert wrong(measured(make())) == expected


def test_painting_without_a_degradation_scores_perfectly():
    assert wrong(measured(paint(plain))) == set()


def test_a_frozen_video_does_not_move_and_does_not_drift():
    frames = np.repeat(world.render(CLIP, 1), FRAMES, axis=0)
    metrics = measured(frames)
    assert metrics["moving"] == metrics["direction"] == metrics["speed"] == 0
    assert metrics["color_drift"] == metrics["background_drift"] == 0
    assert metrics["presence"] == metrics["shape"] == metrics["color"] == 1


@pytest.mark.parametrize("frames", [np.full((5, SIZE, SIZE, 3), 80, np.uint8), world.render(CLIP, 5) // 8 + 90])
def test_no_shape_is_detected_without_a_clear_shape(frames):
    metrics = measured(frames)
    assert metrics["presence"] == 0
    assert np.isnan([metrics[name] for name in ("shape", "color", "direction", "speed", "seam", "color_drift")]).all()


def test_noise_is_not_detected_as_a_shape():
    frames = np.random.default_rng(0).integers(0, 256, (8, SIZE, SIZE, 3)).astype(np.uint8)
    assert measured(frames)["presence"] == 0


def test_two_shapes_are_not_detected_as_one():
    one, two = (world.render(Clip(SCENE, x, 32.0), 5).astype(int) for x in (12.0, 46.0))
    assert (
        measured(np.minimum(one + two - np.array(world.BACKGROUNDS["gray"]), 255).clip(0).astype(np.uint8))["presence"]
        == 0
    )


def test_frames_of_another_size_are_refused():
    with pytest.raises(ValueError, match="frames of the miniature world are"):
        detect_shapes(np.zeros((3, 32, 32, 3), np.uint8))


def test_a_single_frame_has_metrics():
    metrics = measured(world.render(CLIP, 1))
    assert metrics["presence"] == 1 and np.isnan(metrics["direction"]) and np.isnan(metrics["moving"])


def test_every_metric_is_tested_on_the_ground_truth():
    assert {metric.name for metric in SHAPE_METRICS} == set(TRUTH)
