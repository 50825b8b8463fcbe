"""scripts/evaluate_vbench.py with a stub of VBench 0.1.5: layout, names, prompts, resuming, tables, error messages."""

import csv
import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest

from evaluation.vbench.installation import DEFAULT_DIMENSIONS
from scripts import evaluate_vbench

STUB = Path(__file__).parent / "vbench_stub"


def save(folder: Path, name: str, prompt: str, extended: str = "", seed: int = 0, sample: int = 0) -> None:
    """Write a placeholder for a video, with the metadata that inference.py writes."""
    folder.mkdir(exist_ok=True, parents=True)
    (folder / f"{name}.mp4").write_text(f"video {name}")
    metadata = {"prompt": extended or prompt, "name": prompt, "sample": sample, "config": {"runtime": {"seed": seed}}}
    (folder / f"{name}.json").write_text(json.dumps(metadata))


@pytest.fixture
def stub(tmp_path, monkeypatch) -> Path:
    """Make the stub importable; returns the file that records its calls."""
    monkeypatch.setenv("PYTHONPATH", str(STUB))
    monkeypatch.setenv("STUB_CALLS", str(tmp_path / "calls"))
    return tmp_path / "calls"


@pytest.fixture
def folders(tmp_path) -> Path:
    """plain/ and extended/ with the same two prompts; extended/ comes from longer prompts and has other file names."""
    for sample in range(2):
        save(tmp_path / "plain", f"cat-{sample}", "a cat", seed=7, sample=sample)
        save(tmp_path / "extended", f"{sample}", "a cat", "a long story of a cat", seed=8, sample=sample)
    save(tmp_path / "plain", "dog", "a dog/wolf barking", seed=7)
    save(tmp_path / "extended", "dog", "a dog/wolf barking", "a long story of a dog", seed=8)
    return tmp_path


@pytest.fixture
def suite(tmp_path) -> Path:
    """Videos of two of the stub's three prompts."""
    for sample in range(2):
        extended = f"a castle that is {9 - sample} centuries old"  # sorts in reverse order
        save(tmp_path / "suite", f"s{sample}", "a castle, oil painting", extended, seed=1, sample=sample)
    save(tmp_path / "suite", "earlier", "a castle, oil painting", "some castle", seed=0)
    save(tmp_path / "suite", "clap", "a person is clapping")
    return tmp_path / "suite"


@pytest.fixture
def configs(tmp_path) -> Path:
    """VBench-Long's tables."""
    (tmp_path / "configs").mkdir()
    for name in ("clip_length_mix", "slow_fast_params", "subject_mapping_table", "background_mapping_table"):
        (tmp_path / f"configs/{name}.yaml").touch()
    return tmp_path / "configs"


def scored_dimensions(calls: Path) -> list[str]:
    """Return the dimensions that VBench has scored since the last call, and clear the list."""
    lines = calls.read_text().split() if calls.exists() else []
    calls.write_text("")
    return lines


def test_folders_are_scored_side_by_side_with_original_prompts(folders, stub, tmp_path, call):
    words = (f"a={folders / 'plain'}", folders / "extended", "--output", tmp_path / "out")
    code, out, err = call(evaluate_vbench, *words)
    assert code == 0, err
    assert scored_dimensions(stub) == [*DEFAULT_DIMENSIONS, *DEFAULT_DIMENSIONS]
    assert "extended: 3 of 3 videos were generated from extended prompts" in out and "a: " not in out
    assert "extended and a have 0 prompts, seeds and samples in common" in out
    score = (5 + 5 + 18) / 3
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line.startswith("|")]
    assert rows[0] == ["[%]", "a (3 videos)", "extended (3 videos)"]
    assert rows[2:] == [[name, f"{score:.2f}", f"{score:.2f}"] for name in DEFAULT_DIMENSIONS]
    report = json.loads((tmp_path / "out/custom_input.json").read_text())
    assert [(m["label"], m["seeds"], m["num_extended"]) for m in report["methods"]] == [
        ("a", [7], 0),
        ("extended", [8], 3),
    ]
    scored = {video["file"]: video for video in report["methods"][1]["videos"]["imaging_quality"]}
    assert scored["1.mp4"] == {"file": "1.mp4", "prompt": "a cat", "seed": 8, "sample": 1, "score": 0.05}
    assert scored["dog.mp4"]["score"] == 0.18
    with (tmp_path / "out/custom_input.csv").open() as file:
        lines = list(csv.reader(file))
    assert lines[0] == ["dimension", "a", "extended"] and float(lines[1][1]) == pytest.approx(score / 100)
    links = sorted((tmp_path / "out/custom_input/a/videos").iterdir())
    assert [link.name for link in links] == ["00000.mp4", "00001.mp4", "00002.mp4"]
    assert {link.resolve() for link in links} == {path.resolve() for path in (folders / "plain").glob("*.mp4")}


