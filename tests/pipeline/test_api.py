"""The Python API: its videos equal those of inference.py; the examples of docs/api.md and the notebook run."""

import copy
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_model import ROOT

from pipeline import TextToVideo
from pipeline.text_to_video import find_file
from pipeline.video import Video
from utils.config_loading import load_config
from utils.errors import UserError
from utils.video import VideoWriter

PROMPT = "a red circle"


@pytest.fixture(scope="module")
def pipe(world) -> TextToVideo:
    """The tiny model. Tests do not change it."""
    return TextToVideo.load(str(world.config), device="cpu", seed=3)


@pytest.fixture(scope="module")
def video(pipe):
    return pipe.generate(f"  {PROMPT} ")


# ---- The same videos as inference.py ----


def test_a_video_equals_that_of_inference(tmp_path, world, command, video):
    words = ("--config_path", world.config, "--output_folder", tmp_path, "--seed", 3, "--save_latents")
    result = command(*words, "--prompt", PROMPT)
    assert result.code == 0, result.err
    assert torch.equal(video.latents, load_file(tmp_path / f"{PROMPT}-0.safetensors")["latents"])
    video.save(tmp_path / "saved.mp4")
    assert (tmp_path / "saved.mp4").read_bytes() == (tmp_path / f"{PROMPT}-0.mp4").read_bytes()
    last = result.out.splitlines()[-1]
    assert re.fullmatch(rf"wrote 1 video to {tmp_path} in [\d.]+ s: [\d.]+ pixel frames/s", last)


def test_inference_reproduces_a_saved_video_from_its_metadata(tmp_path, pipe, command, video):
    start = video.save(tmp_path / "start.mp4", save_latents=True).with_suffix(".safetensors")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["start.json", "start.mp4", "start.safetensors"]
    longer = pipe.generate(PROMPT, seed=8, sample=2, num_frames=12, video=start)
    longer.save(tmp_path / "deep/longer.mp4", save_latents=True)
    assert torch.equal(longer.latents[:9], video.latents)
    metadata = json.loads((tmp_path / "deep/longer.json").read_text())
    assert (metadata["sample"], metadata["latent_frames"], metadata["pixel_frames"]) == (2, 12, 45)
    words = ("--config_path", tmp_path / "deep/longer.json", "--output_folder", tmp_path / "again", "--save_latents")
    assert command(*words).code == 0
    for suffix in (".mp4", ".safetensors"):
        again = tmp_path / f"again/{PROMPT}-2{suffix}"
        assert again.read_bytes() == (tmp_path / f"deep/longer{suffix}").read_bytes()


def test_saved_frames_are_those_in_memory(tmp_path, video):
    assert video.frames.shape == (33, 32, 32, 3) and video.frames.dtype == np.uint8
    with VideoWriter(tmp_path / "frames.mp4", fps=video.fps, crf=10) as writer:
        writer.write(video.frames)
    assert video.save(tmp_path / "x.mp4").read_bytes() == (tmp_path / "frames.mp4").read_bytes()
    assert "data:image/webp;base64," in video._repr_html_()


def test_a_saved_video_has_the_quality_of_its_configuration(tmp_path, video):
    metadata = copy.deepcopy(video.metadata)
    metadata["config"]["video"]["crf"] = 40
    coarse = Video(video.latents, video._vae, video.fps, metadata)
    assert 2 * coarse.save(tmp_path / "x.mp4").stat().st_size < video.save(tmp_path / "y.mp4").stat().st_size


# ---- Streaming ----


def test_streamed_frames_are_those_of_generate(pipe, video):
    assert np.array_equal(np.concatenate(list(pipe.stream(PROMPT))), video.frames)


