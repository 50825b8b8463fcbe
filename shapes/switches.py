"""Measure prompt switches in the miniature world: the new prompt describes the same scene in another colour."""

import numpy as np

from evaluation.metrics import MetricCurve, SumCount, mean_over_frames
from shapes.edits import Edit
from shapes.metrics import detect_shapes, ground_truth_curves


def measure_switch(frames: np.ndarray, edit: Edit, switch: int, block_frames: int) -> dict[str, SumCount]:
    """Return one video's contribution to each column of the table of switches.

    Args:
        frames: the video, uint8 [T, SIZE, SIZE, 3].
        edit: its scene before the switch (`edit.clip.scene`) and after it (`edit.scene`).
        switch: first pixel frame of the new prompt.
        block_frames: pixel frames of a block.
    """
    found = detect_shapes(frames)
    old, new = ground_truth_curves(found, edit.clip.scene), ground_truth_curves(found, edit.scene)
    second = switch + block_frames
    return {
        "old colour, before": _mean(old["color"], 0, switch),
        "new colour, first block": _mean(new["color"], switch, second),
        "new colour, later": _mean(new["color"], second, len(frames)),
        "shape, before": _mean(old["shape"], 0, switch),
        "shape, after": _mean(new["shape"], switch, len(frames)),
        "direction, before": _mean(old["direction"], 0, switch),
        "direction, after": _mean(new["direction"], second, len(frames)),
    }


def _mean(curve: MetricCurve, start: int, end: int) -> SumCount:
    return mean_over_frames([MetricCurve(curve.value[start:end], curve.valid[start:end])])
