"""evaluation/measurements.py: cached and new measurements are equal; changed videos or code are measured again."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from evaluation import measurements
from evaluation.measurements import FrameMeasurements, cached_measurements
from shapes import world
from shapes.metrics import ShapesWorld
from utils.video import VideoWriter

FRAMES = 25
WORLD = ShapesWorld()


@pytest.fixture
def video(tmp_path) -> Path:
    path = tmp_path / "clip.mp4"
    with VideoWriter(path, preset="ultrafast") as writer:
        writer.write(world.render(world.sample_clip(3, 1), FRAMES))
    return path


@pytest.fixture
def measured(monkeypatch) -> list[int | None]:
    """`max_frames` of every call that measures a file."""
    calls = []
    measure = measurements.measure_file
    monkeypatch.setattr(measurements, "measure_file", lambda *words: (calls.append(words[-1]), measure(*words))[1])
    return calls


def assert_same(one: FrameMeasurements, other: FrameMeasurements) -> None:
    assert np.array_equal(one.pixels, other.pixels) and one.fps == other.fps
    assert (one.detections is None) == (other.detections is None)
    for name, rows in (one.detections or {}).items():
        assert np.array_equal(rows, other.detections[name]), name


@pytest.mark.parametrize("in_world", [WORLD, None], ids=["miniature world", "any video"])
def test_measurements_of_a_whole_video_serve_its_beginning(video, tmp_path, measured, in_world):
    whole = cached_measurements(video, in_world, None, tmp_path)
    assert len(whole.pixels) == FRAMES and bool(whole.detections) == bool(in_world)
    beginning = cached_measurements(video, in_world, 9, tmp_path)
    assert measured == [None] and len(beginning.pixels) == 9
    (tmp_path / "other").mkdir()
    assert_same(beginning, cached_measurements(video, in_world, 9, tmp_path / "other"))
    assert_same(whole, cached_measurements(video, in_world, None, tmp_path))
    assert measured == [None, 9]


def test_more_frames_than_cached_are_measured_again(video, tmp_path, measured):
    for max_frames in (9, 5, 9, FRAMES + 1, None, 9):
        result = cached_measurements(video, WORLD, max_frames, tmp_path)
        assert len(result.pixels) == min(max_frames or FRAMES, FRAMES)
    assert measured == [9, FRAMES + 1]  # the second call reached the end of the video


def test_a_changed_video_changed_code_or_damaged_cache_is_measured_again(video, tmp_path, measured, monkeypatch):
    def count_after_request() -> int:
        cached_measurements(video, WORLD, 9, tmp_path)
        return len(measured)

    assert (count_after_request(), count_after_request()) == (1, 1)
    os.utime(video, ns=(1, 1))
    assert (count_after_request(), count_after_request()) == (2, 2)
    monkeypatch.setattr(measurements, "_code_hash", lambda sources: "changed")
    assert (count_after_request(), count_after_request()) == (3, 3)
    cached_measurements(video, None, 9, tmp_path)
    assert count_after_request() == 4
    for file in tmp_path.glob("*.npz"):
        file.write_bytes(file.read_bytes()[:100])
    assert (count_after_request(), count_after_request()) == (5, 5)


def test_the_world_can_be_sent_to_worker_processes():
    copy = pickle.loads(pickle.dumps(WORLD))
    assert copy.is_caption(world.sample_clip(0, 0).scene.caption) and not copy.is_caption("a cat")
