"""shapes/switches.py: measurements of a rendered video that changes its colour are exact."""

import dataclasses

import numpy as np

from evaluation.metrics import SumCount
from shapes import world
from shapes.edits import sample_edit
from shapes.switches import measure_switch

SWITCH, FRAMES = 21, 45


def means(frames: np.ndarray, edit) -> dict[str, float]:
    measured: dict[str, SumCount] = measure_switch(frames, edit, SWITCH, block_frames=12)
    return {column: value.total / value.num_values for column, value in measured.items()}


def test_a_video_that_changes_its_colour_at_the_switch_is_right_in_all_columns():
    edit = sample_edit(5, 0)
    old = world.render(edit.clip, FRAMES)
    new = world.render(dataclasses.replace(edit.clip, scene=edit.scene), FRAMES)
    assert set(means(np.concatenate([old[:SWITCH], new[SWITCH:]]), edit).values()) == {1.0}
    kept = means(old, edit)
    assert kept["old colour, before"] == kept["shape, after"] == 1
    assert kept["new colour, first block"] == kept["new colour, later"] == 0
    late = means(np.concatenate([old[: SWITCH + 6], new[SWITCH + 6 :]]), edit)
    assert (late["new colour, first block"], late["new colour, later"]) == (0.5, 1)
