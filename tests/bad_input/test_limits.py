"""Lack of memory, signals, limits of inputs, and profiles: each ends with one line, and at once."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch

import inference
from pipeline import generate
from scripts import pipeline_parallel_inference
from utils.errors import UserError, command, expected_failure
from utils.prompts import Prompt, unique_stems

ON_GPU = (
    "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.15 GiB of which 1.25 GiB is "
    "free. Including non-PyTorch memory, this process has 77.90 GiB memory in use."
)
ON_CPU = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 288000000000 bytes. Error code 12"  # noqa: E501


@pytest.mark.parametrize(
    ("error", "requested", "available"),
    [
        (torch.OutOfMemoryError(ON_GPU), "20.0 GiB", "1.2 GiB of 79.2 GiB on GPU 0"),
        (torch.OutOfMemoryError("CUDA error: out of memory"), "an unknown amount", "too little on the GPU"),
        (RuntimeError(ON_CPU), "268.2 GiB", "GiB of the machine's memory"),
        (MemoryError(), "an unknown amount", "GiB of the machine's memory"),
        (MemoryError("Unable to allocate 3.50 TiB for an array with shape (9, 9)"), "3584.0 GiB", "GiB of the machine"),
        (OSError(12, "Cannot allocate memory"), "an unknown amount", "GiB of the machine's memory"),
        (RuntimeError("Storage size calculation overflowed with sizes=[6000000000]"), "an unknown amount", "GiB"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_lack_of_memory_is_one_line(capsys, error, requested, available):
    @command(lowers_memory="--batch_size")
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as end:
        main()
    line = capsys.readouterr().err
    assert end.value.code == 1 and line.count("\n") == 1
    assert f"requested {requested}, available" in line and available in line and "lower it with --batch_size" in line


def test_other_runtime_errors_are_bugs():
    assert expected_failure(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None


def test_inference_that_needs_too_much_memory_names_the_options(world, tmp_path, refuse, monkeypatch):
    def allocate(*_: object) -> None:
        torch.empty(1 << 50)  # 4 PiB; no system grants it

    monkeypatch.setattr(generate, "make_videos", allocate)
    words = ("--config_path", world.config, "--prompt", "a", "--output_folder", tmp_path, "--num_output_frames", 3)
    line = refuse(inference.main, words, "out of memory: requested 4194304.0 GiB")
    assert "--batch_size, --order diagonal" in line


# ---- Signals ----


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_inference_with_one_line_and_no_partial_file(world, tmp_path, refuse, monkeypatch, number):
    decode = generate.VideoOutput.emit

    def stop(self, *arguments):
        decode(self, *arguments)
        os.kill(os.getpid(), number)
        time.sleep(1)

    monkeypatch.setattr(generate.VideoOutput, "emit", stop)
    words = ("--config_path", world.config, "--prompt", "a", "--output_folder", tmp_path, "--save_latents")
    refuse(inference.main, words, "interrupted; finished files are kept")
    left = [file.name for file in tmp_path.iterdir() if not file.name.endswith(".lock")]
    assert left == [] and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


# ---- Inputs without a bound ----


def test_twenty_thousand_equal_prompts_take_linear_time():
    started = time.perf_counter()
    stems = unique_stems([Prompt(index, "a", "a") for index in range(20_000)], 1)
    assert time.perf_counter() - started < 5
    assert stems[0] == ["a-0"] and stems[1] == ["a (2)-0"] and stems[-1] == ["a (20000)-0"]


def test_names_of_prompts_that_differ_in_case_stay_distinct():
    names = ["a", "A", "a (2)", "a", "A (2)", "b"]
    stems = unique_stems([Prompt(index, name, name) for index, name in enumerate(names)], 1)
    assert stems == [["a-0"], ["A (2)-0"], ["a (2) (2)-0"], ["a (3)-0"], ["A (2) (3)-0"], ["b-0"]]


def test_a_million_videos_are_too_many():
    with pytest.raises(UserError, match="more than 1,000,000 videos"):
        unique_stems([Prompt(0, "a", "a"), Prompt(1, "b", "b")], 600_000)


# ---- Profiles ----


@pytest.mark.parametrize(
    ("place", "fragment"),
    [
        ("{0}/a-0", "a file of a-0.mp4"),
        ("{0}/../out/a-0", "a file of a-0.mp4"),
        ("{0}/old", "a file of old.mp4"),
        ("{0}/old_run", "a file of old_run_rank0.mp4"),
        ("{0}/folder", "it is a folder"),
        ("{0}/file/x", "cannot write"),
        ("/proc/x/profile", "cannot write"),
    ],
)
def test_a_profile_replaces_no_file_of_a_video(world, tmp_path, refuse, monkeypatch, place, fragment):
    from pipeline.parallel import runner

    monkeypatch.setattr(runner, "_join", None)  # would fail: the check comes first
    out = tmp_path / "out"
    (out / "folder.png").mkdir(parents=True)
    for name in ("old.mp4", "old_run_rank0.mp4", "file"):
        (out / name).touch()
    words = ("--config_path", world.config, "--prompt", "a", "--output_path", out)
    profile = ("--profile", "--profile_output", place.format(out))
    refuse(pipeline_parallel_inference.main, (*words, *profile), fragment)
    assert not Path(out, "a-0.png").exists()
