"""model/attention.py: block-causal and cached attention compute the same function, and only writes change a cache.

Claims: law 4 (block by block through a cache equals one block-causal pass, and that equals attention under an explicit
mask); law 3 (a Denoise does not change its cache); writes without the head; two blocks in one pass; attention backends.
Laws: docs/method.md.
"""

import copy
import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import attention_backend
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from wan_samples import CLOSE, clip, filled_cache, per_frame

from model import causal_wan
from model.attention import BlockCausalMask

# ---- law 4: blocks through a cache ----


@st.composite
def masks(draw) -> BlockCausalMask:
    blocks = tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=5)))
    context = draw(st.none() | st.integers(0, sum(blocks)))
    return BlockCausalMask(blocks, context, draw(st.integers(0, min(2, sum(blocks) if context is None else context))))


def frame_mask(causal: BlockCausalMask) -> Tensor:
    """Return the mask by its definition, one pair of frames at a time: booleans [F, F], query by key."""
    block_of = [b for b, frames in enumerate(causal.blocks) for _ in range(frames)]
    starts = [0, *itertools.accumulate(causal.blocks)]
    mask = torch.zeros(len(block_of), len(block_of), dtype=torch.bool)
    for query, key in itertools.product(range(len(block_of)), repeat=2):
        start = starts[block_of[query]]
        if block_of[query] == block_of[key]:
            mask[query, key] = True
        elif key < start:
            ring = start if causal.context_frames is None else causal.context_frames - causal.sink_frames
            mask[query, key] = key < causal.sink_frames or key >= start - ring
    return mask


@settings(max_examples=20)
@given(masks())
def test_visible_ranges_equal_the_mask(causal):
    mask = frame_mask(causal)
    for start, end, ranges in causal.visible():
        frames = [frame for a, b in ranges for frame in range(a, b)]
        assert len(set(frames)) == len(frames)
        for query in range(start, end):
            assert mask[query].nonzero().flatten().tolist() == sorted(frames)


def blocks_of(causal: BlockCausalMask):
    """Yield (first frame, slice of frames) of every block."""
    start = 0
    for length in causal.blocks:
        yield start, slice(start, start + length)
        start += length


def cache_for(net, causal: BlockCausalMask):
    """Return an empty cache with the same context as the mask."""
    frames = sum(causal.blocks)
    context = frames if causal.context_frames is None else causal.context_frames
    return net.new_cache(1, 2, 4, context, 3, causal.sink_frames)


@settings(max_examples=6)
@given(masks())
def test_blocks_through_a_cache_equal_one_block_causal_pass(net, text, causal):
    frames = sum(causal.blocks)
    x, timesteps = clip(frames, 2, 4), torch.linspace(900, 100, frames)[None]
    expected = net(x, timesteps, text, causal=causal)
    cache = cache_for(net, causal)
    for start, span in blocks_of(causal):
        block = x[:, :, span], timesteps[:, span], text, cache, start
        torch.testing.assert_close(net.denoise_block(*block), expected[:, :, span], **CLOSE)
        net.write_block(*block)


@settings(max_examples=6)
@given(masks())
def test_teacher_forcing_equals_noisy_blocks_next_to_a_cache_of_clean_ones(net, text, causal):
    frames = sum(causal.blocks)
    clean, noisy = clip(frames, 2, 4), clip(frames, 2, 4).flip(2)
    timesteps = torch.linspace(900, 100, frames)[None]
    both = torch.cat([clean, noisy], dim=2), torch.cat([torch.zeros_like(timesteps), timesteps], dim=1)
    expected = net(*both, text, causal=dataclasses.replace(causal, teacher_forcing=True))[:, :, frames:]
    cache = cache_for(net, causal)
    for start, span in blocks_of(causal):
        actual = net.denoise_block(noisy[:, :, span], timesteps[:, span], text, cache, start)
        torch.testing.assert_close(actual, expected[:, :, span], **CLOSE)
        net.write_block(clean[:, :, span], torch.zeros(1, span.stop - span.start), text, cache, start)


