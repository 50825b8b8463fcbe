"""Shared by all tests: one thread and no network, so that bits can be compared; and a tiny causal net.

Hypothesis draws the same examples in every run: a test fails today or it does not.
"""

import os
import signal
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # of subprocesses, and of threads that tests start
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

from model.causal_wan import CausalWanModel, TextContext

torch.set_num_threads(1)
# A job in the background may ignore Ctrl-C, and its children would too; some tests press it.
signal.signal(signal.SIGINT, signal.default_int_handler)


def _loopback_only(event: str, arguments: tuple) -> None:
    """Fail whatever would leave this machine: no test needs more than 127.0.0.1."""
    if event == "socket.connect" and isinstance(arguments[1], tuple):
        host = str(arguments[1][0])
        if not (host.startswith("127.") or host in ("::1", "localhost")):
            raise OSError(f"a test tried to reach {host}: tests run without a network")


sys.addaudithook(_loopback_only)
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
    """make_net(seed=0, **changes to TINY): a net in which every parameter matters, in evaluation mode."""

    def make(seed: int = 0, **changes: Any) -> CausalWanModel:
        net = CausalWanModel(**TINY | changes)
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in net.named_parameters():
            # Matrices keep the size of what passes through; norms lie around one, everything else around zero.
            fan_in = parameter[0].numel() if parameter.ndim > 1 and "table" not in name else 4
            center = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            torch.nn.init.normal_(parameter, center, fan_in**-0.5, generator=generator)
        return net.eval()

    return make


@pytest.fixture(scope="session")
def net(make_net) -> CausalWanModel:
    """The tiny net that tests share: nobody changes it."""
    return make_net().requires_grad_(False)


@pytest.fixture(scope="session")
def text(net) -> TextContext:
    """One prompt, as the tiny net's cross-attention sees it."""
    return net.encode_text(torch.randn(1, 5, TINY["text_dim"], generator=torch.Generator().manual_seed(1)))


@pytest.fixture
def call(monkeypatch, capsys):
    """call(module, word, ...): run a script's main with these words; returns (exit code, stdout, stderr)."""

    def run(module, *words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, words)])
        code = 0
        try:
            module.main()
        except SystemExit as end:
            code = int(end.code or 0)
        return code, *capsys.readouterr()

    return run
