"""model/causal_wan.py: the causal Wan DiT.

Claims: law 5 (in bidirectional mode it equals diffusers' WanTransformer3DModel); one timestep per frame; positions
without a limit; equal gradients with and without checkpointing, also after further appends to the cache; files, LoRA,
torch.compile; the published sizes. Laws: docs/method.md.
"""

import pytest
import torch
from diffusers import WanTransformer3DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from torch import Tensor
from wan_samples import CLIP_TIMESTEP, CLOSE, PROMPT, TEXT_DIM, clip, filled_cache, per_frame, randn

from model import presets
from model.attention import BlockCausalMask
from model.causal_wan import CausalWanModel
from model.rotary import rotary_table, rotate


@pytest.fixture(scope="module")
def reference(net) -> WanTransformer3DModel:
    config = {k: v for k, v in net.config.items() if not k.startswith("_")}
    other = WanTransformer3DModel(**config).eval().requires_grad_(False)
    other.load_state_dict(net.state_dict())  # strict: the names are the same
    return other


# ---- law 5: diffusers' transformer ----


@settings(max_examples=5)
@given(
    batch=st.integers(1, 2),
    frames=st.integers(1, 4),
    rows=st.integers(1, 4),
    columns=st.integers(1, 4),
    text_length=st.integers(1, 6),
    timestep=st.floats(0, 1000),
)
def test_bidirectional_mode_equals_diffusers(net, reference, batch, frames, rows, columns, text_length, timestep):
    x = clip(frames, 2 * rows, 2 * columns, batch)
    prompt = randn(batch, text_length, TEXT_DIM)
    timesteps = torch.tensor([timestep, timestep / 3])[:batch]
    expected = reference(x, timesteps, prompt, return_dict=False)[0]
    assert expected.std() > 0.1
    torch.testing.assert_close(net(x, timesteps, prompt), expected, **CLOSE)


def test_names_and_shapes_are_those_of_diffusers(net, reference):
    shapes = {name: tensor.shape for name, tensor in net.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in reference.state_dict().items()}


@pytest.mark.parametrize(("name", "billions"), [("wan-1.3b", 1.42), ("wan-14b", 14.29), ("shapes", 0.00)])
def test_published_sizes(name, billions):
    with torch.device("meta"):
        ours = CausalWanModel(**presets.TRANSFORMERS[name])
        theirs = WanTransformer3DModel(**presets.TRANSFORMERS[name])
    count = sum(p.numel() for p in ours.parameters())
    assert count == sum(p.numel() for p in theirs.parameters())
    assert count / 1e9 == pytest.approx(billions, abs=0.01)


def test_sizes_that_are_not_text_to_video_are_refused():
    with pytest.raises(ValueError, match="image-to-video"):
        CausalWanModel(image_dim=8, num_layers=1)
    with pytest.raises(ValueError, match="one frame"):
        CausalWanModel(patch_size=(2, 2, 2), num_layers=1)


def test_latents_that_patches_do_not_divide_are_refused(net):
    with pytest.raises(ValueError, match="5x6"):
        net(clip(height=5), CLIP_TIMESTEP, PROMPT)


# ---- timesteps and text ----


def test_equal_timesteps_per_frame_equal_one_per_clip(net):
    x, timesteps = clip(3, batch=2), torch.tensor([300.0, 900.0])
    prompt = PROMPT.expand(2, -1, -1)
    expected = net(x, timesteps, prompt)
    torch.testing.assert_close(net(x, timesteps[:, None].expand(2, 3), prompt), expected, **CLOSE)


def test_a_frame_is_modulated_by_its_own_timestep(net, text):
    """Three frames that do not attend to each other give the same flow in one pass and in a pass each."""
    x, timesteps = clip(3), torch.tensor([[100.0, 500.0, 900.0]])
    together = net(x, timesteps, text, causal=BlockCausalMask((1, 1, 1), context_frames=0))
    for frame in range(3):
        alone = net(x[:, :, frame : frame + 1], timesteps[:, frame], text, first_frame=frame)
        torch.testing.assert_close(together[:, :, frame : frame + 1], alone, **CLOSE)


def test_text_can_be_encoded_once(net):
    x = clip()
    assert torch.equal(net(x, CLIP_TIMESTEP, net.encode_text(PROMPT)), net(x, CLIP_TIMESTEP, PROMPT))
    assert not torch.allclose(net(x, CLIP_TIMESTEP, PROMPT), net(x, CLIP_TIMESTEP, -PROMPT), atol=1e-2)


