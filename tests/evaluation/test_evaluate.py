"""scripts/evaluate.py: metrics of videos with known ground truth, pairs, noise floors, files, and error messages."""

import base64
import contextlib
import csv
import io
import json
import os
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaluation.methods import MeasuredVideo, Method, common_keys
from evaluation.metrics import MetricCurve
from evaluation.results import summarise_differences
from evaluation.tables import difference_table, format_estimate, mean_table
from evaluation.videos import VideoFile, VideoFolder, VideoKey
from scripts import evaluate
from shapes import world
from shapes.metrics import SHAPE_METRICS
from shapes.world import Clip
from utils.clips import read_video
from utils.locks import lock_folder
from utils.tables import markdown_table
from utils.video import VideoWriter

FRAMES = 17


def write_video(
    folder: Path, number: int, frames: np.ndarray, prompt: str = "", sample: int = 0, seed: int = 0, name: str = ""
) -> None:
    """Write a video, with the metadata that inference.py writes unless the prompt is empty."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{name or number}.mp4"
    with VideoWriter(path, preset="ultrafast") as video:
        video.write(frames)
    if prompt:
        metadata = {"prompt": prompt, "sample": sample, "config": {"runtime": {"seed": seed}}}
        path.with_suffix(".json").write_text(json.dumps(metadata))


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """truth/ and wrong/ with the same six captions; every second shape in wrong/ has another colour."""
    root = tmp_path_factory.mktemp("videos")
    for number in range(6):
        clip = world.sample_clip(21, number)
        caption = clip.scene.caption
        write_video(root / "truth", number, world.render(clip, FRAMES), caption, sample=number)
        color = next(c for c in world.COLORS if c not in (clip.scene.color, clip.scene.background))
        scene = replace(clip.scene, color=color) if number % 2 else clip.scene
        write_video(root / "wrong", number, world.render(Clip(scene, clip.x, clip.y), FRAMES), caption, sample=number)
    return root


@dataclass(frozen=True)
class Evaluated:
    """The printed text and the files of one evaluation."""

    out: str
    folder: Path

    @property
    def json(self) -> dict:
        return json.loads((self.folder / "evaluation.json").read_text())

    @property
    def page(self) -> str:
        return (self.folder / "report.html").read_text()


@pytest.fixture(scope="module")
def evaluated(folders, tmp_path_factory) -> Evaluated:
    """truth/ and wrong/ with two noise-floor videos and two examples: several tests inspect this run."""
    output = tmp_path_factory.mktemp("evaluation")
    words = [f"a={folders / 'truth'}", folders / "wrong", "--output", output, "--floor_videos", 2, "--examples", 2]
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setattr(sys, "argv", ["evaluate.py", *map(str, words)])
        evaluate.main()
    return Evaluated(out.getvalue(), output)


@pytest.fixture
def evaluate_fast(tmp_path, call, monkeypatch):
    """Run the script without noise floors, examples and plots, which take seconds; returns (code, stdout, stderr)."""

    def save_empty_plot(path: Path, *_: object) -> None:
        Image.new("RGB", (1, 1)).save(path)

    monkeypatch.setattr("evaluation.results.save_line_plot", save_empty_plot)

    def run(*words: object) -> tuple[int, str, str]:
        return call(evaluate, "--output", tmp_path / "out", "--floor_videos", 0, "--examples", 0, *words)

    return run


def test_folders_are_measured_and_compared(evaluated):
    methods = {method["label"]: method["estimates"] for method in evaluated.json["methods"]}
    assert list(methods) == ["a", "wrong", "truth", "truth through VAE"]
    for name in ("presence", "shape", "direction", "speed", "background", "color"):
        assert methods["a"][name]["mean"] == methods["truth"][name]["mean"] == 1
        assert methods["wrong"][name]["mean"] == (1 if name != "color" else 0.5)
    assert methods["truth through VAE"]["presence"]["mean"] > 0.9
    [pair] = evaluated.json["differences"]
    assert (pair["minuend"], pair["subtrahend"]) == ("wrong", "a")
    color = pair["estimates"]["color"]
    assert color["mean"] == -0.5 and color["low"] < -0.5 < color["high"] <= 0 and color["num_videos"] == 6
    assert pair["estimates"]["presence"]["mean"] == 0
    [line] = [line for line in evaluated.out.splitlines() if line.startswith("| color [%]") and "*" in line]
    assert "-50.0 [" in line


def test_all_files_are_written(evaluated):
    assert Image.open(evaluated.folder / "curves.png").size[0] > 500
    first = evaluated.json["methods"][0]
    assert len(first["videos"]) == 6
    ones = [1.0] * 4
    assert first["curves"]["color"] == {"seconds": [0, 0.25, 0.5, 0.75], "values": ones, "low": ones, "high": ones}
    with (evaluated.folder / "videos.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    colors = [float(row["value"]) for row in rows if (row["method"], row["figure"]) == ("wrong", "color")]
    assert sorted(colors) == [0, 0, 0, 100, 100, 100]
    assert len(rows) == 2 * 6 * len(evaluated.json["figures"])


def test_the_report_is_self_contained(evaluated, tmp_path):
    page = evaluated.page
    assert page.count("data:video/mp4;base64,") == 2 and page.count("data:image/webp;base64,") == 4
    assert page.count("data:image/png;base64,") == 1 and 'src="http' not in page and 'href="http' not in page
    assert "color_error" in page and "python" in page and "minus a" in page
    for data in re.findall(r"data:video/mp4;base64,([^\"]+)", page):
        video = tmp_path / "embedded.mp4"
        video.write_bytes(base64.b64decode(data))
        frames, _ = read_video(video)
        assert len(frames) == FRAMES and frames.shape[2] > 2 * 64  # two panels
    for data in re.findall(r"data:image/webp;base64,([^\"]+)", page):
        assert Image.open(io.BytesIO(base64.b64decode(data))).width == 6 * 128 + 5 * 4


def test_prompts_are_escaped_in_the_report(tmp_path, evaluate_fast):
    write_video(tmp_path / "a", 0, np.zeros((5, 64, 64, 3), np.uint8), "<script>alert(1)</script> & more")
    assert evaluate_fast(tmp_path / "a", "--examples", 1)[0] == 0
    page = Evaluated("", tmp_path / "out").page
    assert "<script>" not in page and "&lt;script&gt;" in page


def test_videos_without_metadata_are_identified_by_a_prompt_file(tmp_path, evaluate_fast):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat, seen from above\na dog\n" + "long " * 60 + "\n")
    frames = np.random.default_rng(0).integers(0, 256, (2, 48, 80, 3)).astype(np.uint8)
    names = {"ours": ["a cat, seen from above-0", "a dog-1", ("long " * 60)[:100].rstrip() + "-0"]}
    names["theirs"] = ["0-0_ema", "1-1_ema", "2-0_ema"]
    for folder, stems in names.items():
        for stem in stems:
            write_video(tmp_path / folder, 0, frames, name=stem)
    words = [tmp_path / "ours", tmp_path / "theirs", "--data_path", prompts]
    code, out, _ = evaluate_fast(*words)
    assert code == 0 and "theirs (3 pairs)" in out and "| presence" not in out and "| saturation_drift" in out
    (tmp_path / "ours" / "a bird-0.mp4").write_bytes((tmp_path / "ours" / "a dog-1.mp4").read_bytes())
    code, _, err = evaluate_fast(*words)
    assert code == 2 and "a bird-0.mp4 matches none of the 3 prompts" in err


def test_the_report_opens_with_videos_and_headline_figures(evaluated):
    page = evaluated.page
    video, more, metrics, fold = (page.index(text) for text in ("<video", "1 more prompts", 'id="metrics"', "Drift: "))
    assert video < more < metrics < fold
    opening = page[metrics:fold].split("<details>")[0]
    rows = re.findall(r"<td>(\w+) \[", opening)
    assert rows == 2 * ["presence", "moving", "direction", "color_error", "color_drift", "motion"]
    groups = re.findall(r"<summary>(\w+): ([^<]+)</summary>", page)
    assert [title for title, _ in groups] == ["Appearance", "Motion", "Drift", "Seams"]
    names = [name for _, list_of_names in groups for name in list_of_names.split(", ")]
    assert sorted(names) == sorted(evaluated.json["figures"])


def test_the_summary_names_the_keys_that_differ():
    def folder(label: str, config: dict | None) -> VideoFolder:
        metadata = {} if config is None else {"config": config}
        return VideoFolder(label, label, [VideoFile(Path(label), VideoKey("p", 0, 0), metadata)])

    one = {"rollout": {"schedule": "block_first", "window": 21}, "runtime": {"threads": 1}}
    other = {"rollout": {"schedule": "timestep_first", "window": 21}, "runtime": {"threads": 2}}
    assert summarise_differences([folder("a", one), folder("b", other)]) == (
        "What differs: rollout.schedule is block_first in a, timestep_first in b."
    )
    many = {"rollout": {str(number): number for number in range(6)}}
    assert summarise_differences([folder("a", one), folder("b", many)]).endswith("; 4 more keys differ.")
    assert "equal" in summarise_differences([folder("a", one), folder("b", one)])
    assert "b have no stored configuration" in summarise_differences([folder("a", one), folder("b", None)])
    assert "One method" in summarise_differences([folder("a", one)])


def test_max_frames_measures_and_shows_the_beginning_only(tmp_path, evaluate_fast):
    clip = world.sample_clip(21, 0)
    frames = np.concatenate([world.render(clip, 9), np.zeros((8, 64, 64, 3), np.uint8)])
    write_video(tmp_path / "half", 0, frames, clip.scene.caption)
    means = []
    for words in ([], ["--max_frames", 9]):
        assert evaluate_fast(tmp_path / "half", "--examples", 1, *words)[0] == 0
        result = Evaluated("", tmp_path / "out")
        means.append(result.json["methods"][0]["estimates"]["presence"]["mean"])
        [data] = re.findall(r"data:video/mp4;base64,([^\"]+)", result.page)
        (tmp_path / "shown.mp4").write_bytes(base64.b64decode(data))
        assert len(read_video(tmp_path / "shown.mp4")[0]) == (9 if words else 17)
    assert means == [9 / 17, 1]


@pytest.mark.parametrize("flag", ["--metrics", "--figures"])
def test_cached_measurements_are_reused_for_other_tables(folders, evaluated, evaluate_fast, monkeypatch, flag):
    monkeypatch.setattr("evaluation.measurements.measure_file", lambda *_: pytest.fail("measured again"))
    words = [f"a={folders / 'truth'}", folders / "wrong", "--cache", evaluated.folder / "observed", "--output"]
    output = evaluated.folder / flag[2:]
    code, out, _ = evaluate_fast(*words, output, flag, "color", "presence")
    assert code == 0
    names = [line.split()[1] for line in out.splitlines() if line.startswith("| ") and "[%]" in line]
    assert names == ["color", "presence", "color", "presence"]
    assert (output / "videos.csv").read_text() == (evaluated.folder / "videos.csv").read_text()
    assert len(Evaluated("", output).json["figures"]) > 20


def test_a_second_evaluation_in_the_same_folder_is_refused(folders, tmp_path, call):
    words = (folders / "truth", "--output", tmp_path / "out", "--cache", tmp_path / "cache")
    (tmp_path / "out").mkdir()
    with lock_folder(tmp_path / "out", "evaluating in"):
        code, _, err = call(evaluate, *words)
    assert code == 2 and f"error: another process is evaluating in {tmp_path / 'out'} (process {os.getpid()} on " in err
    assert not list((tmp_path / "cache").iterdir()) and not (tmp_path / "out/evaluation.json").exists()


def test_unknown_metrics_are_refused(folders, evaluate_fast):
    code, _, err = evaluate_fast(folders / "truth", "--metrics", "color", "beauty")
    assert code == 2 and "no metric 'beauty'" in err and "presence" in err


def test_videos_are_paired_by_prompt_seed_and_sample(folders, evaluated, tmp_path, evaluate_fast):
    few = tmp_path / "few"
    clip = world.sample_clip(21, 2)
    for number, (sample, seed) in enumerate([(2, 0), (0, 0), (2, 5)]):
        write_video(few, number, world.render(clip, FRAMES), clip.scene.caption, sample, seed)
    code, out, _ = evaluate_fast(folders / "wrong", few, "--cache", evaluated.folder / "observed")
    assert code == 0 and "few (1 pairs)" in out
    code, _, err = evaluate_fast(few, folders / "truth", few / "../few")
    assert code == 2 and "same name" in err


def test_curves_and_tables():
    def measured(prompt: str, values: list[float], valid: list[bool]) -> MeasuredVideo:
        curve = MetricCurve(np.array(values), np.array(valid))
        sums = {m.name: curve.sum_between(0, 1) for m in SHAPE_METRICS}
        return MeasuredVideo(VideoKey(prompt, 0, 0), "x.mp4", sums, {"c": curve})

    one = measured("a", [1, 1, 0, 0, 5, 5, 5, 5, 9], [True] * 4 + [False] * 4 + [True])
    other = measured("b", [1] * 4, [True] * 4)
    method = Method("m", [one, other])
    assert method.mean_curve("c", 4).mean.tolist()[:1] == [0.75] and np.isnan(method.mean_curve("c", 4).mean[1])
    assert one.curves["c"].sum_between(0.5, 1) == (9.0, 1.0)
    assert common_keys(method, Method("n", [other])) == [other.key]
    assert markdown_table(mean_table([method], SHAPE_METRICS)).splitlines()[0].split("|")[2].strip() == "m (2 videos)"
    assert difference_table([Method("n", [other]), Method("m", [one])], SHAPE_METRICS)[1][1] == "no pairs"
    metric = SHAPE_METRICS[0]
    assert format_estimate(Method("n", [other]).estimate(metric.name), metric) == "100.0 [100.0, 100.0]"


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda folder: None, "no folder"),
        (lambda folder: folder.mkdir(), "no videos in"),
        (lambda folder: (folder.mkdir(), (folder / "x.mp4").touch()), "has no metadata file x.json"),
        (
            lambda folder: write_video(
                folder, 0, np.zeros((3, 32, 32, 3), np.uint8), world.sample_clip(0, 0).scene.caption
            ),
            "frames of the miniature world are",
        ),
        (
            lambda folder: [write_video(folder, i, np.zeros((3, 64, 64, 3), np.uint8), "a cat") for i in range(2)],
            "have the same prompt, seed and sample",
        ),
    ],
)
def test_mistakes_are_reported_in_one_line(tmp_path, evaluate_fast, prepare, message):
    folder = tmp_path / "videos"
    prepare(folder)
    code, _, err = evaluate_fast(folder)
    line = err.splitlines()[-1]
    assert code == 2 and line.startswith("error:") and message in line and "Traceback" not in err


@pytest.mark.parametrize("words", [["--floor_videos", -1], ["--block_frames", 0], ["--max_frames", 1]])
def test_invalid_numbers_are_refused(folders, call, words):
    code, _, err = call(evaluate, folders / "truth", *words)
    assert code == 2 and words[0] in err
