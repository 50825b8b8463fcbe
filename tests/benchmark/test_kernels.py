"""Counts of kernels on fake CUDA tensors: the counter is right, and the real code keeps its limits at full size.

No pass waits for the device or mixes devices. A compiled Denoise of the 1.3B network has at most 700 kernels, and its
elementwise kernels move at most 20 GB, those of the decoder at most 80 GB a block (docs/benchmarks.md).
"""

import json

import pytest
import torch

from benchmark.cases import KERNEL_ROWS
from benchmark.fake_cuda import fake_cuda
from benchmark.full_size import count_kernels
from benchmark.inductor_kernels import inductor_counts
from benchmark.kernels import KernelCounter
from benchmark.networks import BenchmarkNetworks
from model import presets
from scripts import benchmark as script
from utils.config_loading import load_config

CPU = torch.device("cpu")


@pytest.fixture
def count(monkeypatch):
    """count(work, layers, word, ...): counts of a pass of the 1.3B network with fewer layers."""

    def count(work: str, layers: int, *words: str) -> dict[str, int]:
        config = load_config("configs/hiar.yaml", ["video.num_output_frames=42", *words])
        monkeypatch.setitem(
            presets.TRANSFORMERS, "few layers", presets.TRANSFORMERS["wan-1.3b"] | {"num_layers": layers}
        )
        return count_kernels(BenchmarkNetworks(config, CPU, "few layers"), work)

    return count


# ---- The counter ----


def test_kernels_and_their_bytes():
    with fake_cuda() as device:
        x, weight = torch.empty(8, 16, device=device), torch.empty(16, 4, device=device)
        with KernelCounter() as counter:
            y = (x.view(4, 2, 16).reshape(8, 16) @ weight).relu_()
            torch.cat([y, y])
            torch.empty(3, device=device).copy_(x[0, :1].expand(3))
            torch.ones(3) + 1  # on the CPU
    count = counter.count
    product, relu, cat, copy = 4 * (128 + 64 + 32), 4 * 2 * 32, 4 * (64 + 64), 4 * (3 + 1)
    assert (count.kernels, count.elementwise_kernels) == (4, 3) and count.flops == 2 * 8 * 16 * 4
    assert count.bytes == product + relu + cat + copy and count.elementwise_bytes == count.bytes - product
    assert counter.problems == [] and count.host_syncs == count.device_mismatches == 0


def test_host_syncs_and_mixed_devices_are_counted():
    with fake_cuda() as device:
        x = torch.empty(8, device=device)
        with KernelCounter() as counter:
            x.cpu()
            x.sum().item()
            torch.ones(8).to(device)
            torch.ones(8).to(device, non_blocking=True)
            x + torch.tensor(2.0)  # a number
            assert counter.count.device_mismatches == 0
            assert (x + torch.ones(8)).device == device
    assert counter.count.host_syncs == 3 and counter.count.device_mismatches == 1 and len(counter.problems) == 4


def test_kernels_of_compiled_code_are_those_of_inductor():
    def work(x, weight):
        return ((x.sin() + 1) @ weight).cos() * 2

    with inductor_counts() as graphs, fake_cuda() as device:
        compiled = torch.compile(work, fullgraph=True)
        x, weight = torch.empty(8, 16, device=device), torch.empty(16, 4, device=device)
        for _ in range(2):
            with KernelCounter() as counter:
                y = compiled(x, weight)
    assert len(graphs) == 1 and y.shape == (8, 4) and y.device == device
    count = counter.count
    assert (count.kernels, count.elementwise_kernels) == (3, 2) and count.flops == 2 * 8 * 16 * 4
    assert count.elementwise_bytes == 4 * 2 * (128 + 32)


# ---- The real code at full size ----


@pytest.mark.parametrize("work", KERNEL_ROWS[:3])
def test_passes_never_wait_and_never_mix_devices(count, work):
    counts = count(work, 2, "model.compile=off")
    assert counts["host_syncs"] == counts["device_mismatches"] == 0
    assert counts["kernels"] > counts["elementwise_kernels"] > 0 and counts["flops"] > 1e12


def test_a_compiled_denoise_has_few_kernels(count):
    one, two = (count("denoise", layers, "model.compile=off") for layers in (1, 2))
    compiled = count("denoise", 1, "model.compile=on")
    assert compiled["host_syncs"] == compiled["device_mismatches"] == 0

    def full_size(name: str) -> int:
        outside = 2 * one[name] - two[name]  # of the layers, where nothing is compiled
        return outside + 30 * (compiled[name] - outside)

    assert full_size("kernels") <= 700 and full_size("elementwise_bytes") <= 20e9
    assert full_size("kernels") < 0.6 * (one["kernels"] + 29 * (two["kernels"] - one["kernels"]))


def test_decoding_a_block_has_few_kernels_and_little_traffic():
    count = count_kernels(BenchmarkNetworks(load_config("configs/hiar.yaml", []), CPU, "wan-1.3b"), "decoder")
    assert count["kernels"] <= 250 and count["elementwise_bytes"] <= 80e9
    assert count["host_syncs"] == count["device_mismatches"] == 0 and count["flops"] > 3e13


def test_the_command_counts_passes_and_the_decoder(call, tmp_path):
    output = tmp_path / "kernels.json"
    words = ["--what", "kernels", "--passes", "context", "decoder", "--compile", "off", "--output", output]
    code, out, err = call(script, *words)
    assert code == 0, err
    rows = json.loads(output.read_text())["results"]
    assert [row["settings"]["work"] for row in rows] == ["context", "decoder"] and "elementwise traffic, GB" in out
    for row in rows:
        figures = row["figures"]
        assert figures["kernels"] > figures["elementwise_kernels"] > 0
        assert figures["host_syncs"] == figures["device_mismatches"] == 0
