"""model/flops.py: what it counts from shapes is what torch's counter sees."""

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model.flops import bidirectional_flops, context_flops, denoise_flops, text_flops
from model.kv_cache import KVCache

SIZE, FRAMES, TEXT = 6, 3, 5
PER_FRAME = (SIZE // 2) ** 2


def counted(work) -> int:
    # The counter knows no CPU attention kernel; out of plain matrix products it sees all.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        work()
    return counter.get_total_flops()


def filled(net, frames: int, context: int = 9, sink: int = 0) -> KVCache:
    cache = net.new_cache(1, SIZE, SIZE, context, FRAMES, sink)
    for layer in range(len(net.layers)):
        k = torch.zeros(1, min(frames, context) * PER_FRAME, net.config.num_attention_heads, 16)
        cache.append(layer, k, k)
    cache.commit(frames)
    return cache


def run(net, text, cache, frames=FRAMES, **options):
    x = torch.randn(1, net.config.in_channels, frames, SIZE, SIZE)
    return net(x, torch.ones(1, frames), text, first_frame=cache.num_frames, cache=cache, **options)


@pytest.mark.parametrize(("written", "held"), [(0, 0), (3, 3), (6, 6), (9, 9), (30, 9)])
def test_cached_passes(net, text, written, held):
    shape = (net.config, FRAMES, PER_FRAME, held * PER_FRAME, TEXT)
    assert counted(lambda: run(net, text, filled(net, written))) == denoise_flops(*shape)
    assert counted(lambda: run(net, text, filled(net, written), write=True)) == denoise_flops(*shape)
    assert counted(lambda: run(net, text, filled(net, written), write=True, head=False)) == context_flops(*shape)
    after = min(held + FRAMES, 9) * PER_FRAME
    both = context_flops(*shape) + denoise_flops(net.config, FRAMES, PER_FRAME, after, TEXT)
    assert counted(lambda: run(net, text, filled(net, written), 2 * FRAMES, written=FRAMES)) == both


def test_other_sizes(make_net):
    net = make_net(num_layers=1, num_attention_heads=3, ffn_dim=100, out_channels=6, text_dim=7, freq_dim=64)
    embeddings = torch.randn(1, 4, 7)
    assert counted(lambda: net.encode_text(embeddings)) == text_flops(net.config, 4)
    text = net.encode_text(embeddings)
    assert counted(lambda: run(net, text, filled(net, 0), 2)) == denoise_flops(net.config, 2, PER_FRAME, 0, 4)


def test_a_pass_of_diffusers_network(net):
    plain = WanTransformer3DModel.from_config(net.config)
    x, text = torch.randn(1, 4, 7, SIZE, SIZE), torch.randn(1, TEXT, 24)
    assert counted(lambda: plain(x, torch.ones(1), text)) == bidirectional_flops(net.config, 7, PER_FRAME, TEXT)
