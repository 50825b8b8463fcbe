"""Measure video-to-video and image-to-video in the miniature world, where positions and colours are known.

An edit changes the colour of a clip's shape: the prompt describes the clip's scene with another colour. A good edit has
the prompt's colour at the clip's positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from evaluation.metrics import NO_VALUES, MetricCurve, SumCount, mean_over_frames
from evaluation.statistics import GroupedSum, estimate
from evaluation.video_metrics import measure_frames, pixel_curves
from shapes import world
from shapes.metrics import detect_shapes, ground_truth_curves, torus_difference
from utils.tables import markdown_table

NEAR = 4.0  # pixels; a shape within this distance of the clip's shape counts as agreement
_PEAK = 255.0


@dataclass(frozen=True)
class Edit:
    """A clip, and the scene that the prompt describes."""

    clip: world.Clip
    scene: world.Scene


def sample_edit(seed: int, index: int) -> Edit:
    """Return edit number `index` of `seed`: a clip, and its scene in another colour than shape and background."""
    clip = world.sample_clip(seed, index)
    others = [color for color in world.COLORS if color not in (clip.scene.color, clip.scene.background)]
    color = others[np.random.default_rng([seed, index]).integers(len(others))]
    return Edit(clip, replace(clip.scene, color=color))


def measure_edit(frames: np.ndarray, edit: Edit) -> dict[str, SumCount]:
    """Return one video's contribution to each column of the table of edits. `frames`: uint8 [T, SIZE, SIZE, 3]."""
    found = detect_shapes(frames)
    wanted, given = ground_truth_curves(found, edit.scene), ground_truth_curves(found, edit.clip.scene)
    expected = np.stack(edit.clip.position(np.arange(len(frames))), axis=1)
    distance = np.hypot(*torus_difference(found.position - expected).T)
    near = MetricCurve((found.present & (distance <= NEAR)).astype(float), np.ones(len(frames), dtype=bool))
    return {
        f"position of the clip, within {NEAR:.0f} pixels": mean_over_frames([near]),
        "colour of the prompt": mean_over_frames([wanted["color"]]),
        "colour of the clip": mean_over_frames([given["color"]]),
        "shape": mean_over_frames([wanted["shape"]]),
        "background": mean_over_frames([wanted["background"]]),
    }


def measure_start(
    frames: np.ndarray, first: int, clip: world.Clip, given: np.ndarray | None = None, decoded: np.ndarray | None = None
) -> dict[str, SumCount]:
    """Return a continued video's contribution to each column of the table of starts.

    Args:
        frames: the video, uint8 [T, SIZE, SIZE, 3].
        first: the first generated pixel frame: the seam lies before it.
        clip: ground truth of the video.
        given: the image or clip that it continues, uint8 [first, SIZE, SIZE, 3]; None for text-to-video.
        decoded: the VAE's reconstruction of `given`, of the same shape.
    """
    curves = ground_truth_curves(detect_shapes(frames), clip.scene)
    pixels = pixel_curves(measure_frames(frames))
    return {
        "PSNR to the reconstruction, dB": _psnr(frames[:first], decoded),
        "PSNR to the given frames, dB": _psnr(frames[:first], given),
        "step at the seam, pixels": _at(first, curves["seam"], curves["inside"]),
        "step inside blocks, pixels": mean_over_frames([curves["inside"]]),
        "warp error at the seam": _at(first, pixels["pixel_seam"], pixels["pixel_inside"]),
        "warp error inside blocks": mean_over_frames([pixels["pixel_inside"]]),
        "direction of the prompt, %": _percent(mean_over_frames([curves["direction"]])),
    }


def _psnr(a: np.ndarray, b: np.ndarray | None) -> SumCount:
    """Return the peak signal-to-noise ratio of two uint8 arrays in dB, at most 99."""
    if b is None:
        return NO_VALUES
    error = max(np.square(a.astype(np.float64) - b).mean(), _PEAK**2 / 10**9.9)
    return SumCount(10 * np.log10(_PEAK**2 / error), 1.0)


def _at(frame: int, *curves: MetricCurve) -> SumCount:
    """Return the value at a frame of the first curve in which it is valid."""
    valid = [curve.value[frame] for curve in curves if curve.valid[frame]]
    return SumCount(float(valid[0]), 1.0) if valid else NO_VALUES


def _percent(value: SumCount) -> SumCount:
    return SumCount(100 * value.total, value.num_values)


def measurement_table(title: str, rows: dict[str, Sequence[dict[str, SumCount]]], scale: float, digits: int) -> str:
    """Return a Markdown table of means with 95% bootstrap intervals over videos.

    Args:
        title: head of the first column.
        rows: the contributions of each row's videos.
        scale: factor on all values.
        digits: digits after the point.
    """
    columns = list(next(iter(rows.values()))[0])
    cells = [[title, *columns]]
    for name, videos in rows.items():
        row = [name]
        for column in columns:
            found = estimate([GroupedSum(i, *video[column]) for i, video in enumerate(videos)])
            if not found.num_videos:
                row.append("-")
                continue
            mean, low, high = (f"{scale * value:.{digits}f}" for value in (found.mean, found.low, found.high))
            row.append(f"{mean} ({low} to {high})")
        cells.append(row)
    return markdown_table(cells)
