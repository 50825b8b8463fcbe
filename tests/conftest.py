"""Fixtures of all tests: one thread, no internet, a tiny causal network.

With one thread, results can be compared bit by bit. Hypothesis draws the same examples in every run, so that a test
either always fails or never.
"""

import os
import signal
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # for subprocesses, and for threads that tests start
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

from model.causal_wan import CausalWanModel
from model.conditioning import TextContext

torch.set_num_threads(1)
# Some tests send Ctrl-C. A background job may ignore it, and its children would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


def _loopback_only(event: str, arguments: tuple) -> None:
    """Refuse connections to other machines: tests need only 127.0.0.1."""
    if event == "socket.connect" and isinstance(arguments[1], tuple):
        host = str(arguments[1][0])
        if not (host.startswith("127.") or host in ("::1", "localhost")):
            raise OSError(f"a test tried to reach {host}: tests run without a network")


sys.addaudithook(_loopback_only)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked `gpu` without a GPU. GPU_TESTS_ON_CPU=1 runs them on the CPU, to try them."""
    if not torch.cuda.is_available() and not os.environ.get("GPU_TESTS_ON_CPU"):
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


settings.register_profile(
    "tests", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("tests")

TINY: dict[str, Any] = dict(
    num_attention_heads=2,
    attention_head_dim=16,
    ffn_dim=64,
    num_layers=3,
    text_dim=24,
    freq_dim=32,
    in_channels=4,
    out_channels=4,
)


@pytest.fixture(scope="session")
def make_net() -> Callable[..., CausalWanModel]:
    """make_net(seed=0, **changes to TINY) returns a network in evaluation mode; every parameter has an effect."""

    def make(seed: int = 0, **changes: Any) -> CausalWanModel:
        net = CausalWanModel(**TINY | changes)
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in net.named_parameters():
            # Matrices keep the scale of activations; norms lie around one, all else around zero.
            fan_in = parameter[0].numel() if parameter.ndim > 1 and "table" not in name else 4
            center = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            torch.nn.init.normal_(parameter, center, fan_in**-0.5, generator=generator)
        return net.eval()

    return make


@pytest.fixture(scope="session")
def net(make_net) -> CausalWanModel:
    """The tiny network that tests share; no test changes it."""
    return make_net().requires_grad_(False)


@pytest.fixture(scope="session")
def text(net) -> TextContext:
    """Cross-attention keys and values of one prompt for the tiny network."""
    return net.encode_text(torch.randn(1, 5, TINY["text_dim"], generator=torch.Generator().manual_seed(1)))


@pytest.fixture
def call(monkeypatch, capsys):
    """call(module, word, ...) runs a script's main with these arguments and returns (exit code, stdout, stderr)."""

    def run(module, *words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, words)])
        code = 0
        try:
            module.main()
        except SystemExit as end:
            code = int(end.code or 0)
        return code, *capsys.readouterr()

    return run
