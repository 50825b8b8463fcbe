"""Several processes through train.py and torchrun: copies or shards, any number, killed or not, train the same.

Slow: every run starts Python anew.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny_model import write_config

from trainer import trainer
from trainer.checkpoints import read_tensors

ROOT = Path(trainer.__file__).parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def config(tmp_path_factory, model, pairs) -> Path:
    """Score distillation of a tiny generator, a whole batch of four clips."""
    return write_config(
        tmp_path_factory.mktemp("config") / "config.yaml",
        model,
        train={
            "objective": "score_distillation",
            "init": str(model / "transformer"),
            "batch_size": 1,
            "total_batch_size": 4,
            "max_iterations": 8,
            "warmup": 2,
            "log_every": 1,
            "checkpoint_every": 2,
            "learning_rate": 1e-3,
            "ema_start": 2,
        },
        distill={"critic_learning_rate": 1e-3, "generator_every": 2, "max_rollout_frames": 9},
        data={"path": str(pairs), "num_frames": 6},
    )


def command(
    config: Path, logdir: Path, processes: int, *overrides: str, program: Path = ROOT / "train.py"
) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    words = [str(program), "--config_path", str(config), "--logdir", str(logdir), *overrides]
    return [sys.executable, *(launcher if processes > 1 else []), *words]


def run(
    config: Path, logdir: Path, processes: int, *overrides: str, program: Path = ROOT / "train.py"
) -> dict[str, torch.Tensor]:
    """Train, and return everything that the last checkpoint holds."""
    words = command(config, logdir, processes, *overrides, program=program)
    done = subprocess.run(words, cwd=ROOT, capture_output=True, timeout=240)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    return last_state(logdir)


def last_state(logdir: Path) -> dict[str, torch.Tensor]:
    return read_tensors(sorted((logdir / "checkpoints").glob("[0-9]*"))[-1], "")


@pytest.fixture(scope="module")
def reference(config, tmp_path_factory) -> tuple[Path, dict[str, torch.Tensor]]:
    """One process."""
    logdir = tmp_path_factory.mktemp("reference")
    return logdir, run(config, logdir, 1)


def assert_close(state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        # Adam divides by the size of the gradient: where that is noise, so is the step.
        torch.testing.assert_close(state[name], tensor, atol=3e-4, rtol=1e-2, msg=name)


@pytest.mark.parametrize("sharding", ["replicate", "shard", "hybrid"])
def test_two_processes_train_as_one_does(config, tmp_path, reference, sharding):
    state = run(config, tmp_path, 2, f"train.sharding={sharding}")
    assert_close(state, reference[1])
    lines = [(folder / "metrics.jsonl").read_text().splitlines() for folder in (tmp_path, reference[0])]
    assert len(lines[0]) == len(lines[1]) == 8
    for one, other in zip(*(map(json.loads, part) for part in lines), strict=True):
        assert one == pytest.approx(other, rel=2e-2, abs=1e-4)


def test_a_batch_is_the_same_in_larger_parts(config, tmp_path, reference):
    assert_close(run(config, tmp_path, 2, "train.batch_size=2"), reference[1])


FAILING = """
import os, sys
sys.path.insert(0, os.getcwd())
import train
from pipeline.text_to_video import TextToVideo

generate = TextToVideo.generate

def fail_once(*words):
    TextToVideo.generate = generate
    raise RuntimeError("out of memory")

if os.environ["RANK"] == "1":
    TextToVideo.generate = fail_once
train.main()
"""


def test_a_sample_video_that_fails_on_one_process_stops_neither(config, tmp_path, reference):
    """Be it in the net's passes, which of a sharded net are a common work, or with the file."""
    prompts, program = tmp_path / "prompts.txt", tmp_path / "train_and_fail.py"
    prompts.write_text("a red circle\na blue square\na green triangle\na red square\n")  # two each
    program.write_text(FAILING)
    in_the_way = tmp_path / "log/samples/00000004/a red square-0.mp4/file"
    in_the_way.parent.mkdir(parents=True)
    in_the_way.touch()
    sampling = ("train.sharding=shard", "train.sample_every=4", f"train.sample_prompts={prompts}")
    assert_close(run(config, tmp_path / "log", 2, *sampling, program=program), reference[1])
    names = {
        folder.name: sorted(path.stem for path in folder.glob("*.mp4") if path.is_file())
        for folder in (tmp_path / "log/samples").iterdir()
    }
    written = ["a green triangle-0", "a red circle-0"]
    assert names == {"00000004": written, "00000008": sorted([*written, "a blue square-0", "a red square-0"])}


