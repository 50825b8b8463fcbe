"""evaluation/measurements.py: a beginning of what is seen is what is seen of the beginning; nothing is looked at
twice, nothing
stale is believed."""

import os
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from evaluation import measurements as observed
from evaluation.measurements import Observed, observe
from shapes import world as shapes
from utils.video import VideoWriter

FRAMES = 25


@pytest.fixture
def video(tmp_path) -> Path:
    path = tmp_path / "clip.mp4"
    with VideoWriter(path) as writer:
        writer.write(shapes.render(shapes.sample_clip(3, 1), FRAMES))
    return path


@pytest.fixture
def looks(monkeypatch) -> list[int | None]:
    """How many frames each look was asked for."""
    asked = []
    look = observed.look
    monkeypatch.setattr(observed, "look", lambda *words: (asked.append(words[-1]), look(*words))[1])
    return asked


def assert_same(one: Observed, other: Observed) -> None:
    assert np.array_equal(one.pixels, other.pixels) and one.fps == other.fps
    assert (one.found is None) == (other.found is None)
    if one.found and other.found:
        for column in fields(one.found):
            assert np.array_equal(getattr(one.found, column.name), getattr(other.found, column.name)), column.name


@pytest.mark.parametrize("in_shapes_world", [True, False])
def test_the_beginning_of_what_is_seen_is_what_is_seen_of_the_beginning(video, tmp_path, looks, in_shapes_world):
    whole = observe(video, in_shapes_world, None, tmp_path)
    assert len(whole.pixels) == FRAMES and bool(whole.found) == in_shapes_world
    beginning = observe(video, in_shapes_world, 9, tmp_path)
    assert looks == [None] and len(beginning.pixels) == 9
    (tmp_path / "other").mkdir()
    assert_same(beginning, observe(video, in_shapes_world, 9, tmp_path / "other"))
    assert_same(whole, observe(video, in_shapes_world, None, tmp_path))
    assert looks == [None, 9]


def test_more_than_is_kept_is_looked_at_again(video, tmp_path, looks):
    for max_frames in (9, 5, 9, FRAMES + 1, None, 9):
        assert len(observe(video, True, max_frames, tmp_path).pixels) == min(max_frames or FRAMES, FRAMES)
    assert looks == [9, FRAMES + 1]  # the second found the end


def test_what_is_not_of_this_video_or_this_code_is_not_believed(video, tmp_path, looks, monkeypatch):
    def again() -> int:
        observe(video, True, None, tmp_path)
        return len(looks)

    assert (again(), again()) == (1, 1)
    os.utime(video, ns=(1, 1))
    assert (again(), again()) == (2, 2)
    monkeypatch.setattr(observed, "_code", lambda: "changed")
    assert (again(), again()) == (3, 3)
    observe(video, False, None, tmp_path)
    assert again() == 4
    for file in tmp_path.glob("*.npz"):
        file.write_bytes(file.read_bytes()[:100])
    assert (again(), again()) == (5, 5)
