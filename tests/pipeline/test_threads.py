"""runtime.threads: one number of CPU threads for plain python and torchrun, stored in the metadata."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_model import ROOT, write_config

from utils.config_loading import load_config
from utils.errors import UserError

CIRCLE = "a red circle-0"


@pytest.fixture
def two_threads():
    """torch's default of a machine with two cores; torchrun and the other tests use one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_a_run_with_one_thread_gives_the_bits_of_torchrun(tmp_path, infer, reference, two_threads):
    """`reference` was made with one thread, as each rank of torchrun has."""
    infer(tmp_path, "--prompt", "a red circle", "runtime.threads=1")
    assert torch.get_num_threads() == 1
    for suffix in ("mp4", "safetensors"):
        name = f"{CIRCLE}.{suffix}"
        assert (tmp_path / name).read_bytes() == (reference / name).read_bytes()
    metadata = json.loads((tmp_path / f"{CIRCLE}.json").read_text())
    assert metadata["threads"] == 1 and metadata["config"]["runtime"]["threads"] == 1


def assert_same_files(folder: Path, reference: Path) -> None:
    names = sorted(file.name for file in reference.iterdir() if file.suffix in (".mp4", ".safetensors"))
    assert len(names) == 6
    for name in names:
        assert (folder / name).read_bytes() == (reference / name).read_bytes(), name


@pytest.mark.slow
def test_torchrun_writes_the_bits_of_python_with_one_thread(tmp_path, world, infer, reference, two_threads):
    """A real start of torchrun: it sets the number of threads of its ranks."""
    words = ["--config_path", world.config, "--data_path", world.prompts, "--output_folder", tmp_path / "torchrun"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "inference.py"]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [*launcher, *map(str, words), "--save_latents"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    infer(tmp_path / "python", "runtime.threads=1")
    assert_same_files(tmp_path / "torchrun", tmp_path / "python")
    assert_same_files(tmp_path / "torchrun", reference)
    assert {json.loads(file.read_text())["threads"] for file in (tmp_path / "torchrun").glob("*.json")} == {1}


def test_the_metadata_holds_the_number_that_was_used(tmp_path, infer, two_threads):
    infer(tmp_path, "--prompt", "a red circle")
    file = tmp_path / f"{CIRCLE}.json"
    metadata = json.loads(file.read_text())
    assert metadata["threads"] == 2 and metadata["config"]["runtime"]["threads"] == 0
    assert load_config(str(file)).runtime.threads == 2
    assert load_config(str(file), ["runtime.threads=3"]).runtime.threads == 3
    del metadata["threads"]  # as in files of older versions
    file.write_text(json.dumps(metadata))
    assert load_config(str(file)).runtime.threads == 0


def test_another_number_of_threads_makes_no_existing_video_again(tmp_path, command, world, reference):
    words = ("--config_path", world.config, "--prompt", "a red circle", "--output_folder", reference)
    result = command(*words, "runtime.threads=1")
    assert "wrote 0 videos (1 existed)" in result.out and "other settings" not in result.out


@pytest.mark.parametrize("value", [-1, 1025, 10**9, 10**30, "many", "1.5", "null", "[1]", "nan"])
def test_an_impossible_number_of_threads_is_refused(tmp_path, world, value):
    config = write_config(tmp_path / "x.yaml", world.model)
    with pytest.raises(UserError, match="threads"):
        load_config(str(config), [f"runtime.threads={value}"])
