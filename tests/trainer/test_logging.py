"""trainer/logging.py and banner.py: metrics in a file and in W&B, and the text before and after training."""

import json
from pathlib import Path

import numpy as np
import pytest

from trainer.banner import next_command, training_banner
from trainer.trainer import Trainer
from utils.errors import UserError
from utils.video import VideoWriter


def test_a_line_holds_the_means_since_the_last_one(tmp_path, toy, make_config):
    Trainer(make_config(log_every=4), toy(), str(tmp_path)).train()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [4, 6]
    assert [line["twice"] for line in lines] == [2 * (0 + 1 + 2 + 3) / 4, 2 * (4 + 5) / 2]
    assert {"loss", "grad_norm", "rate_scale"} <= lines[0].keys()


# ---- Before and after training ----


def test_training_prints_a_banner_and_the_next_command(tmp_path, toy, make_config, capsys):
    config = make_config(objective="flow_matching", total_batch_size=6, max_iterations=2)
    Trainer(config, toy(), str(tmp_path)).train()
    lines = capsys.readouterr().out.splitlines()
    assert lines[:5] == [
        "objective   flow_matching, iterations 0 to 2",
        "parameters  net 0.00M",
        "data        rendered during training",
        "batch       6 clips: world size 1, 3 x 2 clips per rank",
        f"log folder  {tmp_path}",
    ]
    assert lines[-2] == f"last checkpoint: {tmp_path}/checkpoints/00000002"
    assert lines[-1].startswith(f"next: python scripts/export_generator.py --logdir {tmp_path} --output ckpts/")


def test_the_banner_announces_compilation(tmp_path, toy, make_config):
    assert "compiling" in training_banner(make_config(compile=True), toy(), tmp_path, 0).splitlines()[-1]
    assert "compiling" not in training_banner(make_config(compile=True), toy(), tmp_path, 6)
    assert "compiling" not in training_banner(make_config(), toy(), tmp_path, 0)


@pytest.mark.parametrize(
    ("changes", "command"),
    [
        (
            dict(objective="score_distillation"),
            "python scripts/export_generator.py --logdir runs/a --output",
        ),
        (dict(objective="score_distillation", output="out"), "python inference.py --config_path runs/a/config.yaml"),
        (dict(objective="flow_matching", output="out"), "python scripts/sample_teacher.py"),
        (dict(objective="flow_matching", output="out", forcing="teacher"), "python inference.py"),
        (dict(objective="score_distillation", save=False), None),
        (dict(objective="vae_reconstruction", output="out"), None),
    ],
)
def test_the_next_command_fits_the_objective(make_config, changes, command):
    suggestion = next_command(make_config(**changes), Path("runs/a"))
    assert suggestion.startswith(command) if command else suggestion == ""


# ---- W&B ----


@pytest.fixture
def wandb(monkeypatch):
    """The wandb module, which must not leave this machine."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    return pytest.importorskip("wandb")


def test_wandb_offline_holds_every_metric_and_sample(tmp_path, toy, make_config, monkeypatch, wandb):
    logged = []
    start = wandb.init

    def init(**arguments):
        run = start(**arguments)
        log = run.log
        monkeypatch.setattr(run, "log", lambda metrics, step: (logged.append((step, metrics)), log(metrics, step=step)))
        return run

    monkeypatch.setattr(wandb, "init", init)
    config = make_config(wandb="offline", wandb_dir=str(tmp_path / "elsewhere"), sample_every=4)
    objective = toy()

    def sample(folder: Path) -> None:
        folder.mkdir(parents=True)
        with VideoWriter(folder / "a red circle-0.mp4") as video:
            video.write(np.zeros((5, 32, 32, 3), np.uint8))

    objective.sample = sample
    Trainer(config, objective, str(tmp_path / "run")).train()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    metrics = [{"iteration": step, **values} for step, values in logged if "loss" in values]
    assert metrics == lines and len(lines) == 6
    samples = [(step, list(values)) for step, values in logged if "loss" not in values]
    assert samples == [(4, ["samples/a red circle-0"])]
    [run] = (tmp_path / "elsewhere").glob("wandb/offline-run-*")
    [video] = run.glob("files/media/videos/samples/*.mp4")
    assert video.read_bytes() == (tmp_path / "run/samples/00000004/a red circle-0.mp4").read_bytes()
    assert next(run.glob("run-*.wandb")).stat().st_size > 0


def test_a_resumed_run_continues_its_wandb_run(tmp_path, toy, make_config, monkeypatch, wandb):
    """A W&B error at the start is reported in one line."""
    requested = []

    def init(**arguments):
        requested.append((arguments["id"], arguments["resume"]))
        raise wandb.Error("no network")

    monkeypatch.setattr(wandb, "init", init)
    for name in ("one", "one", "other"):
        with pytest.raises(UserError, match=r"W&B cannot start \(no network\); train.wandb=offline"):
            Trainer(make_config(wandb="online"), toy(), str(tmp_path / name)).train()
    assert requested[0] == requested[1] != requested[2] and requested[0][1] == "allow"
