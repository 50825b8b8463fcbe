"""model/compilation.py and full_window.py: compiled layers over a rolling window.

Compiled passes equal uncompiled ones. With a full window there is no graph break, there are at most three graphs per
kind of pass, and nothing is compiled again after each kind has run once.
"""

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor.runtime.cache_dir_utils import cache_dir
from wan_samples import CLOSE, PROMPT, clip

from model.causal_wan import CausalWanModel
from model.compilation import compiles, keep_compiled_code
from model.denoiser import Denoiser

WINDOW = dict(context_frames=5, block_frames=2, sink_frames=1)  # a block wraps around the end of the ring
FILLED = 3  # blocks


@pytest.fixture
def backend(monkeypatch):
    """backend(name): let torch.compile use a backend."""

    def use(name: str) -> None:
        compile = torch.compile
        monkeypatch.setattr(torch, "compile", lambda function, **options: compile(function, backend=name, **options))

    torch._dynamo.reset()
    counters.clear()
    with torch._inductor.config.patch(compile_threads=1):  # starting worker processes takes longer
        yield use
    torch._dynamo.reset()


class RollingWindow:
    """Passes over the blocks of one video, by a network that may be compiled at any time."""

    sigma = 0.5

    def __init__(self, net: CausalWanModel, **options: object):
        self.device = net.device
        self.denoiser = Denoiser(net, net.encode_text(PROMPT.to(net.device)))
        self.cache = net.new_cache(1, 4, 6, **WINDOW | options)

    def clip(self, seed: int) -> Tensor:
        return clip(2, seed=seed).transpose(1, 2).to(self.device)

    @torch.no_grad()
    def denoise(self) -> Tensor:
        start = self.cache.num_frames
        return self.denoiser.denoise(self.clip(start), self.sigma, start, self.cache)

    @torch.no_grad()
    def write(self) -> Tensor:
        start = self.cache.num_frames
        self.denoiser.write_context(self.clip(100 + start), 0.1, start, self.cache)
        return torch.stack(self.cache.read(self.cache.num_layers - 1))

    @torch.no_grad()
    def joint(self) -> Tensor:
        start = self.cache.num_frames
        written, x = self.clip(200 + start), self.clip(300 + start)
        return self.denoiser.write_then_denoise(written, 0.1, x, self.sigma, start, self.cache)

    def step(self) -> list[Tensor]:
        """Run each kind of pass once."""
        return [self.denoise(), self.write(), self.joint()]


def test_a_rolling_window_has_few_graphs_and_no_recompilation(backend, make_net):
    backend("aot_eager")
    net = make_net(num_layers=2).requires_grad_(False)
    window, reference = RollingWindow(net), RollingWindow(make_net(num_layers=2).requires_grad_(False))
    for _ in range(FILLED):
        window.write(), reference.write()
    net.compile_layers(fall_back=False)
    graphs = counters["stats"]
    for name in ("denoise", "write", "joint"):
        before = graphs["unique_graphs"]
        torch.testing.assert_close(getattr(window, name)(), getattr(reference, name)(), **CLOSE)
        assert graphs["unique_graphs"] <= before + 3
    total = graphs["unique_graphs"]
    for _ in range(3):
        for result, expected in zip(window.step(), reference.step(), strict=True):
            torch.testing.assert_close(result, expected, **CLOSE)
    assert graphs["unique_graphs"] == total >= 3 and not counters["graph_break"]


@pytest.mark.slow
def test_inductor_computes_the_same(backend, make_net):
    backend("inductor")
    net = make_net(num_layers=2).requires_grad_(False)
    window, reference = RollingWindow(net), RollingWindow(make_net(num_layers=2).requires_grad_(False))
    net.compile_layers(fall_back=False)
    for _ in range(FILLED + 3):  # the first blocks fill the window
        for result, expected in zip(window.step()[:2], reference.step()[:2], strict=True):
            torch.testing.assert_close(result, expected, **CLOSE)
    assert not counters["graph_break"]


def test_windows_that_are_not_one_view_run_in_parts(backend, make_net):
    backend("eager")
    net = make_net(num_layers=1).requires_grad_(False)
    window, reference = (RollingWindow(net, moving_sink=True) for _ in range(2))
    for _ in range(FILLED):
        window.write(), reference.write()
    expected = reference.step()
    net.compile_layers(fall_back=False)
    for result, other in zip(window.step(), expected, strict=True):
        torch.testing.assert_close(result, other, **CLOSE)


@pytest.mark.parametrize("options", [{}, {"moving_sink": True}, {"history_frames": 2}, {"dtype": torch.int8}])
def test_which_windows_are_full(make_net, options):
    window = RollingWindow(make_net(num_layers=1), **options)
    found = []
    for _ in range(FILLED + 1):
        found.append(window.cache.is_full_window())
        window.write()
    assert found == [False, False, False, not options]
    window.cache.forget(2)
    assert not window.cache.is_full_window()


def test_auto_compiles_on_cuda_only():
    choices = [(setting, device) for setting in ("auto", "on", "off") for device in ("cuda", "cpu")]
    chosen = [choice for choice in choices if compiles(choice[0], torch.device(choice[1]))]
    assert chosen == [("auto", "cuda"), ("on", "cuda"), ("on", "cpu")]


def test_compiled_code_is_kept_in_one_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # restored after the test
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    assert keep_compiled_code() == tmp_path / "hiar" / "inductor"
    assert cache_dir() == str(tmp_path / "hiar" / "inductor") and torch._inductor.config.fx_graph_cache
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "own"))
    assert keep_compiled_code() == tmp_path / "own"