def test_a_failed_dimension_is_scored_by_the_next_run(folders, stub, tmp_path, call, monkeypatch):
    words = (folders / "plain", "--dimensions", "imaging_quality", "dynamic_degree", "--output", tmp_path / "out")
    monkeypatch.setenv("STUB_FAILS", "imaging_quality")
    code, out, err = call(evaluate_vbench, *words)
    assert code == 2 and "VBench could not score imaging_quality of plain: RuntimeError: no weights" in err
    assert err.splitlines()[-1].startswith("error: VBench failed for imaging_quality of plain")
    assert scored_dimensions(stub) == ["imaging_quality", "dynamic_degree"] and "| failed" in out
    assert "Traceback" in (tmp_path / "out/custom_input/plain/imaging_quality.log").read_text()
    assert "Traceback" not in err
    scores = json.loads((tmp_path / "out/custom_input.json").read_text())["methods"][0]["scores"]
    assert scores["imaging_quality"] is None and scores["dynamic_degree"] == pytest.approx(0.28 / 3)
    monkeypatch.delenv("STUB_FAILS")
    assert call(evaluate_vbench, *words)[0] == 0 and scored_dimensions(stub) == ["imaging_quality"]
    assert call(evaluate_vbench, *words)[0] == 0 and scored_dimensions(stub) == []
    save(folders / "plain", "new", "a cow")  # stored scores are of other videos
    code, out, _ = call(evaluate_vbench, *words)
    assert code == 0 and scored_dimensions(stub) == ["imaging_quality", "dynamic_degree"] and "4 videos" in out
    assert len(list((tmp_path / "out/custom_input/plain/videos").iterdir())) == 4


def test_a_broken_result_is_scored_again(folders, stub, tmp_path, call):
    words = (folders / "plain", "--dimensions", "dynamic_degree", "--output", tmp_path / "out")
    call(evaluate_vbench, *words)
    (tmp_path / "out/custom_input/plain/dynamic_degree.json").write_text("{")
    scored_dimensions(stub)
    assert call(evaluate_vbench, *words)[0] == 0 and scored_dimensions(stub) == ["dynamic_degree"]


def test_videos_of_the_suite_are_named_as_vbench_expects(suite, stub, tmp_path, call):
    code, out, err = call(evaluate_vbench, suite, "--suite", "--output", tmp_path / "out")
    assert code == 0, err
    assert scored_dimensions(stub) == ["imaging_quality", "overall_consistency", "human_action", "appearance_style"]
    assert "2 of VBench's 3 prompts" in out and "3 of 4 videos were generated from extended prompts" in out
    links = {path.name: path.resolve().name for path in (tmp_path / "out/vbench_standard/suite/videos").iterdir()}
    castle = "a castle, oil painting"
    assert links == {
        "a person is clapping-0.mp4": "clap.mp4",
        **{f"{castle}-0.mp4": "earlier.mp4", f"{castle}-1.mp4": "s0.mp4", f"{castle}-2.mp4": "s1.mp4"},
    }
    [method] = json.loads((tmp_path / "out/vbench_standard.json").read_text())["methods"]
    assert method["scores"]["human_action"] == 0.2 and method["scores"]["overall_consistency"] == pytest.approx(0.22)
    assert sorted(v["file"] for v in method["videos"]["appearance_style"]) == ["earlier.mp4", "s0.mp4", "s1.mp4"]


@pytest.mark.parametrize("kind", ["custom", "suite"])
def test_long_videos_are_scored_by_clips_with_original_prompts(kind, suite, folders, stub, configs, tmp_path, call):
    words = [suite, "--suite"] if kind == "suite" else [folders / "extended"]
    words += ["--long", "--long_configs", configs, "--dimensions", "overall_consistency", "--output", tmp_path / "out"]
    code, _, err = call(evaluate_vbench, *words)
    assert code == 0, err
    mode = {"custom": "long_custom_input", "suite": "long_vbench_standard"}[kind]
    [method] = json.loads((tmp_path / f"out/{mode}.json").read_text())["methods"]
    expected = {"0.mp4": 0.05, "1.mp4": 0.05, "dog.mp4": 0.18}
    if kind == "suite":
        expected = {"earlier.mp4": 0.22, "s0.mp4": 0.22, "s1.mp4": 0.22}
    assert {v["file"]: v["score"] for v in method["videos"]["overall_consistency"]} == pytest.approx(expected)
    raw = tmp_path / f"out/{mode}/{method['label']}/raw/overall_consistency_full_info.json"
    assert {len(entry["video_list"]) for entry in json.loads(raw.read_text())} == {6 if kind == "suite" else 2}


