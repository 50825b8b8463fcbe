"""pipeline/parallel/peers.py: if a rank dies, does not start or fails, all ranks exit and one line names it.

Runs that are killed spend their time waiting, so each test starts all of its runs at once.
"""

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from rank_processes import CONTEXT, run_torchrun

from utils.clips import read_video

LONG = ("--num_output_frames", "3000", "--window", "6")
RANKS = range(4)


def wait_until(condition, seconds: float = 90) -> None:
    """Wait until a function returns true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the run failed or is too slow"
        time.sleep(0.05)


def partial_files(folder: Path) -> list[Path]:
    """Return the hidden files of unfinished videos."""
    return list(folder.glob(".*.partial.mp4"))


@pytest.mark.slow
def test_a_rank_that_dies_during_a_video_is_named_and_the_frames_are_kept(start, run_ranks, tmp_path):
    runs = {rank: start(tmp_path / f"kill{rank}", 4, *LONG) for rank in RANKS}
    for rank, run in runs.items():
        wait_until(lambda run=run: any(file.stat().st_size > 5000 for file in partial_files(run.folder)))
        run.kill(rank)
    for rank, run in runs.items():
        assert run.wait(60).count(1) == 3, run.output
        assert run.output.count("error:") == 1
        assert f"error: rank {rank} (" in run.output and "has died" in run.output
        if rank < 3:  # rank 3 is the writer: its frames stay in the hidden partial file
            [video] = run.folder.glob("*.unfinished.mp4")
            assert len(read_video(video)[0]) > 10 and "the frames so far are in" in run.output
        run_ranks(run.folder, 1, "--num_output_frames", "6")  # the next run ignores leftovers
        assert not list(run.folder.glob("*.unfinished.mp4")) and not partial_files(run.folder)


@pytest.mark.slow
def test_a_rank_that_dies_at_the_start_is_named(start, tmp_path):
    runs = {rank: start(tmp_path / f"kill{rank}", 4, *LONG, startup_timeout=8.0) for rank in RANKS}
    for rank, run in runs.items():
        wait_until(run.logs[rank].exists)
        run.kill(rank)
    for rank, run in runs.items():
        assert run.wait(60).count(0) == 0
        # Rank 0 serves the store here. Without the store, the other ranks cannot find out which rank is missing.
        assert f"rank {rank} (" in run.output or (rank == 0 and "no answer from" in run.output)


@pytest.mark.slow
def test_a_rank_that_dies_at_the_end_leaves_no_incomplete_video(start, run_ranks, tmp_path):
    runs = {rank: start(tmp_path / f"kill{rank}", 4, hold=True) for rank in RANKS}
    ends = [Path(f"{run.logs[3]}.end") for run in runs.values()]
    wait_until(lambda: all(end.exists() for end in ends))
    time.sleep(1)  # the other ranks finish their work
    for rank, run in runs.items():
        run.kill(rank)
    time.sleep(1)
    for end in ends:
        end.unlink()
    for rank, run in runs.items():
        codes = run.wait(60)
        videos = list(run.folder.glob("[!.]*.mp4"))
        if rank in (1, 2):  # these had finished, so the video is completed without them
            assert codes.count(0) == 3 and len(videos) == 1, run.output
        else:
            assert codes.count(0) == 0 and "rank " in run.output
            assert not [video for video in videos if "unfinished" not in video.name]
        run_ranks(run.folder, 1)
        assert len(list(run.folder.glob("[!.]*.mp4"))) == 1 and not list(run.folder.glob(".*"))


def test_a_rank_that_does_not_start_is_named(start, tmp_path):
    runs = {rank: start(tmp_path / f"absent{rank}", 3, startup_timeout=4.0, absent=(rank,)) for rank in (0, 1)}
    for run in runs.values():
        assert 0 not in run.wait(60)
    assert "no answer from" in runs[0].output or "rank 0 (text, step 0) did not start" in runs[0].output
    assert "rank 1 (step 1) did not start within 4 s; start all 3 processes" in runs[1].output


def test_ctrl_c_ends_all_ranks(start, tmp_path):
    run = start(tmp_path / "out", 2, *LONG)
    wait_until(lambda: partial_files(run.folder))
    for process in run.processes:
        os.kill(process.pid, signal.SIGINT)
    assert run.wait(30) == [1, 1]
    assert run.output.count("error:") == 1 and "interrupted" in run.output


def test_errors_of_a_rank_are_one_line(start, tmp_path):
    """Missing weights, and GPUs that ranks would have to share."""
    weights = start(tmp_path / "weights", 2, "--checkpoint_path", tmp_path / "none.pt")
    messages = {
        "cuda": "2 processes on this machine need a GPU each, but there are 1: start 1, or use --device cpu",
        "cuda:0": "--device cuda:0 is one GPU, and 2 processes on this machine need one each: use --device cuda",
    }
    runs = {device: start(tmp_path / device, 2, "--device", device, gpus=1) for device in messages}
    assert 0 not in weights.wait(60)
    assert weights.output.count("error:") == 1 and "none.pt" in weights.output and "Traceback" not in weights.output
    for device, run in runs.items():
        assert run.wait(60) == [1, 1]
        assert run.output.splitlines() == [f"error: {messages[device]}"]


@pytest.mark.slow
def test_torchrun_names_the_dead_rank_and_leaves_no_process(inputs, tmp_path):
    words = ["--config_path", inputs / "tiny.yaml", "--prompt", "a red circle", "--output_path", tmp_path, *LONG]
    errors = tmp_path / "errors.log"
    torchrun = CONTEXT.Process(target=run_torchrun, args=(list(map(str, words)), str(errors)))
    torchrun.start()
    try:
        wait_until(lambda: partial_files(tmp_path))
        workers = subprocess.run(["pgrep", "-P", str(torchrun.pid)], capture_output=True, text=True).stdout.split()
        assert len(workers) == 2
        os.kill(int(workers[0]), signal.SIGKILL)
        torchrun.join(60)
        assert torchrun.exitcode not in (0, None)
        assert "rank 0 (text, steps 0-" in errors.read_text() and ") has died" in errors.read_text()
        for worker in workers:
            with pytest.raises(ProcessLookupError):
                os.kill(int(worker), 0)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(torchrun.pid, signal.SIGKILL)
