"""model/causal_wan.py: one network, three ways of attending, all the same function.

Claims: law 5 (bidirectional, it is diffusers' WanTransformer3DModel); law 4 (block by block through a cache, it is one
block-causal pass, which is attention under an explicit mask); law 3 (a Denoise leaves its cache as it is); timesteps
per
frame; context passes without the head; gradients, with and without checkpointing, whatever happens to the cache; no
last position; files, LoRA, attention backends, torch.compile, the sizes of the published models.
"""

import copy
import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from diffusers import WanTransformer3DModel
from diffusers.models.attention_dispatch import attention_backend
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from torch import Tensor

from model import presets
from model.causal_wan import BlockCausal, CausalWanModel, rotary_table

TEXT_DIM, CHANNELS = 24, 4
CLOSE = dict(atol=2e-5, rtol=1e-4)  # float32, other order of sums


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def clip(frames: int = 4, height: int = 4, width: int = 6, batch: int = 1, seed: int = 0) -> Tensor:
    return randn(batch, CHANNELS, frames, height, width, seed=seed)


PROMPT = randn(1, 5, TEXT_DIM, seed=9)


@pytest.fixture(scope="module")
def reference(net) -> WanTransformer3DModel:
    config = {k: v for k, v in net.config.items() if not k.startswith("_")}
    other = WanTransformer3DModel(**config).eval().requires_grad_(False)
    other.load_state_dict(net.state_dict())  # strict: the names are the same
    return other


# ---- law 5: diffusers' transformer ----


@settings(max_examples=10)
@given(
    batch=st.integers(1, 2),
    frames=st.integers(1, 4),
    rows=st.integers(1, 4),
    columns=st.integers(1, 4),
    text_length=st.integers(1, 6),
    timestep=st.floats(0, 1000),
)
def test_bidirectional_mode_is_diffusers_transformer(
    net, reference, batch, frames, rows, columns, text_length, timestep
):
    x = clip(frames, 2 * rows, 2 * columns, batch)
    prompt = randn(batch, text_length, TEXT_DIM)
    steps = torch.tensor([timestep, timestep / 3])[:batch]
    expected = reference(x, steps, prompt, return_dict=False)[0]
    assert expected.std() > 0.1
    torch.testing.assert_close(net(x, steps, prompt), expected, **CLOSE)


def test_names_and_shapes_are_diffusers(net, reference):
    shapes = {name: tensor.shape for name, tensor in net.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in reference.state_dict().items()}


@pytest.mark.parametrize(("name", "billions"), [("wan-1.3b", 1.42), ("wan-14b", 14.29)])
def test_published_sizes(name, billions):
    with init_empty_weights():
        ours = CausalWanModel(**presets.TRANSFORMERS[name])
        theirs = WanTransformer3DModel(**presets.TRANSFORMERS[name])
    count = sum(p.numel() for p in ours.parameters())
    assert count == sum(p.numel() for p in theirs.parameters())
    assert count / 1e9 == pytest.approx(billions, abs=0.01)


def test_the_miniature_is_small():
    with init_empty_weights():
        net = CausalWanModel(**presets.TRANSFORMERS["shapes"])
    assert sum(p.numel() for p in net.parameters()) < 10e6


def test_what_is_not_text_to_video_is_refused():
    with pytest.raises(ValueError, match="image-to-video"):
        CausalWanModel(image_dim=8, num_layers=1)
    with pytest.raises(ValueError, match="one frame"):
        CausalWanModel(patch_size=(2, 2, 2), num_layers=1)


def test_sizes_that_patches_do_not_divide_are_refused(net):
    with pytest.raises(ValueError, match="5x6"):
        net(clip(height=5), torch.tensor([1.0]), PROMPT)


def test_a_whole_clip_is_not_cached(net):
    with pytest.raises(ValueError, match="whole clips"):
        net(clip(2), torch.tensor([1.0]), PROMPT, causal=BlockCausal((2,)), cache=net.new_cache(1, 4, 6, 2, 2))


# ---- timesteps and text ----


