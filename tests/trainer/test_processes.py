"""Several ranks: every sharding and world size trains the same, and a killed or stopped run resumes bit for bit.

Slow: each test trains several times. Most processes are forked, see ranks.py.
"""

import contextlib
import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from ranks import Torchrun, fork_ranks
from tiny_model import write_config

from trainer.checkpoints import read_tensors

pytestmark = pytest.mark.slow
TIMEOUT = 120  # seconds for each wait


@pytest.fixture(scope="module")
def config(tmp_path_factory, model, pairs) -> Path:
    """Score distillation of a tiny generator; a batch has four clips."""
    return write_config(
        tmp_path_factory.mktemp("config") / "config.yaml",
        model,
        train={
            "objective": "score_distillation",
            "init": str(model / "transformer"),
            "batch_size": 1,
            "total_batch_size": 4,
            "max_iterations": 6,
            "warmup": 2,
            "log_every": 1,
            "checkpoint_every": 2,
            "learning_rate": 1e-3,
            "ema_start": 2,
            "decay": "constant",
        },
        distill={"critic_learning_rate": 1e-3, "generator_every": 2, "max_rollout_frames": 9},
        data={"path": str(pairs), "num_frames": 6},
    )


def words(config: Path, logdir: Path, *overrides: str) -> list[str]:
    return ["--config_path", str(config), "--logdir", str(logdir), *overrides]


def train(config: Path, logdir: Path, world_size: int, *overrides: str, setup: str = "") -> dict[str, torch.Tensor]:
    """Train to the end on forked ranks and return all tensors of the last checkpoint."""
    ranks = fork_ranks(world_size, words(config, logdir, *overrides), setup)
    for rank in ranks:
        rank.join(TIMEOUT)
    assert [rank.exitcode for rank in ranks] == [0] * world_size
    return last_state(logdir)


def last_state(logdir: Path) -> dict[str, torch.Tensor]:
    return read_tensors(sorted((logdir / "checkpoints").glob("[0-9]*"))[-1], "")


def logged_lines(logdir: Path) -> list[str]:
    file = logdir / "metrics.jsonl"
    return file.read_text().splitlines() if file.exists() else []