@settings(max_examples=5)
@given(masks())
def test_a_block_causal_pass_equals_attention_under_an_explicit_mask(net, text, causal):
    frames = sum(causal.blocks)
    x, timesteps = clip(frames, 2, 4), torch.linspace(900, 100, frames)[None]
    actual = net(x, timesteps, text, causal=causal)
    mask = frame_mask(causal).repeat_interleave(2, 0).repeat_interleave(2, 1)  # two tokens per frame

    def masked(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(causal_wan, "FullAttention", lambda backend: masked)
        torch.testing.assert_close(actual, net(x, timesteps, text), **CLOSE)


def test_a_block_attends_to_the_past_and_not_to_the_future(net, text):
    x, timesteps, causal = clip(6), per_frame(500.0, 6), BlockCausalMask((2, 2, 2))
    before = net(x, timesteps, text, causal=causal)
    later = x.clone()
    later[:, :, 4:] += 1
    assert torch.equal(net(later, timesteps, text, causal=causal)[:, :, :4], before[:, :, :4])
    earlier = x.clone()
    earlier[:, :, :2] += 1
    assert not torch.allclose(net(earlier, timesteps, text, causal=causal)[:, :, 4:], before[:, :, 4:], atol=1e-3)


# ---- law 3: only writes change a cache ----


def contents(cache) -> list[Tensor]:
    return [x.clone() for layer in range(cache.num_layers) for x in cache.read(layer)]


def assert_equal(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("frames", [0, 2, 4, 6])
def test_a_denoise_leaves_its_cache_unchanged(net, text, frames):
    cache = filled_cache(net, text, frames)
    before = contents(cache)
    with torch.no_grad():
        first, second = (net.denoise_block(clip(2), per_frame(700.0), text, cache, frames) for _ in range(2))
    assert torch.equal(first, second)
    assert cache.num_frames == frames
    assert_equal(contents(cache), before)


def test_a_write_stores_the_same_with_and_without_a_prediction(net, text):
    caches = [filled_cache(net, text) for _ in range(2)]
    block = clip(2), per_frame(500.0), text
    with torch.no_grad():
        plain = net.denoise_block(*block, caches[0], 4)
        assert torch.equal(net.denoise_block(*block, caches[0], 4, append=True), plain)
        assert net.write_block(*block, caches[1], 4) is None
    assert_equal(*map(contents, caches))
    assert caches[0].num_frames == caches[1].num_frames == 6


@pytest.mark.parametrize("frames", [0, 2, 4, 6])
def test_write_then_denoise_equals_two_passes(net, text, frames):
    """The window may be full before the write, only after it, or not even then."""
    context, x = clip(2, seed=1), clip(2, seed=2)
    caches = [filled_cache(net, text, frames) for _ in range(2)]
    with torch.no_grad():
        both = torch.cat([context, x], dim=2), torch.tensor([[300.0, 300.0, 700.0, 700.0]])
        actual = net.write_then_denoise(*both, text, caches[0], 2, frames)
        net.write_block(context, per_frame(300.0), text, caches[1], frames)
        expected = net.denoise_block(x, per_frame(700.0), text, caches[1], frames + 2)
    torch.testing.assert_close(actual, expected, **CLOSE)
    assert caches[0].num_frames == frames + 2
    for a, b in zip(contents(caches[0]), contents(caches[1]), strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


# ---- backends ----


def test_attention_backends_agree(net, text):
    other = copy.deepcopy(net)
    with attention_backend():  # restores the default backend of all other networks
        other.set_attention_backend("_native_math")
    cache = filled_cache(net, text)
    for run in (
        lambda net: net(clip(4), per_frame(500.0, 4), text),
        lambda net: net(clip(4), per_frame(500.0, 4), text, causal=BlockCausalMask((2, 2))),
        lambda net: net.denoise_block(clip(2), per_frame(500.0), text, cache, 4),
    ):
        torch.testing.assert_close(run(other), run(net), **CLOSE)