def test_equal_timesteps_per_frame_are_one_per_clip(net):
    x, steps = clip(3, batch=2), torch.tensor([300.0, 900.0])
    prompt = PROMPT.expand(2, -1, -1)
    per_frame = net(x, steps[:, None].expand(2, 3), prompt)
    torch.testing.assert_close(per_frame, net(x, steps, prompt), **CLOSE)


def test_a_frame_is_modulated_by_its_own_timestep(net):
    """Frames that cannot see each other: together with different timesteps, or alone with theirs."""
    x, steps = clip(3), torch.tensor([[100.0, 500.0, 900.0]])
    together = net(x, steps, PROMPT, causal=BlockCausal((1, 1, 1), context_frames=0))
    for frame in range(3):
        alone = net(x[:, :, frame : frame + 1], steps[:, frame], PROMPT, first_frame=frame)
        torch.testing.assert_close(together[:, :, frame : frame + 1], alone, **CLOSE)


def test_text_may_be_encoded_once(net):
    x, steps = clip(), torch.tensor([400.0])
    assert torch.equal(net(x, steps, net.encode_text(PROMPT)), net(x, steps, PROMPT))
    assert not torch.allclose(net(x, steps, PROMPT), net(x, steps, -PROMPT), atol=1e-2)


# ---- law 4: blocks through a cache ----


@st.composite
def windows(draw) -> BlockCausal:
    blocks = tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=5)))
    context = draw(st.none() | st.integers(0, sum(blocks)))
    return BlockCausal(blocks, context, draw(st.integers(0, min(2, sum(blocks) if context is None else context))))


def frame_mask(causal: BlockCausal) -> Tensor:
    """[F, F] booleans, by the words of the docstring and one frame at a time: who sees whom."""
    owner = [b for b, frames in enumerate(causal.blocks) for _ in range(frames)]
    starts = [0, *itertools.accumulate(causal.blocks)]
    mask = torch.zeros(len(owner), len(owner), dtype=torch.bool)
    for query, key in itertools.product(range(len(owner)), repeat=2):
        start = starts[owner[query]]
        if owner[query] == owner[key]:
            mask[query, key] = True
        elif key < start:
            ring = start if causal.context_frames is None else causal.context_frames - causal.sink_frames
            mask[query, key] = key < causal.sink_frames or key >= start - ring
    return mask


@given(windows())
def test_what_is_visible_is_the_mask(causal):
    mask = frame_mask(causal)
    for start, end, seen in causal.visible():
        frames = [frame for a, b in seen for frame in range(a, b)]
        assert len(set(frames)) == len(frames)
        for query in range(start, end):
            assert mask[query].nonzero().flatten().tolist() == sorted(frames)


@settings(max_examples=15)
@given(windows())
def test_blocks_through_a_cache_are_one_masked_pass(net, text, causal):
    frames = sum(causal.blocks)
    x, steps = clip(frames, 2, 4), torch.linspace(900, 100, frames)[None]
    expected = net(x, steps, text, causal=causal)
    context = frames if causal.context_frames is None else causal.context_frames
    cache = net.new_cache(1, 2, 4, context, 3, causal.sink_frames)
    start = 0
    for length in causal.blocks:
        span = slice(start, start + length)
        block = x[:, :, span], steps[:, span], text
        actual = net(*block, first_frame=start, cache=cache)
        torch.testing.assert_close(actual, expected[:, :, span], **CLOSE)
        assert net(*block, first_frame=start, cache=cache, write=True, head=False) is None
        start += length


@settings(max_examples=15)
@given(windows())
def test_teacher_forcing_in_one_pass_is_noisy_blocks_beside_a_cache_of_clean_ones(net, text, causal):
    frames = sum(causal.blocks)
    clean, noisy = clip(frames, 2, 4), clip(frames, 2, 4).flip(2)
    steps = torch.linspace(900, 100, frames)[None]
    both = torch.cat([clean, noisy], dim=2), torch.cat([torch.zeros_like(steps), steps], dim=1)
    expected = net(*both, text, causal=dataclasses.replace(causal, beside_clean=True))[:, :, frames:]
    context = frames if causal.context_frames is None else causal.context_frames
    cache = net.new_cache(1, 2, 4, context, 3, causal.sink_frames)
    start = 0
    for length in causal.blocks:
        span = slice(start, start + length)
        actual = net(noisy[:, :, span], steps[:, span], text, first_frame=start, cache=cache)
        torch.testing.assert_close(actual, expected[:, :, span], **CLOSE)
        now = torch.zeros(1, length)
        net(clean[:, :, span], now, text, first_frame=start, cache=cache, write=True, head=False)
        start += length