# ---- positions ----


def test_only_differences_of_positions_matter(net, text):
    x = clip(4)
    expected = net(x, CLIP_TIMESTEP, text)
    torch.testing.assert_close(net(x, CLIP_TIMESTEP, text, first_frame=5000), expected, atol=2e-4, rtol=1e-3)
    swapped = net(x[:, :, [0, 2, 1, 3]], CLIP_TIMESTEP, text)[:, :, [0, 2, 1, 3]]
    assert not torch.allclose(swapped, expected, atol=1e-2)  # the order of frames does matter


def test_only_the_distance_to_the_context_matters(net, text):
    def last_block(first_frame: int) -> Tensor:
        cache = filled_cache(net, text, first_frame=first_frame)
        return net.denoise_block(clip(2, seed=8), per_frame(500.0), text, cache, first_frame + 4)

    torch.testing.assert_close(last_block(5000), last_block(0), atol=2e-4, rtol=1e-3)


def test_positions_far_away_are_exact():
    """In float32, the angles of the fast channels would be wrong at frame 10^6."""
    cos, sin = rotary_table(16, 1_000_000, (1, 1, 1), torch.device("cpu")).unbind(-1)
    time = [1e6 * 10000 ** (-channel / 8) for channel in range(0, 8, 2)]  # 8 of 16 channels; the rest is at row 0
    expected = torch.tensor([*time, 0, 0, 0, 0], dtype=torch.float64)
    torch.testing.assert_close(cos[0, 0], expected.cos().float(), atol=1e-6, rtol=0)
    torch.testing.assert_close(sin[0, 0], expected.sin().float(), atol=1e-6, rtol=0)


def test_rotation_keeps_the_order_of_channels():
    """Attention would not notice another order, but cached keys of other programs would differ."""
    x = torch.randn(1, 3, 2, 8)
    one, i = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    assert torch.equal(rotate(x, one.expand(3, 1, 4, 2)), x)
    quarter = rotate(x, i.expand(3, 1, 4, 2))
    assert torch.equal(quarter[..., 0::2], -x[..., 1::2]) and torch.equal(quarter[..., 1::2], x[..., 0::2])


@pytest.mark.parametrize("grad", [False, True])
def test_a_block_ignores_later_frames_of_the_cache(net, text, grad):
    """Training denoises a block again from a cache that holds later blocks (law 6, docs/method.md)."""
    cache, block = filled_cache(net, text, context=6), (clip(2, seed=8), per_frame(500.0), text)
    with torch.set_grad_enabled(grad):
        expected = net.denoise_block(*block, cache, 4)
    with torch.no_grad():
        net.write_block(clip(2, seed=9), per_frame(100.0), text, cache, 4)
    with torch.set_grad_enabled(grad):
        assert torch.equal(net.denoise_block(*block, cache, 4), expected)
        assert not torch.equal(net.denoise_block(*block, cache, 6), expected)


def test_a_network_in_bfloat16_computes_all_layers_in_it(make_net):
    net = make_net(num_layers=1).bfloat16()
    assert net(clip().bfloat16(), CLIP_TIMESTEP, PROMPT.bfloat16()).dtype == torch.bfloat16


# ---- gradients ----


def gradients(net, mode: str) -> tuple[Tensor, list[Tensor]]:
    """Return the gradients of the input and of all parameters.

    In mode "cached", two blocks are appended to the cache between the forward and the backward pass.
    """
    net.zero_grad()
    x = clip(2 if mode == "cached" else 4).requires_grad_()
    if mode == "cached":
        text = net.encode_text(PROMPT)
        cache = filled_cache(net, text)
        output = net.denoise_block(x, per_frame(500.0), PROMPT, cache, 4)
        with torch.no_grad():
            for first_frame in (4, 6):
                net.write_block(clip(2, seed=first_frame), per_frame(100.0), text, cache, first_frame)
    elif mode == "block_causal":
        output = net(x, per_frame(500.0, 4), PROMPT, causal=BlockCausalMask((2, 2), 2))
    else:
        output = net(x, CLIP_TIMESTEP, PROMPT)
    output.square().mean().backward()
    return x.grad, [p.grad.clone() for p in net.parameters() if p.grad is not None]


