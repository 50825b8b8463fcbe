"""scripts/evaluate.py: figures of folders whose truth is known, pairs, floors, and what is wrong in one line."""

import base64
import csv
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaluation.methods import MeasuredVideo, Method, common_keys
from evaluation.metrics import MetricCurve
from evaluation.tables import difference_table, format_estimate, mean_table
from evaluation.videos import VideoKey
from scripts import evaluate
from shapes import world
from shapes.metrics import SHAPE_METRICS
from shapes.world import Clip
from utils.tables import markdown_table
from utils.video import VideoWriter, read_video

FRAMES = 17


def write(folder: Path, number: int, frames: np.ndarray, prompt: str, sample: int = 0, seed: int = 0) -> None:
    """A video with the record that inference.py writes."""
    folder.mkdir(exist_ok=True)
    with VideoWriter(folder / f"{number}.mp4") as video:
        video.write(frames)
    record = {"prompt": prompt, "sample": sample, "config": {"runtime": {"seed": seed}}}
    (folder / f"{number}.json").write_text(json.dumps(record))


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """truth/ and wrong/, the same six prompts; in wrong/ every second shape has another colour."""
    root = tmp_path_factory.mktemp("videos")
    for number in range(6):
        clip = world.sample_clip(21, number)
        caption = clip.scene.caption
        write(root / "truth", number, world.render(clip, FRAMES), caption, sample=number)
        color = next(c for c in world.COLORS if c not in (clip.scene.color, clip.scene.background))
        scene = replace(clip.scene, color=color) if number % 2 else clip.scene
        write(root / "wrong", number, world.render(Clip(scene, clip.x, clip.y), FRAMES), caption, sample=number)
    return root


