"""scripts/compare_videos.py: pairing of videos, kept results, and error messages."""

import json
from pathlib import Path

import numpy as np
import pytest

from scripts import compare_videos
from utils.clips import read_video
from utils.video import VideoWriter


def save(path: Path, prompt: str = "", name: str = "", seed: int = 0, sample: int = 0, grey: int = 90) -> Path:
    """Write a grey video, with the metadata that inference.py writes unless the prompt is empty."""
    path.parent.mkdir(exist_ok=True)
    with VideoWriter(path, preset="ultrafast") as video:
        video.write(np.full((2, 64, 64, 3), grey, np.uint8))
    metadata = {"prompt": prompt, "name": name or prompt, "sample": sample, "config": {"runtime": {"seed": seed}}}
    if prompt:
        path.with_suffix(".json").write_text(json.dumps(metadata))
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """a/ and b/ share two videos with different file names; each also has another video. c/ shares none."""
    root = tmp_path_factory.mktemp("videos")
    save(root / "a/cat-0.mp4", "a long cat", "a cat", grey=40)
    save(root / "a/cat-1.mp4", "a long cat", "a cat", sample=1, grey=80)
    save(root / "a/dog.mp4", "a dog")
    save(root / "b/7.mp4", "a long cat", "a cat", grey=120)
    save(root / "b/8.mp4", "a long cat", "a cat", sample=1, grey=160)
    save(root / "b/9.mp4", "a long cat", "a cat", seed=1)
    save(root / "c/cow.mp4", "a cow")
    return root


def grey_values(path: Path) -> list[int]:
    """Return the grey values of two panels."""
    frame = read_video(path)[0][0]
    return [int(round(float(frame[100:200, x : x + 100].mean()), -1)) for x in (80, 340)]


def test_folders_are_paired_by_prompt_seed_and_sample(folders, tmp_path, call):
    code, out, _ = call(
        compare_videos, f"one={folders / 'a'}", folders / "b", "--output", tmp_path / "out", "--timestamp"
    )
    assert code == 0 and "wrote 2 videos" in out
    assert "skipping 1 of one's 3 videos, which are not in all folders" in out and "1 of b's 3 videos" in out
    assert sorted(p.name for p in (tmp_path / "out").glob("*.mp4")) == ["cat-0.mp4", "cat-1.mp4"]
    assert grey_values(tmp_path / "out/cat-0.mp4") == [40, 120] and grey_values(tmp_path / "out/cat-1.mp4") == [80, 160]
    metadata = json.loads((tmp_path / "out/cat-0.json").read_text())
    assert metadata["caption"] == "a cat" and [video["label"] for video in metadata["videos"]] == ["one", "b"]


def test_existing_videos_are_kept_without_overwrite(folders, tmp_path, call):
    words = (folders / "a", folders / "b", "--output", tmp_path)
    code, out, _ = call(compare_videos, *words, "--limit", 1)
    assert code == 0 and [p.name for p in tmp_path.glob("*.mp4")] == ["cat-0.mp4"]
    before = (tmp_path / "cat-0.mp4").stat().st_mtime_ns
    code, out, _ = call(compare_videos, *words)
    assert "1 of 2 videos exist already" in out and (tmp_path / "cat-1.mp4").exists() and "other videos" not in out
    assert (tmp_path / "cat-0.mp4").stat().st_mtime_ns == before
    code, out, _ = call(compare_videos, folders / "b", folders / "b/../a", "--output", tmp_path, "--limit", 1)
    assert code == 0  # named 7.mp4, as in the first folder
    (tmp_path / "7.mp4").rename(tmp_path / "cat-0.mp4")
    code, out, _ = call(compare_videos, f"new={folders / 'a'}", folders / "b", "--output", tmp_path)
    assert "which shows other videos; use --overwrite" in out and grey_values(tmp_path / "cat-0.mp4") == [120, 40]
    code, out, _ = call(compare_videos, *words, "--overwrite")
    assert "wrote 2 videos" in out and grey_values(tmp_path / "cat-0.mp4") == [40, 120]


def test_single_files_give_one_video(folders, tmp_path, call):
    plain = save(tmp_path / "plain.mp4")
    one, other = folders / "a/cat-0.mp4", folders / "b/8.mp4"
    code, out, _ = call(compare_videos, f"x={one}", f"y={other}", plain, "--columns", 1, "--output", tmp_path / "o.mp4")
    assert code == 0 and f"wrote {tmp_path / 'o.mp4'}" in out
    height, width = read_video(tmp_path / "o.mp4")[0].shape[1:3]
    assert height > 3 * 256 and width < 300
    assert json.loads((tmp_path / "o.json").read_text())["caption"] == ""  # plain.mp4 has no metadata
    code, out, _ = call(compare_videos, f"x={one}", other, "--scale", 2, "--fps", 8, "--output", tmp_path / "f")
    frames, fps = read_video(tmp_path / "f/x-vs-8.mp4")
    assert fps == 8 and frames.shape[2] < 300
    assert json.loads((tmp_path / "f/x-vs-8.json").read_text())["caption"] == "a cat"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("{0}/a", "nothing to compare {0}/a with"),
        ("{0}/a {0}/none", "no folder {0}/none"),
        ("{0}/a/cat-0.mp4 {0}/a/none.mp4", "cannot read video {0}/a/none.mp4: No such file"),
        ("{0}/a/cat-0.mp4 {0}/text.mp4", "cannot read video {0}/text.mp4"),
        ("{0}/a {0}/b/7.mp4", "folders or files, not both"),
        ("{0}/a {0}/a", "two folders have the same name"),
        ("{0}/a {0}/c", "a has 3, such as 'a dog' (seed 0, sample 0); c has 1, such as 'a cow' (seed 0, sample 0)"),
        ("{0}/a {0}/b --scale -1", "--scale must be 0 to 64"),
        ("{0}/a {0}/b --fps 2000", "--fps must be 0 to 999"),
        ("{0}/a {0}/b --output {0}/a", "one of the folders to compare"),
        ("{0}/a/cat-0.mp4 {0}/b/7.mp4 --output {0}/b/7.mp4", "one of the videos to compare"),
        ("{0}/a {0}/b --output {1}/x.mp4", "--output must be a folder"),
    ],
)
def test_mistakes_are_reported_in_one_line(folders, tmp_path, call, words, message):
    (folders / "text.mp4").write_text("no video")
    words = words if "--output" in words else words + " --output {1}/out"
    code, _, err = call(compare_videos, *words.format(folders, tmp_path).split())
    line = err.splitlines()[-1]
    assert code == 2 and line.startswith("error:") and message.format(folders) in line and "Traceback" not in err
    assert not list(tmp_path.rglob("*.mp4"))
