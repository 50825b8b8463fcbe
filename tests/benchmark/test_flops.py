"""benchmark/flops.py: the count of every pass on the meta device equals the count of a real pass."""

import pytest
import torch
from diffusers import WanTransformer3DModel

from benchmark.flops import PassFlops
from benchmark.measure import counted_flops
from model import presets

SIZE, FRAMES, TEXT, CONTEXT = 6, 3, 5, 9


@pytest.fixture(scope="module")
def count(net) -> PassFlops:
    return PassFlops(net.config, (SIZE, SIZE), FRAMES, CONTEXT, TEXT)


@pytest.mark.parametrize(("written", "held"), [(0, 0), (6, 6), (30, 9)])
def test_cached_passes(net, text, count, written, held):
    cache = net.new_cache(1, SIZE, SIZE, CONTEXT, FRAMES)
    cache.commit(written)
    cache._k.zero_(), cache._v.zero_()
    x = torch.randn(1, net.config.in_channels, FRAMES, SIZE, SIZE)
    with torch.no_grad():
        level, two_levels = net.condition(torch.ones(1)), net.condition(torch.ones(1, 2))

    def fused() -> None:
        with torch.no_grad():
            net.write_then_denoise(x.repeat(1, 1, 2, 1, 1), two_levels, text, cache, FRAMES, written)

    assert count.denoise(held) == counted_flops(lambda: net.denoise_block(x, level, text, cache, written))
    assert count.write_then_denoise(held) == counted_flops(fused)
    first = cache.num_frames
    assert count.write(min(first, CONTEXT)) == counted_flops(lambda: net.write_block(x, level, text, cache, first))


def test_a_pass_of_diffusers_network(net, count):
    plain = WanTransformer3DModel.from_config(net.config)
    x, text = torch.randn(1, 4, 7, SIZE, SIZE), torch.randn(1, TEXT, 24)
    assert counted_flops(lambda: plain(x, torch.ones(1), text)) == count.bidirectional(7)


def test_the_published_size():
    """A Denoise of Wan2.1 1.3B at 480x832: a block of 3 frames next to 18 frames of context."""
    count = PassFlops(presets.TRANSFORMERS["wan-1.3b"], (60, 104), 3, 18, 512)
    assert count.denoise(18) == 40_406_848_634_880