@settings(max_examples=10)
@given(windows())
def test_one_masked_pass_is_attention_under_an_explicit_mask(net, text, causal):
    frames = sum(causal.blocks)
    x, steps = clip(frames, 2, 4), torch.linspace(900, 100, frames)[None]
    actual = net(x, steps, text, causal=causal)
    mask = frame_mask(causal).repeat_interleave(2, 0).repeat_interleave(2, 1)  # two tokens a frame

    def masked(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)

    other = copy.copy(net)
    other._attend = lambda *args, **kwargs: masked
    torch.testing.assert_close(actual, other(x, steps, text), **CLOSE)


def test_the_future_is_not_seen_and_the_past_is(net, text):
    x, steps, causal = clip(6), torch.full((1, 6), 500.0), BlockCausal((2, 2, 2))
    before = net(x, steps, text, causal=causal)
    later = x.clone()
    later[:, :, 4:] += 1
    assert torch.equal(net(later, steps, text, causal=causal)[:, :, :4], before[:, :, :4])
    earlier = x.clone()
    earlier[:, :, :2] += 1
    assert not torch.allclose(net(earlier, steps, text, causal=causal)[:, :, 4:], before[:, :, 4:], atol=1e-3)


# ---- law 3: who changes a cache ----


def filled_cache(net, text, frames: int = 4, context: int = 4, seed: int = 3):
    cache = net.new_cache(1, 4, 6, context, 2)
    for start in range(0, frames, 2):
        x = clip(2, seed=seed + start)
        with torch.no_grad():
            net(x, torch.full((1, 2), 300.0), text, first_frame=start, cache=cache, write=True, head=False)
    return cache


def contents(cache) -> list[Tensor]:
    return [x.clone() for layer in range(3) for x in cache.read(layer)]


@pytest.mark.parametrize("frames", [0, 2, 4, 6])
def test_a_denoise_leaves_its_cache_as_it_is(net, text, frames):
    cache = filled_cache(net, text, frames)
    before = contents(cache)
    with torch.no_grad():
        first = net(clip(2), torch.full((1, 2), 700.0), text, first_frame=frames, cache=cache)
        second = net(clip(2), torch.full((1, 2), 700.0), text, first_frame=frames, cache=cache)
    assert torch.equal(first, second)
    assert cache.num_frames == frames
    assert all(torch.equal(a, b) for a, b in zip(contents(cache), before, strict=True))


def test_a_context_pass_needs_no_head(net, text):
    """The same keys and values, whether the pass also predicts or not; and predicting while writing changes nothing."""
    caches = [filled_cache(net, text) for _ in range(2)]
    block = clip(2), torch.full((1, 2), 500.0), text
    with torch.no_grad():
        plain = net(*block, first_frame=4, cache=caches[0])
        assert torch.equal(net(*block, first_frame=4, cache=caches[0], write=True), plain)
        assert net(*block, first_frame=4, cache=caches[1], write=True, head=False) is None
    assert all(torch.equal(a, b) for a, b in zip(*map(contents, caches), strict=True))
    assert caches[0].num_frames == caches[1].num_frames == 6


# ---- positions ----


def test_only_distances_in_time_matter(net, text):
    x, steps = clip(4), torch.tensor([500.0])
    expected = net(x, steps, text)
    torch.testing.assert_close(net(x, steps, text, first_frame=5000), expected, atol=2e-4, rtol=1e-3)
    wrong = net(x[:, :, [0, 2, 1, 3]], steps, text)[:, :, [0, 2, 1, 3]]
    assert not torch.allclose(wrong, expected, atol=1e-2)  # so the net does see positions


