"""Damaged records: metadata of videos, logs of runs, profiles, and the files beside ODE pairs."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

import inference
from evaluation.videos import find_videos
from pipeline.parallel.profile import RankProfile
from scripts import contact_sheet, make_teaser, plot_metrics
from trainer.datasets.ode_pairs import read_sigmas
from trainer.logging import read_curves
from utils.config_files import read_metadata
from utils.errors import UserError
from utils.video import VideoWriter


@pytest.fixture(scope="module")
def video(world, tmp_path_factory, request) -> Path:
    """A folder with a finished video of the tiny model."""
    import sys
    from unittest import mock

    folder = tmp_path_factory.mktemp("video")
    words = ["--config_path", world.config, "--prompt", "a", "--output_folder", folder, "--num_output_frames", 3]
    with mock.patch.object(sys, "argv", ["inference.py", *map(str, words)]):
        inference.main()
    return folder


VALUES = {"prompt": (None, 3, True, [1], {"a": 1}, 1.5), "sample": (None, "x", True, -1, [1], 1.5, 10**9)}
VALUES |= {"name": VALUES["prompt"], "prefix": (3, [1], {"a": 1}, True), "config": (None, [], 3, "x", {"x": 1})}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in VALUES.items() for value in values])
def test_metadata_with_values_of_other_types(video, tmp_path, refuse, key, value):
    content = json.loads((video / "a-0.json").read_text()) | {key: value}
    (tmp_path / "x.json").write_text(json.dumps(content))
    words = ("--config_path", tmp_path / "x.json", "--output_folder", tmp_path / "out")
    refuse(inference.main, words)
    assert not list(tmp_path.glob("out/*.mp4"))


JSON = ("", "[]", "3", "null", '"x"', "{", "\x00", "[" * 100_000)
BESIDE = (*JSON, "{}", '{"config": 3}', '{"config": {"model": 3}}', '{"config": {"model": null}}', '{"config": []}')


@pytest.mark.parametrize("text", BESIDE, ids=lambda text: text[:30])
def test_damaged_metadata_beside_a_finished_video_is_a_note(world, video, capsys, monkeypatch, text):
    file = video / "a-0.json"
    good, before = file.read_text(), (video / "a-0.mp4").read_bytes()
    words = ["--config_path", world.config, "--prompt", "a", "--output_folder", video, "--num_output_frames", 3]
    monkeypatch.setattr("sys.argv", ["inference.py", *map(str, words)])
    try:
        file.write_text(text)
        inference.main()
    finally:
        file.write_text(good)
    assert "is damaged; --overwrite" in capsys.readouterr().out
    assert (video / "a-0.mp4").read_bytes() == before


def test_older_metadata_names_the_prefix_differently(tmp_path):
    content = {"config": {}, "prompt": "a", "name": "a", "sample": 0, "condition": "start.png"}
    (tmp_path / "x.json").write_text(json.dumps(content))
    metadata = read_metadata(str(tmp_path / "x.json"))
    assert metadata is not None and metadata["prefix"] == "start.png"


@pytest.mark.parametrize("text", JSON, ids=lambda text: text[:30])
def test_other_json_is_no_metadata(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=r"x\.json is not"):
        read_metadata(str(tmp_path / "x.json"))


@pytest.mark.parametrize("text", [*JSON, "{}", '{"name": 3}', '{"name": null}'], ids=lambda text: text[:30])
def test_readers_of_videos_refuse_damaged_metadata(tmp_path, refuse, text):
    with VideoWriter(tmp_path / "a-0.mp4", fps=16) as writer:
        writer.write(np.zeros((2, 16, 16, 3), np.uint8))
    (tmp_path / "a-0.json").write_text(text)
    refuse(contact_sheet.main, (tmp_path,), "a-0.json")
    refuse(make_teaser.main, (tmp_path, "--output", tmp_path / "x.webp"), "a-0.json")
    with pytest.raises(UserError):
        find_videos(str(tmp_path))


@pytest.mark.parametrize("seed", ["1e999", '"x"', "null", "[1]", "{}"])
def test_metadata_without_a_seed_identifies_no_video(tmp_path, seed):
    (tmp_path / "a-0.mp4").touch()
    text = f'{{"prompt": "a", "sample": 0, "config": {{"runtime": {{"seed": {seed}}}}}}}'
    (tmp_path / "a-0.json").write_text(text)
    with pytest.raises(UserError, match="metadata"):
        find_videos(str(tmp_path))


# ---- Logs ----

DAMAGED = (
    *("hello", "5", "[]", "null", '"x"', "{", '{"loss": 1}', '{"iteration": "x", "loss": 1}', "[" * 100_000),
    *('{"iteration": 1, "loss": "x"}', '{"iteration": 1, "loss": [1]}', '{"iteration": 1, "loss": null}'),
    *('{"iteration": [1], "loss": 1}', '{"iteration": true, "loss": 1}', '{"iteration": 1.5, "loss": 1}', "\x00\x01"),
)


@pytest.mark.parametrize("line", DAMAGED, ids=lambda line: line[:30])
def test_damaged_lines_of_a_log_are_skipped_with_a_note(tmp_path, capsys, line):
    log = f'{{"iteration": 1, "loss": 2}}\n{line}\n{{"iteration": 2, "loss": 3}}\n'
    (tmp_path / "metrics.jsonl").write_text(log)
    x, y = read_curves(tmp_path)["loss"]
    assert x.tolist() == [1, 2] and y.tolist() == [2, 3]
    assert "note: 1 damaged line of" in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"hello\n", b"\xff\xfe\n", b"[]\n", b"5"])
def test_a_log_without_a_valid_line_cannot_be_plotted(tmp_path, refuse, content):
    (tmp_path / "metrics.jsonl").write_bytes(content)
    refuse(plot_metrics.main, (tmp_path, "--output", tmp_path / "x.png"), "has no valid line")


@pytest.mark.parametrize("kind", ["missing", "folder"])
def test_a_run_without_a_log_cannot_be_plotted(tmp_path, refuse, kind):
    if kind == "folder":
        (tmp_path / "metrics.jsonl").mkdir()
    refuse(plot_metrics.main, (tmp_path, "--output", tmp_path / "x.png"), "cannot read")


# ---- Profiles and noise levels ----

SPAN = '{"name": "denoise", "block": 0, "start": %s, "end": %s}'
PROFILES = (
    *('{"rank": 0}', '{"rank": 0, "spans": 3}', '{"rank": 0, "spans": [3]}', '{"rank": 0, "spans": null}', "3", "[]"),
    '{"rank": 0, "spans": [{"name": 1}]}',
    *(f'{{"rank": 0, "spans": [{SPAN % times}]}}' for times in (('"a"', "1"), ("0", "null"), ("0", "NaN"), ("5", "1"))),
    '{"rank": 0, "spans": [{"name": ["x"], "block": 0, "start": 0, "end": 1}]}',
)


@pytest.mark.parametrize("text", PROFILES)
def test_damaged_profiles(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match="is not a profile"):
        RankProfile.load(tmp_path / "x.json")


@pytest.mark.parametrize("text", [*JSON, "{}", '["a"]', "[[1], [0]]", "[true, false]", "[null]"], ids=lambda t: t[:30])
def test_damaged_noise_levels_of_ode_pairs(tmp_path, text):
    (tmp_path / "sigmas.json").write_text(text)
    with pytest.raises(UserError, match=r"sigmas\.json"):
        read_sigmas(tmp_path)


def test_an_unreadable_file_is_named(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root reads every file")
    (tmp_path / "sigmas.json").write_text("[1, 0]")
    (tmp_path / "sigmas.json").chmod(0)
    with pytest.raises(UserError, match=r"sigmas\.json"):
        read_sigmas(tmp_path)