def test_incomplete_clips_are_cut_again_and_complete_clips_are_kept(
    folders, stub, configs, tmp_path, call, monkeypatch
):
    words = (folders / "plain", "--long", "--long_configs", configs, "--output", tmp_path / "out")
    monkeypatch.setenv("STUB_FAILS", "split")
    assert call(evaluate_vbench, *words, "--dimensions", "dynamic_degree")[0] == 2
    assert (tmp_path / "out/long_custom_input/plain/videos/split_clip/00001").exists()
    monkeypatch.setenv("STUB_FAILS", "dynamic_degree")
    assert call(evaluate_vbench, *words, "--dimensions", "dynamic_degree")[0] == 2  # leaves first frames behind
    monkeypatch.delenv("STUB_FAILS")
    clips = sorted((tmp_path / "out/long_custom_input/plain/videos/split_clip").rglob("*.mp4"))
    before = [clip.stat().st_mtime_ns for clip in clips]
    code, _, err = call(evaluate_vbench, *words, "--dimensions", "dynamic_degree", "motion_smoothness")
    assert code == 0, err
    assert len(clips) == 6 and [clip.stat().st_mtime_ns for clip in clips] == before


def test_each_prompt_of_vbench_is_written_once(stub, tmp_path, call):
    code, out, _ = call(evaluate_vbench, "--write_prompts", tmp_path / "new/prompts.txt")
    assert code == 0 and "3 prompts" in out
    assert (tmp_path / "new/prompts.txt").read_text().splitlines() == [
        *("a person is clapping", "a red bird", "a castle, oil painting"),
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "give at least one folder"),
        ("{0}/none", "no folder {0}/none"),
        ("{0}/plain {0}/plain", "two folders have the same name"),
        ("a/b={0}/plain", "is not a valid folder name"),
        ("{0}/plain --dimensions beauty", "no dimension 'beauty'; it has subject_consistency,"),
        ("{0}/plain --dimensions color", "color needs VBench's own prompts (--suite)"),
        ("{0}/plain --suite", "has none of VBench's prompts ('a cat')"),
        ("{0}/suite --suite --dimensions color scene", "no videos of the prompts of color, scene"),
        ("{0}/plain --long", "clip_length_mix.yaml is missing"),
        ("{0}/plain --python {0}/none", "--python must name a Python interpreter"),
    ],
)
def test_mistakes_are_reported_in_one_line(folders, suite, stub, tmp_path, call, words, message):
    code, _, err = call(evaluate_vbench, *words.format(folders).split(), "--output", tmp_path / "out")
    line = err.splitlines()[-1]
    assert code == 2 and line.startswith("error:") and message.format(folders) in line and "Traceback" not in err
    assert scored_dimensions(stub) == []


def test_too_many_samples_of_a_prompt_are_refused(stub, tmp_path, call):
    for sample in range(6):
        save(tmp_path / "many", str(sample), "a red bird", sample=sample)
    code, _, err = call(evaluate_vbench, tmp_path / "many", "--suite", "--output", tmp_path / "out")
    assert code == 2 and "up to 6 videos per prompt" in err


@pytest.mark.skipif(importlib.util.find_spec("vbench") is not None, reason="VBench is installed")
def test_a_missing_vbench_is_reported_in_one_line(folders, tmp_path, call, monkeypatch):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    code, _, err = call(evaluate_vbench, folders / "plain", "--output", tmp_path / "out")
    [line] = err.splitlines()
    assert code == 2 and "VBench is not installed" in line and "pip install -r requirements-vbench.txt" in line
    assert not (tmp_path / "out").exists()


def test_a_vbench_without_vbench_long_is_reported(folders, tmp_path, call, monkeypatch):
    shutil.copytree(STUB / "vbench", tmp_path / "path/vbench")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "path"))
    code, _, err = call(evaluate_vbench, folders / "plain", "--long", "--python", sys.executable)
    assert code == 2 and "lacks VBench-Long" in err