def test_only_distances_to_the_context_matter(net, text):
    def last_block(first_frame: int) -> Tensor:
        cache = net.new_cache(1, 4, 6, 4, 2)
        for start in (0, 2):
            block = clip(2, seed=start), torch.full((1, 2), 300.0), text
            net(*block, first_frame=first_frame + start, cache=cache, write=True, head=False)
        return net(clip(2, seed=8), torch.full((1, 2), 500.0), text, first_frame=first_frame + 4, cache=cache)

    torch.testing.assert_close(last_block(5000), last_block(0), atol=2e-4, rtol=1e-3)


def test_positions_far_away_are_exact():
    """Angles of frame 10^6 in float32 would be off by whole turns of the fast channels."""
    cos, _ = rotary_table(16, 1_000_000, (1, 1, 1), torch.device("cpu"))
    assert cos[0, 0, 0].item() == pytest.approx(torch.tensor(1e6, dtype=torch.float64).cos().item(), abs=1e-6)


# ---- gradients ----


def gradients(net, forward) -> tuple[Tensor, list[Tensor]]:
    net.zero_grad()
    x = clip(2 if forward.__name__ == "cached" else 4).requires_grad_()
    output = forward(net, x)
    after_forward = getattr(forward, "after", None)
    if after_forward is not None:
        after_forward()
    output.square().mean().backward()
    return x.grad, [p.grad.clone() for p in net.parameters() if p.grad is not None]


def full(net, x):
    return net(x, torch.tensor([500.0]), PROMPT)


def block_causal(net, x):
    return net(x, torch.full((1, 4), 500.0), PROMPT, causal=BlockCausal((2, 2), 2))


def make_cached(net):
    """A block beside a full cache that moves on, by two blocks, between the forward and the backward pass."""
    text = net.encode_text(PROMPT.detach())
    cache = filled_cache(net, text)

    def cached(net, x):
        return net(x, torch.full((1, 2), 500.0), PROMPT, first_frame=4, cache=cache)

    def move_on():
        with torch.no_grad():
            for first_frame in (4, 6):
                block = clip(2, seed=first_frame), torch.full((1, 2), 100.0), text
                net(*block, first_frame=first_frame, cache=cache, write=True, head=False)

    cached.after = move_on
    return cached


@pytest.mark.parametrize("mode", ["full", "block_causal", "cached"])
def test_gradients_are_the_same_with_checkpointing(make_net, mode):
    net = make_net().train()

    def forward():
        return {"full": full, "block_causal": block_causal}.get(mode) or make_cached(net)

    plain_x, plain = gradients(net, forward())
    assert plain_x.abs().mean() > 1e-4
    assert len(plain) == len(list(net.parameters())) and all(g.abs().sum() > 0 for g in plain)
    net.enable_gradient_checkpointing()
    again_x, again = gradients(net, forward())
    assert torch.equal(again_x, plain_x)
    assert all(torch.equal(a, b) for a, b in zip(again, plain, strict=True))


def test_the_gradient_of_a_cached_block_is_that_of_the_masked_pass_without_the_context(make_net):
    """No gradient crosses blocks: METHOD section 4."""
    net = make_net().train()
    cached_x, _ = gradients(net, make_cached(net))
    whole = torch.cat([clip(2, seed=3), clip(2, seed=5), clip(2)], dim=2).requires_grad_()
    steps = torch.tensor([[300.0] * 4 + [500.0] * 2])
    net(whole, steps, PROMPT, causal=BlockCausal((2, 2, 2)))[:, :, 4:].square().mean().backward()
    torch.testing.assert_close(whole.grad[:, :, 4:], cached_x, atol=1e-6, rtol=1e-3)


def test_initial_weights_predict_nothing_and_can_learn():
    torch.manual_seed(0)
    net = CausalWanModel(num_attention_heads=2, attention_head_dim=16, ffn_dim=64, num_layers=1, text_dim=TEXT_DIM,
                         in_channels=CHANNELS, out_channels=CHANNELS)  # fmt: skip
    net.init_weights()
    output = net(clip(1), torch.tensor([500.0]), PROMPT)
    assert torch.equal(output, torch.zeros_like(output))
    (output - 1).square().mean().backward()
    assert net.proj_out.weight.grad.abs().sum() > 0
    linears = [m for m in net.modules() if isinstance(m, torch.nn.Linear) and m is not net.proj_out]
    assert all(m.weight.std() > 0 for m in [*linears, net.patch_embedding])


