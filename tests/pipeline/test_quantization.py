"""model/quantization.py: 8-bit layers by torchao. Tests that quantize run where torchao is installed."""

import copy
import importlib.util
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from model import quantization
from model.offload import stream_weights_
from pipeline.build import check_precision, prepare_network
from pipeline.text_to_video import TextToVideo
from utils.config import Config
from utils.errors import UserError

CPU = torch.device("cpu")
needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")


def config_of(name: str) -> Config:
    config = Config()
    config.model.quantization = name
    return config


@pytest.mark.parametrize(
    ("name", "device", "capability", "installed", "message"),
    [
        ("none", "cpu", None, False, ""),
        ("int8", "cpu", None, True, ""),
        ("int8", "cpu", None, False, "needs torchao: pip install -r requirements-quantization.txt"),
        ("fp8", "cpu", None, True, "needs an NVIDIA GPU with FP8"),
        ("fp8", "cuda", (8, 6), True, "needs an NVIDIA GPU with FP8"),
        ("fp8", "cuda", (8, 9), True, ""),
    ],
)
def test_quantizations_that_do_not_run_are_refused(monkeypatch, name, device, capability, installed, message):
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: installed or None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    if not message:
        return check_precision(config_of(name), torch.device(device))
    with pytest.raises(UserError, match=message):
        check_precision(config_of(name), torch.device(device))


def test_float8_caches_are_refused_on_apple_gpus_before_weights_are_loaded(world, monkeypatch):
    monkeypatch.setattr("pipeline.text_to_video.load_weights", None)
    with pytest.raises(UserError, match="does not run on mps; use int8"):
        options = "rollout.cache_dtype=float8_e4m3fn", "model.offload=all"
        TextToVideo.load(str(world.config), *options, device=torch.device("mps"))


def test_the_linear_layers_of_all_layers_are_quantized(net, monkeypatch, tmp_path):
    """A stand-in for torchao records the modules that it would quantize."""
    quantized = []

    def record(layer, settings, filter_fn, device):
        quantized.extend([module for module in layer.modules() if filter_fn(module, "")])

    own = copy.deepcopy(net)
    monkeypatch.setattr(quantization, "_settings", lambda name: name)
    monkeypatch.setitem(sys.modules, "torchao.quantization", SimpleNamespace(quantize_=record))
    prepare_network(own, config_of("int8"), CPU)
    assert quantized == [m for layer in own.layers for m in layer.modules() if isinstance(m, nn.Linear)]
    with pytest.raises(UserError, match="none to save it"):
        own.save_pretrained(tmp_path)


@needs_torchao
@pytest.mark.parametrize(("name", "tolerance"), [("int8", 0.02), ("int8_dynamic", 0.04)])
def test_passes_of_a_quantized_network_are_close(net, text, name, tolerance):
    own = prepare_network(copy.deepcopy(net), config_of(name), CPU)
    x, timestep = torch.randn(1, 4, 3, 4, 4), torch.full((1, 3), 500.0)
    expected, results = (_passes(n, x, timestep, text) for n in (net, own))
    for flow, exact in zip(results, expected, strict=True):
        assert 0 < (flow - exact).norm() / exact.norm() < tolerance
    linears = [m for layer in own.layers for m in layer.modules() if isinstance(m, nn.Linear)]
    assert all(linear.weight.qdata.dtype == torch.int8 for linear in linears)
    stream_weights_(own, own.layers, CPU)
    for flow, resident in zip(_passes(own, x, timestep, text), results, strict=True):
        assert torch.equal(flow, resident)


@torch.no_grad()
def _passes(net, x, timestep, text) -> list[torch.Tensor]:
    cache = net.new_cache(1, 4, 4, 6, 3)
    first = net.denoise_block(x, timestep, text, cache, append=True)
    both = torch.cat([x, x], dim=2), torch.cat([timestep, timestep], dim=1)
    return [first, net.write_then_denoise(*both, text, cache, 3, 3)]
