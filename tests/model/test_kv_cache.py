"""model/kv_cache.py: the ring with its sink holds the same frames as a plain list.

Claims: after any appends, the cache holds the sink and the newest frames; reading with a block does not change the
context; with autograd, saved tensors never share memory with the cache; earlier contexts can be read; `reset` works.
"""

from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.kv_cache import KVCache

TOKENS, LAYERS = 2, 2


def make(context_frames: int, sink_frames: int = 0, block_frames: int = 5, history_frames: int = 0) -> KVCache:
    return KVCache(
        num_layers=LAYERS,
        batch_size=1,
        num_heads=1,
        head_dim=1,
        tokens_per_frame=TOKENS,
        context_frames=context_frames,
        block_frames=block_frames,
        sink_frames=sink_frames,
        history_frames=history_frames,
    )


def block(first_frame: int, frames: int, layer: int) -> Tensor:
    """Return keys of a block; the value of each token encodes its frame, its position in the frame, and its layer."""
    frame = torch.arange(first_frame, first_frame + frames).repeat_interleave(TOKENS)
    place = torch.arange(TOKENS).repeat(frames)
    return (100.0 * frame + 10 * place + layer).view(1, -1, 1, 1)


def append(cache: KVCache, frames: int) -> None:
    for layer in range(LAYERS):
        keys = block(cache.num_frames, frames, layer)
        cache.append(layer, keys, -keys)
    cache.commit(frames)


def tokens(x: Tensor) -> list[float]:
    return sorted(x.flatten().tolist())


def expected_tokens(frames: list[int], layer: int) -> list[float]:
    return tokens(torch.cat([block(frame, 1, layer) for frame in frames], dim=1)) if frames else []


sizes = st.integers(0, 6).flatmap(lambda context: st.tuples(st.just(context), st.integers(0, context)))


@settings(max_examples=25)
@given(sizes, st.lists(st.integers(1, 5), max_size=12))
def test_it_holds_the_sink_and_the_newest_frames(size, blocks):
    context, sink = size
    cache, frames = make(context, sink), []
    for length in blocks:
        append(cache, length)
        frames += range(len(frames), len(frames) + length)
        kept = frames if len(frames) <= context else frames[:sink] + frames[len(frames) - (context - sink) :]
        assert cache.num_frames == len(frames)  # frames ever appended
        for layer in range(LAYERS):
            k, v = cache.read(layer)
            assert tokens(k) == expected_tokens(kept, layer)
            assert torch.equal(v, -k)
            assert tokens(k[:, : sink * TOKENS]) == expected_tokens(frames[:sink], layer)


@settings(max_examples=20)
@given(sizes, st.lists(st.integers(1, 5), max_size=6), st.booleans())
def test_reading_with_a_block_keeps_the_context(size, blocks, autograd):
    cache = make(*size)
    for length in blocks:
        append(cache, length)
    before = [[x.clone() for x in cache.read(layer)] for layer in range(LAYERS)]
    own = block(cache.num_frames, 5, layer=0)
    with torch.set_grad_enabled(autograd):
        k, v = cache.read_with_block(0, own, -own)
    assert torch.equal(k, torch.cat([before[0][0], own], dim=1))
    assert torch.equal(v, -k)
    for layer in range(LAYERS):
        assert all(torch.equal(a, b) for a, b in zip(cache.read(layer), before[layer], strict=True))


def test_saved_tensors_do_not_share_memory_with_the_cache():
    cache = make(4)
    append(cache, 4)
    own = block(4, 2, layer=0).requires_grad_()
    k, _ = cache.read_with_block(0, own, own)
    loss = (k * k).sum()  # saves k for backward
    held = k.detach().clone()
    append(cache, 3)
    assert torch.equal(k, held)
    loss.backward()
    assert torch.equal(own.grad, 2 * own)


def test_without_autograd_nothing_is_copied():
    cache = make(4)
    append(cache, 3)
    own = block(3, 2, layer=0)
    with torch.no_grad():
        k, _ = cache.read_with_block(0, own, own)
    assert k.data_ptr() == cache.read(0)[0].data_ptr()


def test_appended_keys_have_no_graph():
    cache = make(4)
    keys = block(0, 2, layer=0).requires_grad_()
    cache.append(0, keys, keys)
    cache.commit(2)
    assert not cache.read(0)[0].requires_grad


def test_a_block_becomes_context_when_it_is_committed():
    cache = make(4)
    cache.append(0, *[block(0, 2, layer=0)] * 2)
    assert cache.read(0)[0].numel() == 0
    cache.commit(2)
    assert cache.read(0)[0].shape[1] == 2 * TOKENS


def test_keys_and_values_have_the_given_type_and_device():
    cache = KVCache(1, 1, 1, 4, 2, 3, 1, dtype=torch.bfloat16, device="meta")
    for x in cache.read_with_block(0, *[torch.zeros(1, 2, 1, 4, device="meta", dtype=torch.bfloat16)] * 2):
        assert x.dtype == torch.bfloat16
    cache.append(0, *[torch.zeros(1, 2, 1, 4, device="meta", dtype=torch.bfloat16)] * 2)
    cache.commit(1)
    for x in cache.read(0):
        assert (x.dtype, x.device.type) == (torch.bfloat16, "meta")


