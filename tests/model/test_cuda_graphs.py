"""model/cuda_graphs.py: passes over a full window run as recorded graphs. On a CPU, a stand-in records the functions.

The results equal those of direct passes, also after the text and the noise level have changed. There is one graph for
each kind of pass and each place in the ring, and none while the window fills.
"""

import pytest
import torch
from test_compilation import FILLED, RollingWindow
from torch import Tensor
from wan_samples import CLOSE, PROMPT, TEXT_DIM, randn

from model.cuda_graphs import CudaRecorder, LayerGraphs
from model.denoiser import Denoiser
from model.kv_cache import KVCache


class Replays:
    """Stand-in for `CudaRecorder`: a graph repeats a function and overwrites the first output.

    Kernels have their slots of the cache fixed, so the function sees the cache at the frame of the recording.
    """

    def __init__(self, cache: KVCache) -> None:
        self.cache = cache
        self.recorded = self.launched = 0

    def __call__(self, function):
        self.recorded += 1
        recorded_at = self.cache.num_frames
        slots = self.cache._k.clone(), self.cache._v.clone()
        output = function()
        output.fill_(torch.nan)  # while it is recorded, a CUDA graph computes nothing
        self.cache._k.copy_(slots[0]), self.cache._v.copy_(slots[1])

        def launch() -> Tensor:
            self.launched += 1
            self.cache.num_frames, now = recorded_at, self.cache.num_frames
            output.copy_(function())
            self.cache.num_frames = now
            return output

        return launch, output


@pytest.fixture
def windows(make_net):
    """A rolling window with graphs, the same without, and the recorder; both windows are full."""
    graphs, reference = (RollingWindow(make_net(num_layers=2).requires_grad_(False)) for _ in range(2))
    replays = Replays(graphs.cache)
    net = graphs.denoiser.net
    net._run_layers = LayerGraphs(net._run_layers, replays)
    for _ in range(FILLED):
        for window in (graphs, reference):
            window.step()[1]
    return graphs, reference, replays


def assert_equal_steps(windows, count: int) -> None:
    graphs, reference, _ = windows
    for _ in range(count):
        for result, expected in zip(graphs.step(), reference.step(), strict=True):
            torch.testing.assert_close(result, expected, **CLOSE)


def test_graphs_compute_the_same_over_a_rolling_window(windows):
    *_, replays = windows
    assert_equal_steps(windows, 9)
    recorded, launched = replays.recorded, replays.launched
    assert 0 < recorded < launched
    assert_equal_steps(windows, 4)
    # The ring has four places for two frames. A Denoise has one graph; a write, and a joint pass with its last layer,
    # have one per place.
    assert replays.recorded == recorded <= 1 + 4 + 2 * 4
    assert replays.launched == launched + 4 * 4


def test_a_new_text_or_noise_level_reaches_the_graphs(windows):
    graphs, reference, replays = windows
    assert_equal_steps(windows, 5)
    for sigma, prompt in ((0.7, PROMPT), (0.7, randn(1, 5, TEXT_DIM, seed=5))):
        for window in (graphs, reference):
            window.sigma, window.denoiser = (
                sigma,
                Denoiser(window.denoiser.net, window.denoiser.net.encode_text(prompt)),
            )
        before = replays.recorded
        assert_equal_steps(windows, 5)
    assert replays.recorded > before


def test_passes_while_the_window_fills_are_not_recorded(make_net):
    window = RollingWindow(make_net(num_layers=1).requires_grad_(False))
    replays = Replays(window.cache)
    net = window.denoiser.net
    net._run_layers = LayerGraphs(net._run_layers, replays)
    for _ in range(2):
        window.denoise(), window.denoise(), window.write()
    assert not window.cache.is_full_window() and replays.recorded == 0


@pytest.mark.gpu
def test_cuda_graphs_compute_the_same(make_net):
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    windows = [RollingWindow(make_net(num_layers=2).requires_grad_(False).cuda()) for _ in range(2)]
    net = windows[0].denoiser.net
    net._run_layers = LayerGraphs(net._run_layers, CudaRecorder())
    assert_equal_steps((*windows, None), 12)