def wait_for_lines(logdir: Path, count: int, is_running: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while len(logged_lines(logdir)) < count and is_running() and time.monotonic() < deadline:
        time.sleep(0.01)


@contextlib.contextmanager
def torchrun(config: Path, logdir: Path, *overrides: str, fork: bool = True) -> Iterator[Torchrun]:
    """Run train.py by torchrun on two ranks. In the end, kill the launcher; its ranks end with it."""
    process = Torchrun(logdir.parent / "errors.txt", words(config, logdir, *overrides), fork)
    try:
        yield process
    finally:
        process.kill()


def is_alive(pid: int) -> bool:
    """Return whether a process runs; a zombie does not."""
    with contextlib.suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def assert_close(state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        # Adam divides by the gradient's size: where the gradient is only rounding noise, so is the step.
        torch.testing.assert_close(state[name], tensor, atol=3e-4, rtol=1e-2, msg=name)


def assert_same_bits(state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert state.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(state[name], expected[name])] == []


# ---- Any number of ranks ----


@pytest.fixture(scope="module")
def one_rank(config, tmp_path_factory) -> tuple[Path, dict[str, torch.Tensor]]:
    """Log folder and final state of a run on one rank."""
    logdir = tmp_path_factory.mktemp("one_rank")
    return logdir, train(config, logdir, 1)


@pytest.mark.parametrize("sharding", ["replicate", "shard", "hybrid"])
def test_two_ranks_train_like_one(config, tmp_path, one_rank, sharding):
    state = train(config, tmp_path, 2, f"train.sharding={sharding}")
    assert_close(state, one_rank[1])
    lines = [logged_lines(folder) for folder in (tmp_path, one_rank[0])]
    assert len(lines[0]) == len(lines[1]) == 6
    for two, one in zip(*(map(json.loads, run) for run in lines), strict=True):
        assert two == pytest.approx(one, rel=2e-2, abs=1e-4)


def test_larger_micro_batches_train_the_same(config, tmp_path, one_rank):
    assert_close(train(config, tmp_path, 2, "train.batch_size=2"), one_rank[1])


@pytest.mark.parametrize(("before", "after"), [("shard", "replicate"), ("replicate", "shard")])
def test_a_run_resumes_with_another_world_size_and_sharding(config, tmp_path, one_rank, before, after):
    train(config, tmp_path, 2, f"train.sharding={before}", "train.max_iterations=4")
    assert_close(train(config, tmp_path, 1, f"train.sharding={after}"), one_rank[1])


FAIL_ONCE_ON_RANK_1 = """
import os
from pipeline.text_to_video import TextToVideo

generate_blocks = TextToVideo.generate_blocks

def fail_once(*arguments):
    TextToVideo.generate_blocks = generate_blocks
    raise RuntimeError("out of memory")

if os.environ["RANK"] == "1":
    TextToVideo.generate_blocks = fail_once
"""


def test_a_failing_sample_video_stops_no_rank(config, tmp_path, one_rank):
    """One failure is in a forward pass, which ranks share for sharded networks. The other is in writing the file."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na blue square\na green triangle\na red square\n")  # two each
    obstacle = tmp_path / "log/samples/00000003/a red square-0.mp4/file"
    obstacle.parent.mkdir(parents=True)
    obstacle.touch()
    sampling = ("train.sharding=shard", "train.sample_every=3", f"train.sample_prompts={prompts}")
    assert_close(train(config, tmp_path / "log", 2, *sampling, setup=FAIL_ONCE_ON_RANK_1), one_rank[1])
    names = {
        folder.name: sorted(path.stem for path in folder.glob("*.mp4") if path.is_file())
        for folder in (tmp_path / "log/samples").iterdir()
    }
    written = ["a green triangle-0", "a red circle-0"]
    assert names == {"00000003": written, "00000006": sorted([*written, "a blue square-0", "a red square-0"])}


# ---- Killed and stopped runs ----

LONG = ("train.sharding=shard", "train.max_iterations=20", "train.total_batch_size=2", "distill.max_rollout_frames=6")


@pytest.fixture(scope="module")
def uninterrupted(config, tmp_path_factory) -> tuple[Path, dict[str, torch.Tensor]]:
    """Log folder and final state of a run of 20 iterations on two ranks that nothing interrupts."""
    logdir = tmp_path_factory.mktemp("uninterrupted")
    return logdir, train(config, logdir, 2, *LONG)


def test_a_run_killed_five_times_ends_with_the_same_bits(config, tmp_path, uninterrupted):
    """SIGKILL to one rank, to the launcher, and at random moments to all ranks, once while they start."""
    logdir = tmp_path / "log"
    with torchrun(config, logdir, *LONG, fork=False) as process:
        wait_for_lines(logdir, 2, process.is_running)
        os.kill(process.ranks()[-1], signal.SIGKILL)
        assert process.wait(TIMEOUT) not in (0, None)  # the other rank does not hang
        assert "Signal 9 (SIGKILL)" in process.errors.read_text()

    start = len(logged_lines(logdir))
    with torchrun(config, logdir, *LONG) as process:
        wait_for_lines(logdir, start + 2, process.is_running)
        ranks = process.ranks()
        process.kill()
        deadline = time.monotonic() + TIMEOUT
        while any(map(is_alive, ranks)) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(ranks) == 2 and not any(map(is_alive, ranks))  # ranks end with their launcher

    moments = random.Random(5)
    for number in range(3):
        start = len(logged_lines(logdir))
        forked = fork_ranks(2, words(config, logdir, *LONG))
        while_starting = number == 1
        if not while_starting:
            wait_for_lines(logdir, start + 2, forked[0].is_alive)
        time.sleep(moments.uniform(0.1, 0.6) if while_starting else moments.uniform(0, 0.2))
        assert all(rank.is_alive() for rank in forked)
        for rank in forked:
            rank.kill()
        for rank in forked:
            rank.join()

    assert_same_bits(train(config, logdir, 2, *LONG), uninterrupted[1])
    assert (logdir / "metrics.jsonl").read_text() == (uninterrupted[0] / "metrics.jsonl").read_text()


def test_a_stop_signal_ends_all_ranks_after_the_same_iteration(config, tmp_path, uninterrupted):
    """The signals are Ctrl-C and a cluster's SIGTERM, both between two checkpoints. The same command resumes."""
    logdir, done = tmp_path / "log", 0
    for stop in (signal.SIGINT, signal.SIGTERM):
        with torchrun(config, logdir, *LONG, "train.checkpoint_every=1000") as process:
            wait_for_lines(logdir, done + 3, process.is_running)
            os.kill(process.pid, stop)
            assert process.wait(TIMEOUT) not in (0, None)
        errors = process.errors.read_text()
        assert "stopping after this iteration" in errors and "SIGKILL" not in errors
        before, done = done, len(logged_lines(logdir))
        saved = sorted(path.name for path in (logdir / "checkpoints").iterdir())
        assert saved[-1] == f"{done:08d}" and len(saved) == (2 if before else 1) and before + 3 <= done < 20
    assert_same_bits(train(config, logdir, 2, *LONG), uninterrupted[1])


def test_the_error_is_the_last_thing_that_torchrun_prints(config, tmp_path):
    with torchrun(config, tmp_path / "log", "train.batch_size=3") as process:
        assert process.wait(TIMEOUT) not in (0, None)
    *_, error, rule = process.errors.read_text().splitlines()
    assert error.strip().startswith("error: train.total_batch_size=4 must be a multiple of") and set(rule) == {"="}