@pytest.mark.parametrize("autograd", [False, True])
@pytest.mark.parametrize("committed", [0, 1, 3, 6])
def test_uncommitted_frames_of_a_layer_count_as_context(committed, autograd):
    """A fused pass appends a block layer by layer, and the next block attends to it in the same pass."""
    cache, other = make(4, 1), make(4, 1)
    for frames in (committed, 2) if committed else (2,):
        append(other, frames)
    if committed:
        append(cache, committed)
    new = block(committed, 2, layer=0)
    cache.append(0, new, -new)
    own = block(committed + 2, 1, layer=0)
    with torch.set_grad_enabled(autograd):
        found = cache.read_with_block(0, own, -own, uncommitted=2)
        expected = other.read_with_block(0, own, -own)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_reset_empties_the_cache_and_keeps_its_memory():
    cache = make(3, sink_frames=1)
    append(cache, 5)
    address = cache.read(0)[0].data_ptr()
    cache.reset()
    assert cache.num_frames == 0 and cache.read(0)[0].numel() == 0
    append(cache, 2)
    assert cache.read(0)[0].data_ptr() == address
    assert tokens(cache.read(1)[0]) == expected_tokens([0, 1], layer=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_memory_is_that_of_the_window(dtype):
    cache = KVCache(30, 1, 12, 128, 1560, 18, 3, dtype=dtype, device="meta")
    assert cache.num_bytes == 2 * 30 * 12 * 128 * 1560 * 21 * dtype.itemsize
    if dtype == torch.bfloat16:
        assert cache.num_bytes / 1e9 == pytest.approx(6.04, abs=0.01)  # Wan2.1 1.3B at 480x832


@settings(max_examples=25)
@given(sizes, st.integers(0, 9), st.lists(st.integers(1, 5), max_size=8), st.booleans())
def test_earlier_contexts_can_be_read(size, history, blocks, autograd):
    """A context that starts at most `history` frames back can be read; an older one is correct or raises an error."""
    context, sink = size
    cache = make(context, sink, history_frames=history)
    for length in blocks:
        append(cache, length)
    total = sum(blocks)
    own = block(total, 5, layer=1)
    for before in range(total + 1):
        kept = list(range(before))
        kept = kept if before <= context else kept[:sink] + kept[before - (context - sink) :]
        try:
            k, v = cache.read(1, before)
        except ValueError as error:
            assert total - before > history and "does not hold" in str(error)
            continue
        assert tokens(k) == expected_tokens(kept, layer=1) and torch.equal(v, -k)
        with torch.set_grad_enabled(autograd):
            extended, _ = cache.read_with_block(1, own, -own, before)
        assert torch.equal(extended, torch.cat([k, own], dim=1))
        assert tokens(cache.read(1)[0]) == tokens(cache.read(1, total)[0])


def test_a_context_that_is_not_yet_written_cannot_be_read():
    with pytest.raises(ValueError, match="does not hold"):
        make(4).read(0, before=1)


def test_a_frozen_cache_refuses_blocks_until_it_is_reset():
    cache = make(6)
    append(cache, 3)
    cache.freeze()
    with pytest.raises(AssertionError):
        append(cache, 3)
    assert tokens(cache.read(0)[0]) == expected_tokens([0, 1, 2], 0)
    cache.reset()
    append(cache, 3)


# ---- Prompt switches ----


@pytest.mark.parametrize("sink", [0, 1, 3])
def test_forget_and_rewind_keep_the_sink_and_the_named_frames(sink):
    """Random sequences of appends, `forget` and `rewind` against a list of frames, with and without scratch space."""
    random = Random(3)
    for _ in range(40):
        cache = KVCache(1, 1, 1, 1, 1, context_frames=6, block_frames=2, sink_frames=sink)
        held: dict[int, float] = {}
        for value in range(30):
            action = random.choice(["append"] * 4 + ["forget", "rewind"])
            newest = cache.num_frames
            if action == "append":
                frames = torch.tensor([2.0 * value, 2.0 * value + 1]).view(1, 2, 1, 1)
                cache.append(0, frames, -frames)
                cache.commit(2)
                held |= {newest: 2.0 * value, newest + 1: 2.0 * value + 1}
                held = {f: x for f, x in held.items() if f < sink or f >= newest + 2 - (6 - sink)}
            elif action == "forget":
                keep = random.randrange(4)
                cache.forget(keep)
                held = {f: x for f, x in held.items() if f < sink or f >= newest - keep}
            else:
                frame = random.randrange(max(0, newest - 6) // 2, newest // 2 + 1) * 2
                cache.rewind(frame)
                held = {f: x for f, x in held.items() if f < min(sink, frame)}
            block = torch.tensor([-1.0, -2.0]).view(1, 2, 1, 1)
            with torch.no_grad():
                k, v = cache.read_with_block(0, block, -block)
            assert torch.equal(k, -v)
            assert sorted(k.flatten().tolist()) == sorted([*held.values(), -1.0, -2.0])
            assert sorted(cache.read(0)[0].flatten().tolist()) == sorted(held.values())
        cache.reset()
        assert cache.read(0)[0].numel() == 0