def test_folders_are_measured_and_compared(folders, tmp_path, call):
    code, out, _ = call(
        evaluate, f"a={folders / 'truth'}", folders / "wrong", "--output", tmp_path, "--floor_videos", 2
    )
    assert code == 0
    result = json.loads((tmp_path / "evaluation.json").read_text())
    methods = {method["label"]: method["estimates"] for method in result["methods"]}
    assert list(methods) == ["a", "wrong", "truth", "truth through VAE"]
    for name in ("presence", "shape", "direction", "speed", "background", "color"):
        assert methods["a"][name]["mean"] == methods["truth"][name]["mean"] == 1
        assert methods["wrong"][name]["mean"] == (1 if name != "color" else 0.5)
    assert methods["truth through VAE"]["presence"]["mean"] > 0.9
    [pair] = result["differences"]
    assert (pair["minuend"], pair["subtrahend"]) == ("wrong", "a")
    color = pair["estimates"]["color"]
    assert color["mean"] == -0.5 and color["low"] < -0.5 < color["high"] <= 0 and color["num_videos"] == 6
    assert pair["estimates"]["presence"]["mean"] == 0
    [line] = [line for line in out.splitlines() if line.startswith("| color [%]") and "*" in line]
    assert "-50.0 [" in line
    assert Image.open(tmp_path / "curves.png").size[0] > 500
    first = result["methods"][0]
    assert len(first["videos"]) == 6
    assert first["curves"]["color"] == {"seconds": [0, 0.25, 0.5, 0.75], "values": [1.0] * 4}
    with (tmp_path / "videos.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    colors = [float(row["value"]) for row in rows if (row["method"], row["figure"]) == ("wrong", "color")]
    assert sorted(colors) == [0, 0, 0, 100, 100, 100]
    assert len(rows) == 2 * 6 * len(result["figures"])


def test_the_report_holds_everything(folders, tmp_path, call):
    words = ["--output", tmp_path, "--floor_videos", 0, "--examples", 2]
    assert call(evaluate, folders / "truth", folders / "wrong", *words)[0] == 0
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:video/mp4;base64,") == 2 and page.count("data:image/webp;base64,") == 4
    assert page.count("data:image/png;base64,") == 1 and 'src="http' not in page and 'href="http' not in page
    assert "color_error" in page and "python" in page and "minus truth" in page
    for data in re.findall(r"data:video/mp4;base64,([^\"]+)", page):
        video = tmp_path / "embedded.mp4"
        video.write_bytes(base64.b64decode(data))
        frames, _ = read_video(video)
        assert len(frames) == FRAMES and frames.shape[2] > 2 * 64  # two panels
    for data in re.findall(r"data:image/webp;base64,([^\"]+)", page):
        assert Image.open(io.BytesIO(base64.b64decode(data))).width == 6 * 128 + 5 * 4


def test_prompts_cannot_break_the_page(tmp_path, call):
    write(tmp_path / "a", 0, np.zeros((5, 64, 64, 3), np.uint8), "<script>alert(1)</script> & more")
    assert call(evaluate, tmp_path / "a", "--output", tmp_path / "out")[0] == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<script>" not in page and "&lt;script&gt;" in page


def test_any_videos_with_a_prompt_file(tmp_path, call):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat, seen from above\na dog\n" + "long " * 60 + "\n")
    rng = np.random.default_rng(0)
    names = {"ours": ["a cat, seen from above-0", "a dog-1", ("long " * 60)[:100].rstrip() + "-0"]}
    names["theirs"] = ["0-0_ema", "1-1_ema", "2-0_ema"]
    for folder, stems in names.items():
        (tmp_path / folder).mkdir()
        for stem in stems:
            with VideoWriter(tmp_path / folder / f"{stem}.mp4") as video:
                video.write(rng.integers(0, 256, (9, 48, 80, 3)).astype(np.uint8))
    words = [tmp_path / "ours", tmp_path / "theirs", "--output", tmp_path / "out", "--data_path", prompts]
    code, out, _ = call(evaluate, *words)
    assert code == 0 and "theirs (3 pairs)" in out and "| presence" not in out and "| saturation_drift" in out
    (tmp_path / "ours" / "a bird-0.mp4").write_bytes((tmp_path / "ours" / "a dog-1.mp4").read_bytes())
    code, _, err = call(evaluate, *words)
    assert code == 2 and "a bird-0.mp4 matches none of the 3 prompts" in err


def test_only_the_beginning_is_measured_if_asked(folders, tmp_path, call):
    half = tmp_path / "half"
    for number in range(2):
        clip = world.sample_clip(21, number)
        frames = np.concatenate([world.render(clip, 9), np.zeros((8, 64, 64, 3), np.uint8)])
        write(half, number, frames, clip.scene.caption)
    means = []
    for words in ([], ["--max_frames", 9]):
        assert call(evaluate, half, "--output", tmp_path / "out", "--floor_videos", 0, *words)[0] == 0
        result = json.loads((tmp_path / "out" / "evaluation.json").read_text())
        means.append(result["methods"][0]["estimates"]["presence"]["mean"])
        [data, *_] = re.findall(r"data:video/mp4;base64,([^\"]+)", (tmp_path / "out" / "report.html").read_text())
        (tmp_path / "shown.mp4").write_bytes(base64.b64decode(data))
        assert len(read_video(tmp_path / "shown.mp4")[0]) == (9 if words else 17)
    assert means == [9 / 17, 1]


def test_figures_are_chosen(folders, tmp_path, call):
    words = [folders / "truth", folders / "wrong", "--output", tmp_path, "--floor_videos", 0, "--figures"]
    code, out, _ = call(evaluate, *words, "color", "presence")
    assert code == 0
    assert [line.split()[1] for line in out.splitlines() if line.startswith("| ") and "[%]" in line] == [
        *("color", "presence"),
        *("color", "presence"),
    ]
    assert len(json.loads((tmp_path / "evaluation.json").read_text())["figures"]) > 20
    code, _, err = call(evaluate, *words, "color", "beauty")
    assert code == 2 and "no metric 'beauty'" in err and "presence" in err


def test_a_second_run_does_not_look_again(folders, tmp_path, call, monkeypatch):
    words = [folders / "truth", folders / "wrong", "--floor_videos", 0, "--cache", tmp_path / "seen", "--output"]
    assert call(evaluate, *words, tmp_path / "one")[0] == 0
    monkeypatch.setattr("evaluation.measurements.measure_file", lambda *_: pytest.fail("measured again"))
    code, _, _ = call(evaluate, *words, tmp_path / "two")
    assert code == 0

    assert (tmp_path / "one" / "videos.csv").read_text() == (tmp_path / "two" / "videos.csv").read_text()


def test_videos_are_paired_by_prompt_seed_and_sample(folders, tmp_path, call):
    few = tmp_path / "few"
    clip = world.sample_clip(21, 2)
    write(few, 0, world.render(clip, FRAMES), clip.scene.caption, sample=2)
    write(few, 1, world.render(clip, FRAMES), clip.scene.caption, sample=0)
    write(few, 2, world.render(clip, FRAMES), clip.scene.caption, sample=2, seed=5)
    code, out, _ = call(evaluate, folders / "wrong", few, "--output", tmp_path / "out", "--floor_videos", 0)
    assert code == 0 and "few (1 pairs)" in out
    code, out, _ = call(evaluate, few, folders / "truth", few / "../few", "--output", tmp_path / "out")
    assert code == 2  # one name for two


def test_curves_and_tables():
    def measured(prompt: str, values: list[float], counts: list[bool]) -> MeasuredVideo:
        curve = MetricCurve(np.array(values), np.array(counts))
        return MeasuredVideo(
            VideoKey(prompt, 0, 0), "x.mp4", {m.name: curve.sum_between(0, 1) for m in SHAPE_METRICS}, {"c": curve}
        )

    one = measured("a", [1, 1, 0, 0, 5, 5, 5, 5, 9], [True] * 4 + [False] * 4 + [True])
    other = measured("b", [1] * 4, [True] * 4)
    method = Method("m", [one, other])
    assert method.mean_curve("c", 4).tolist()[:1] == [0.75] and np.isnan(method.mean_curve("c", 4)[1])
    assert one.curves["c"].sum_between(0.5, 1) == (9.0, 1.0)
    assert common_keys(method, Method("n", [other])) == [other.key]
    assert markdown_table(mean_table([method], SHAPE_METRICS)).splitlines()[0].split("|")[2].strip() == "m (2 videos)"
    assert difference_table([Method("n", [other]), Method("m", [one])], SHAPE_METRICS)[1][1] == "no pairs"
    metric = SHAPE_METRICS[0]
    assert format_estimate(Method("n", [other]).estimate(metric.name), metric) == "100.0 [100.0, 100.0]"


@pytest.mark.parametrize(
    ("prepare", "says"),
    [
        (lambda folder: None, "no folder"),
        (lambda folder: folder.mkdir(), "no videos in"),
        (lambda folder: (folder.mkdir(), (folder / "x.mp4").touch()), "has no metadata file x.json"),
        (
            lambda folder: write(folder, 0, np.zeros((3, 32, 32, 3), np.uint8), world.sample_clip(0, 0).scene.caption),
            "frames of the shapes world are",
        ),
        (
            lambda folder: [write(folder, i, np.zeros((3, 64, 64, 3), np.uint8), "a cat") for i in range(2)],
            "have the same prompt, seed and sample",
        ),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tmp_path, call, prepare, says):
    folder = tmp_path / "videos"
    prepare(folder)
    code, _, err = call(evaluate, folder, "--output", tmp_path / "out")
    line = err.splitlines()[-1]
    assert code == 2 and line.startswith("error:") and says in line and "Traceback" not in err


@pytest.mark.parametrize("words", [["--floor_videos", -1], ["--block_frames", 0], ["--max_frames", 1]])
def test_numbers_that_make_no_sense_are_refused(folders, call, words):
    code, _, err = call(evaluate, folders / "truth", *words)
    assert code == 2 and words[0] in err