@pytest.mark.parametrize("mode", ["full", "block_causal", "cached"])
def test_gradients_are_the_same_with_checkpointing(make_net, mode):
    net = make_net().train()
    plain_x, plain = gradients(net, mode)
    assert plain_x.abs().mean() > 1e-4
    assert len(plain) == len(list(net.parameters())) and all(g.abs().sum() > 0 for g in plain)
    net.enable_gradient_checkpointing()
    again_x, again = gradients(net, mode)
    assert torch.equal(again_x, plain_x)
    assert all(torch.equal(a, b) for a, b in zip(again, plain, strict=True))


def test_no_gradient_crosses_blocks(make_net):
    """The gradient of a cached block equals that of the block-causal pass with respect to the block's own input."""
    net = make_net().train()
    cached_x, _ = gradients(net, "cached")
    whole = torch.cat([clip(2, seed=3), clip(2, seed=5), clip(2)], dim=2).requires_grad_()
    timesteps = torch.tensor([[300.0] * 4 + [500.0] * 2])
    net(whole, timesteps, PROMPT, causal=BlockCausalMask((2, 2, 2)))[:, :, 4:].square().mean().backward()
    torch.testing.assert_close(whole.grad[:, :, 4:], cached_x, atol=1e-6, rtol=1e-3)


def test_passes_that_append_refuse_autograd_with_checkpointing(make_net):
    net = make_net(num_layers=1)
    net.gradient_checkpointing = True
    block, cache = (clip(1), torch.tensor([500.0]), PROMPT), net.new_cache(1, 4, 6, 2, 1)
    for write in (lambda: net.write_block(*block, cache), lambda: net.denoise_block(*block, cache, append=True)):
        with pytest.raises(ValueError, match="append twice"):
            write()
    with pytest.raises(ValueError, match="no_grad"):
        net.write_then_denoise(clip(2), per_frame(1.0), PROMPT, cache, 1)
    assert cache.num_frames == 0


def test_initial_weights_predict_zero_and_can_learn(make_net):
    net = make_net(num_layers=1)
    torch.manual_seed(0)
    net.init_weights()
    output = net(clip(1), CLIP_TIMESTEP, PROMPT)
    assert torch.equal(output, torch.zeros_like(output))
    (output - 1).square().mean().backward()
    assert net.proj_out.weight.grad.abs().sum() > 0
    linears = [m for m in net.modules() if isinstance(m, torch.nn.Linear) and m is not net.proj_out]
    assert all(m.weight.std() > 0 for m in [*linears, net.patch_embedding])


# ---- files, LoRA, backends, compilation ----


@pytest.fixture(scope="module")
def saved(net, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    net.save_pretrained(folder)
    return folder


def test_a_saved_network_loads_with_the_same_bits(net, saved):
    arguments = clip(), CLIP_TIMESTEP, PROMPT
    loaded = CausalWanModel.from_pretrained(saved)
    assert loaded.config.num_layers == 3 and not loaded.training
    assert not any(p.data_ptr() % 64 for p in loaded.parameters())
    assert torch.equal(loaded(*arguments), net(*arguments))
    theirs = WanTransformer3DModel.from_pretrained(saved)
    torch.testing.assert_close(theirs(*arguments, return_dict=False)[0], net(*arguments), **CLOSE)


def test_bfloat16_is_close(net, saved):
    half = CausalWanModel.from_pretrained(saved, torch_dtype=torch.bfloat16)
    assert half.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    assert half.blocks[0].scale_shift_table.dtype == torch.float32
    output = half(clip(), CLIP_TIMESTEP, PROMPT)
    expected = net(clip(), CLIP_TIMESTEP, PROMPT)
    assert output.dtype == torch.bfloat16
    assert (output.float() - expected).norm() / expected.norm() < 0.05


def test_lora_adapters(make_net):
    net = make_net(num_layers=1).requires_grad_(False)
    arguments = clip(), CLIP_TIMESTEP, PROMPT
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


@pytest.mark.slow
def test_compiled_layers_compute_the_same(make_net):
    net = make_net(num_layers=1).requires_grad_(False)
    text = net.encode_text(PROMPT)
    cache = filled_cache(net, text, 2)
    block = clip(2), per_frame(500.0), text, cache, 2
    expected = net.denoise_block(*block)
    names = list(net.state_dict())
    net.compile_layers()
    assert list(net.state_dict()) == names
    with torch._inductor.config.patch(compile_threads=1):  # starting worker processes takes longer
        compiled = net.denoise_block(*block)
    torch.testing.assert_close(compiled, expected, **CLOSE)
