"""utils/device.py and pipeline/parallel/profile.py: which GPU a process uses."""

import pytest
import torch

from pipeline.parallel.profile import Recorder
from utils.device import pick_device, pick_own_device
from utils.errors import UserError


@pytest.fixture
def gpus(monkeypatch):
    """gpus(count, processes on this machine): simulate GPUs; return the list of devices that are made current."""

    def pretend(count: int, processes: int) -> list[torch.device]:
        current: list[torch.device] = []

        def empty(size, device):
            if device.type == "cuda" and device.index >= count:
                raise RuntimeError("CUDA error: invalid device ordinal\nwhich may be reported late")

        monkeypatch.setattr(torch, "empty", empty)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", current.append)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        monkeypatch.setenv("LOCAL_RANK", str(processes - 1))
        return current

    return pretend


@pytest.mark.parametrize(("name", "picked"), [("cuda:1", "cuda:1"), ("cuda", "cuda:3"), ("auto", "cuda:3")])
def test_a_picked_gpu_becomes_the_current_one(gpus, name, picked):
    current = gpus(4, 4)
    assert pick_device(name) == torch.device(picked) and current == [torch.device(picked)]


def test_a_cpu_changes_no_current_gpu(gpus):
    current = gpus(1, 2)
    assert pick_device("cpu") == pick_own_device("cpu") == torch.device("cpu") and current == []


@pytest.mark.parametrize(
    ("name", "count", "processes", "message"),
    [
        ("cuda", 1, 2, "2 processes on this machine need a GPU each, but there are 1: start 1"),
        ("auto", 2, 4, "4 processes on this machine need a GPU each, but there are 2: start 2"),
        ("cuda:0", 8, 2, "--device cuda:0 is one GPU, and 2 processes on this machine need one each"),
        ("cuda:7", 2, 1, r"no device 'cuda:7' here \(CUDA error: invalid device ordinal\)"),
        ("cuda", 0, 2, "no device 'cuda:1' here"),
    ],
)
def test_more_processes_than_gpus_are_an_error(gpus, name, count, processes, message):
    current = gpus(count, processes)
    with pytest.raises(UserError, match=message):
        pick_own_device(name)
    assert current == []


def test_each_process_gets_its_own_gpu(gpus):
    gpus(4, 4)
    assert pick_own_device("cuda") == pick_own_device("auto") == torch.device("cuda:3")
    gpus(2, 1)
    assert pick_own_device("cuda:1") == torch.device("cuda:1")


def test_events_are_recorded_on_the_current_stream_of_the_profiled_device(monkeypatch):
    streams = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream=None):
            streams.append(stream)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: f"stream of {device}")
    record = Recorder(torch.device("cuda:1"))
    with record("denoise", 0):
        pass
    assert streams == ["stream of cuda:1"] * 3  # the origin, start and end