@pytest.mark.parametrize(("before", "after"), [("shard", "replicate"), ("replicate", "shard")])
def test_a_run_goes_on_with_another_number_of_processes(config, tmp_path, reference, before, after):
    run(config, tmp_path, 2, f"train.sharding={before}", "train.max_iterations=4", "train.decay=constant")
    one = run(config, tmp_path, 1, f"train.sharding={after}", "train.decay=constant")
    whole = run(config, tmp_path / "whole", 1, "train.decay=constant")
    assert_close(one, whole)


def test_killed_five_times_it_ends_with_the_same_bits(config, tmp_path):
    """SIGKILL at random moments to all of a run of two processes, once while it starts; the same command goes on."""
    overrides = ("train.sharding=shard", "train.max_iterations=16")
    expected = run(config, tmp_path / "whole", 2, *overrides)
    random_moments = random.Random(5)
    killed = 0
    logdir = tmp_path / "killed"
    for number in range(5):
        start = len(lines_of(logdir))
        process = subprocess.Popen(
            command(config, logdir, 2, *overrides), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        deadline = time.monotonic() + 120
        wanted = start + (0 if number == 2 else 2)
        while len(lines_of(logdir)) < wanted and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(random_moments.uniform(2, 10) if number == 2 else random_moments.uniform(0, 0.4))
        if process.poll() is None:
            killed += 1
        kill_all(process)
        process.wait()
    assert killed >= 4  # a short run may be over before the last one
    final = run(config, logdir, 2, *overrides)
    assert final.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(final[name], expected[name])] == []
    assert (logdir / "metrics.jsonl").read_text() == (tmp_path / "whole/metrics.jsonl").read_text()


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_all_processes_stop_at_the_same_iteration(config, tmp_path, sent):
    """Told so by Ctrl-C or a cluster, between checkpoints; what was done is kept and the same command goes on."""
    overrides = ("train.max_iterations=14", "train.checkpoint_every=1000")
    expected = run(config, tmp_path / "whole", 2, *overrides)
    logdir = tmp_path / "stopped"
    process = subprocess.Popen(
        command(config, logdir, 2, *overrides), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while len(lines_of(logdir)) < 3 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(sent)
        _, err = process.communicate(timeout=90)
    finally:
        kill_all(process)
    assert process.returncode != 0 and b"stopping after this iteration" in err and b"SIGKILL" not in err
    done = len(lines_of(logdir))
    assert [path.name for path in (logdir / "checkpoints").iterdir()] == [f"{done:08d}"] and 3 <= done < 14
    final = run(config, logdir, 2, *overrides)
    assert [name for name in expected if not torch.equal(final[name], expected[name])] == []


def kill_all(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to the launcher and all its workers, as far as there are any left."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def lines_of(logdir: Path) -> list[str]:
    file = logdir / "metrics.jsonl"
    return file.read_text().splitlines() if file.exists() else []


def test_one_that_dies_takes_the_others_along(config, tmp_path):
    """A process that fails is named, and nobody hangs."""
    process = subprocess.Popen(
        command(config, tmp_path, 2, "train.max_iterations=100000"), cwd=ROOT, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while len(lines_of(tmp_path)) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        workers = subprocess.run(
            ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True
        ).stdout.split()
        os.kill(int(workers[-1]), signal.SIGKILL)
        _, err = process.communicate(timeout=90)
        assert process.returncode != 0 and b"Signal 9 (SIGKILL)" in err
    finally:
        kill_all(process)