# ---- files, LoRA, backends, compile ----


def test_saved_and_loaded_it_is_the_same(net, text, tmp_path):
    net.save_pretrained(tmp_path)
    loaded = CausalWanModel.from_pretrained(tmp_path)
    assert loaded.config.num_layers == 3 and not loaded.training
    assert not any(p.data_ptr() % 64 for p in loaded.parameters())
    assert torch.equal(loaded(clip(), torch.tensor([500.0]), PROMPT), net(clip(), torch.tensor([500.0]), PROMPT))
    theirs = WanTransformer3DModel.from_pretrained(tmp_path)
    actual = theirs(clip(), torch.tensor([500.0]), PROMPT, return_dict=False)[0]
    torch.testing.assert_close(actual, net(clip(), torch.tensor([500.0]), PROMPT), **CLOSE)


def test_in_bfloat16_it_is_roughly_the_same(net, tmp_path):
    net.save_pretrained(tmp_path)
    half = CausalWanModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert half.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    assert half.blocks[0].scale_shift_table.dtype == torch.float32
    output = half(clip(), torch.tensor([500.0]), PROMPT)
    expected = net(clip(), torch.tensor([500.0]), PROMPT)
    assert output.dtype == torch.bfloat16
    assert (output.float() - expected).norm() / expected.norm() < 0.05


def test_lora_adapters(net):
    net = copy.deepcopy(net)
    arguments = clip(), torch.tensor([500.0]), PROMPT
    before = net(*arguments)
    net.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v", "ffn.net.2"]))
    assert torch.equal(net(*arguments), before)  # B starts at zero
    adapters = [name for name, p in net.named_parameters() if p.requires_grad]
    assert adapters and all("lora_" in name for name in adapters)
    for name, parameter in net.named_parameters():
        if "lora_B" in name:
            torch.nn.init.constant_(parameter, 0.3)
    assert not torch.allclose(net(*arguments), before, atol=1e-2)
    net.disable_adapters()
    assert torch.equal(net(*arguments), before)


def test_attention_backends_agree(net, text):
    other = copy.deepcopy(net)
    with attention_backend():  # or it would be everybody's from here on, and is not safe in threads
        other.set_attention_backend("_native_math")
    for how in (dict(), dict(causal=BlockCausal((2, 2))), dict(cache=filled_cache(net, text), first_frame=4)):
        x = clip(2 if "cache" in how else 4)
        steps = torch.full((1, x.shape[2]), 500.0)
        torch.testing.assert_close(other(x, steps, text, **how), net(x, steps, text, **how), **CLOSE)


@pytest.mark.slow
def test_compiled_layers_compute_the_same(make_net):
    net = make_net(num_layers=2).requires_grad_(False)
    text = net.encode_text(PROMPT)
    cache = net.new_cache(1, 4, 6, 4, 2)
    block = clip(2), torch.full((1, 2), 500.0), text
    net(*block, cache=cache, write=True, head=False)
    expected = net(*block, first_frame=2, cache=cache)
    names = list(net.state_dict())
    net.compile_layers()
    assert list(net.state_dict()) == names
    torch.testing.assert_close(net(*block, first_frame=2, cache=cache), expected, **CLOSE)


def test_writing_under_checkpointing_is_refused(make_net):
    """The recomputation would append a second time, over whatever the cache holds by then."""
    net = make_net()
    net.gradient_checkpointing = True
    cache = net.new_cache(1, 4, 4, 2, 1)
    with pytest.raises(ValueError, match="twice"):
        net(torch.randn(1, 4, 1, 4, 4), torch.tensor([500.0]), torch.randn(1, 5, 24), cache=cache, write=True)


def test_a_forward_without_head_must_write(net):
    cache = net.new_cache(1, 4, 4, 2, 1)
    with pytest.raises(ValueError, match="only writes"):
        net(torch.randn(1, 4, 1, 4, 4), torch.tensor([500.0]), torch.randn(1, 5, 24), cache=cache, head=False)
