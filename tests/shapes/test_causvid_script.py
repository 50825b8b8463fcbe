"""scripts/causvid_shapes.sh: its commands are valid, in order, and a second run keeps finished files."""

import importlib
import os
import shlex
import subprocess
from pathlib import Path

import pytest
from commands import run_main
from tiny_model import ROOT, all_clips

SCRIPT = ROOT / "scripts/causvid_shapes.sh"


@pytest.fixture
def commands(tmp_path):
    """commands(stage, ...): run the script with a Python stub; return the argument lists of its commands."""

    def run(*stages: str, **environment: str) -> list[list[str]]:
        fake = tmp_path / "python"
        fake.write_text('#!/usr/bin/env bash\nprintf "%q " "$@"\necho\n')
        fake.chmod(0o755)
        places = {"PYTHON": str(fake), "RUNS": str(tmp_path / "runs"), "CLIPS": "2", "PAIRS": "2", "PROCESSES": "1"}
        done = subprocess.run(
            ["bash", SCRIPT, *stages], env=os.environ | places | environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return [shlex.split(line) for line in done.stdout.splitlines() if not line.startswith("==")]

    return run


def execute(command: list[str], *more: str) -> str:
    """Run one command in this process; return its output."""
    script, *words = command
    result = run_main(importlib.import_module(script.removesuffix(".py").replace("/", ".")).main, *words, *more)
    assert result.code == 0, (command, result.err)
    return result.out


def test_its_stages_lead_from_video_files_to_a_table(commands):
    scripts = [Path(script).stem for script, *_ in commands()]
    data = ["write_shapes_clips", "process_videos", "encode_clips", "create_lmdb"]
    pairs = ["write_shapes_clips", "generate_ode_pairs", "create_lmdb"]
    assert scripts == [*data, *pairs, *["train"] * 3, *["inference"] * 5, "evaluate", *["contact_sheet"] * 2]


def test_several_processes_share_the_work(commands):
    launched = [words[4] for words in commands(PROCESSES="3") if words[:2] == ["-m", "torch.distributed.run"]]
    assert {Path(script).stem for script in launched} == {
        *("process_videos", "encode_clips", "generate_ode_pairs", "train", "inference"),
    }


def test_video_files_become_an_lmdb_of_clips(commands, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for command in commands("videos", "clips"):
        execute(command)
    latents, captions = all_clips(str(tmp_path / "runs/clips_lmdb"))
    assert latents.shape == (2, 21, 16, 8, 8) and latents.std() > 0.3
    assert captions == (tmp_path / "runs/videos/captions.txt").read_text().splitlines()
    again = [Path(script).stem for script, *_ in commands("videos", "clips")]
    assert again == ["process_videos", "encode_clips"]  # these keep finished files themselves


@pytest.mark.parametrize(
    ("stage", "objective"),
    [("causal_init", "ode_regression"), ("causal", "score_distillation"), ("bidirectional", "score_distillation")],
)
def test_its_trainings_are_valid(commands, monkeypatch, stage, objective):
    monkeypatch.chdir(ROOT)
    [command] = commands(stage)
    assert f"objective: {objective}" in execute(command, "--dry-run")