def test_a_stream_yields_the_first_block_before_the_last_one_starts(pipe, monkeypatch):
    started: list[int] = []
    generate_blocks = TextToVideo.generate_blocks

    def recording(self, prompts, samples, prefix=None, on_op=None, decoder=None, track=()) -> Iterator[torch.Tensor]:
        return generate_blocks(self, prompts, samples, prefix, lambda op: started.append(op.block), decoder, track)

    monkeypatch.setattr(TextToVideo, "generate_blocks", recording)
    first = next(pipe.stream(PROMPT, num_frames=45))
    assert first.shape == (9, 32, 32, 3) and max(started) < 5  # of 15 blocks


# ---- Configuration ----


def test_settings_of_a_call_change_only_that_call(pipe, video):
    other = pipe.generate(PROMPT, seed=4, num_frames=3)
    assert other.latents.shape[0] == 3 and not torch.equal(other.latents, video.latents[:3])
    assert pipe.config.runtime.seed == 3 and pipe.config.video.num_output_frames == 9


def test_a_config_object_and_overrides_are_accepted(world):
    config = load_config(str(world.config))
    pipe = TextToVideo.load(config, "rollout.schedule=block_first", seed=5, device=torch.device("cpu"))
    assert (pipe.config.rollout.schedule, pipe.config.runtime.seed) == ("block_first", 5)
    assert config.rollout.schedule == "timestep_first" and config.runtime.seed == 7


def test_relative_paths_are_looked_up_here_then_in_the_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_file("configs/shapes.yaml") == str(ROOT / "configs/shapes.yaml")
    assert find_file("configs/none.yaml") == "configs/none.yaml" and find_file("") == ""
    Path("configs").mkdir()
    Path("configs/shapes.yaml").touch()
    assert find_file("configs/shapes.yaml") == "configs/shapes.yaml"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda pipe: pipe.generate(" "), "the prompt is empty"),
        (lambda pipe: pipe.generate(PROMPT, num_frames=10), "nearest valid --num_output_frames: 9 or 12"),
        (lambda pipe: pipe.generate(PROMPT, num_frames=0), "must be positive"),
        (lambda pipe: pipe.generate(PROMPT, image="none.png"), "none.png: there is no such file"),
        (lambda pipe: pipe.generate(PROMPT, image="a.png", video="b.mp4"), "image or video, not both"),
        (lambda pipe: TextToVideo.load("none.yaml"), "no config file none.yaml"),
        (lambda pipe: TextToVideo.load(pipe.config, "rollout.order=random"), "rollout.order"),
    ],
)
def test_mistakes_are_user_errors(pipe, call, message):
    with pytest.raises(UserError, match=message):
        call(pipe)


def test_other_suffixes_than_mp4_are_errors(video, tmp_path):
    with pytest.raises(UserError, match="name a file that ends in"):
        video.save(tmp_path / "x.avi")


# ---- The documentation ----


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> Path:
    """Run in a folder that is not the repository."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_examples_of_the_page_run(elsewhere, monkeypatch):
    names: dict = {}
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "docs/api.md").read_text(), flags=re.DOTALL)
    assert len(examples) == 11
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(elsewhere / "cache"))
    monkeypatch.syspath_prepend(elsewhere / "cache")
    for example in examples:
        exec(example, names)
    assert names["short"].frames.shape[2] == 9
    names_of_files = {file.name for file in elsewhere.iterdir()}
    assert {"circle.mp4", "circle.json", "live.mp4", "live.json"} <= names_of_files


def test_the_notebook_runs_and_stores_no_outputs(elsewhere):
    notebook = json.loads((ROOT / "docs/quickstart.ipynb").read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] for cell in cells)
    names: dict = {}
    for cell in cells:
        exec("".join(cell["source"]), names)
    assert (elsewhere / "quickstart.mp4").exists()


def test_an_installation_has_all_packages():
    """pyproject.toml lists all packages of the repository, so `pip install -e .` installs them."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]
    packages = {file.parent.relative_to(ROOT).parts[0] for file in ROOT.glob("[!.]*/**/__init__.py")}
    assert {name.removesuffix("*") for name in settings["include"]} == packages - {"scripts", "tests"}


def test_the_package_and_the_schedule_load_no_torch():
    check = "import sys, pipeline, pipeline.schedule; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT).returncode == 0
