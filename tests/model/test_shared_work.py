"""Work that passes share, or do in a faster form (conditioning, fused_qk, plain_layer, cpu_kernels, rotary of model/).

Claims: a pass with precomputed conditioning gives the flow of its timesteps; a Denoiser computes each sigma once; fused
queries and keys follow every change of the weights, and neither state dict nor gradients change; the faster CPU kernels
equal PyTorch's.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import attention_backend
from peft import LoraConfig
from torch import nn
from wan_samples import CLOSE, PROMPT, clip, filled_cache, per_frame, randn

from model import causal_wan, cpu_kernels
from model.causal_wan import CausalWanModel
from model.denoiser import Denoiser
from model.rotary import RotaryTables, rotary_table, rotate

# ---- conditioning ----


@pytest.mark.parametrize(("frames", "batch"), [(2, 1), (1, 2)])
@torch.no_grad()
def test_precomputed_conditioning_equals_timesteps(net, text, frames, batch):
    """One conditioning serves blocks and batches of all sizes."""
    level, x = net.condition(torch.tensor([700.0])), clip(frames, batch=batch)
    timestep = per_frame(700.0, frames).expand(batch, -1)
    text = net.encode_text(PROMPT.expand(batch, -1, -1))
    caches = [net.new_cache(batch, 4, 6, 4, 2) for _ in range(2)]
    flows = []
    for cache, argument in zip(caches, (level, timestep), strict=True):
        net.write_block(x, argument, text, cache)
        flows.append(net.denoise_block(x, argument, text, cache, frames))
        flows.append(net(x, argument, text))
    torch.testing.assert_close(flows[:2], flows[2:], **CLOSE)
    torch.testing.assert_close(caches[0].read(2), caches[1].read(2), **CLOSE)


@torch.no_grad()
def test_two_levels_in_one_pass_equal_one_timestep_per_frame(net, text):
    x, caches = clip(4), [filled_cache(net, text) for _ in range(2)]
    level = net.condition(torch.tensor([[300.0, 700.0]]))
    timestep = torch.tensor([[300.0, 300.0, 700.0, 700.0]])
    flow = net.write_then_denoise(x, level, text, caches[0], 2, 4)
    torch.testing.assert_close(flow, net.write_then_denoise(x, timestep, text, caches[1], 2, 4), **CLOSE)
    torch.testing.assert_close(caches[0].read(2), caches[1].read(2), **CLOSE)


def test_a_denoiser_computes_each_level_once(net, text, monkeypatch):
    levels = []
    embed = net.embed_timestep
    monkeypatch.setattr(net, "embed_timestep", lambda timestep: levels.append(timestep.tolist()) or embed(timestep))
    denoiser, cache, x = Denoiser(net, text), filled_cache(net, text), clip(2).transpose(1, 2)
    levels.clear()
    with torch.no_grad():
        for _ in range(3):
            denoiser.denoise(x, 0.5, cache.num_frames, cache)
            denoiser.write_context(x, 0.25, cache.num_frames, cache)
            denoiser.write_then_denoise(x, 0.25, x, 0.5, cache.num_frames, cache)
        assert levels == [[[500.0]], [[250.0]], [[250.0, 500.0]]]
        Denoiser(net, text, reuse_conditioning=False).denoise(x, 0.5, 4, filled_cache(net, text))
    denoiser.denoise(x, 0.5, 0, filled_cache(net, text))  # under autograd, the weights may need gradients
    assert levels[-1] == [[500.0, 500.0]]


def test_a_pass_does_not_search_the_modules_for_dtype_and_device(net, text, monkeypatch):
    cache, denoiser = filled_cache(net, text), Denoiser(net, text)
    for name in ("dtype", "device"):
        monkeypatch.setattr(CausalWanModel, name, property(lambda self: pytest.fail("slow property")))
    with torch.no_grad():
        denoiser.denoise(clip(2).transpose(1, 2), 0.5, 4, cache)


# ---- fused queries and keys ----


@pytest.fixture
def fused(make_net):
    """A network whose passes have fused queries and keys."""
    net = make_net(num_layers=1).requires_grad_(False)
    net.prepare_inference()
    flow(net)
    assert net.layers[0].fused_qk is not None
    return net


@torch.no_grad()
def flow(net) -> torch.Tensor:
    return net(clip(), per_frame(500.0, 4), PROMPT)


def plain_flow(net) -> torch.Tensor:
    """Return the flow of an unfused network with the same weights."""
    plain = CausalWanModel.from_config(net.config)
    plain.load_state_dict(net.state_dict())
    return flow(plain)


def test_fused_queries_and_keys_keep_names_weights_and_memory(fused, make_net):
    torch.testing.assert_close(flow(fused), flow(make_net(num_layers=1)), **CLOSE)
    state, expected = fused.state_dict(), make_net(num_layers=1).state_dict()
    assert list(state) == list(expected) and all(torch.equal(state[name], expected[name]) for name in state)
    attn, qk = fused.layers[0].attn1, fused.layers[0].fused_qk
    assert attn.to_k.weight.untyped_storage().data_ptr() == qk.weight.untyped_storage().data_ptr()


def double_in_place(net) -> None:
    for parameter in net.layers[0].attn1.parameters():
        parameter.mul_(2)


def assign_a_state(net) -> None:
    net.load_state_dict({name: 1.5 * value for name, value in net.state_dict().items()}, assign=True)


def replace_data(net) -> None:
    net.layers[0].attn1.to_k.weight.data = 2 * net.layers[0].attn1.to_k.weight.data


@pytest.mark.parametrize("change", [double_in_place, assign_a_state, replace_data, lambda net: net.double().float()])
@torch.no_grad()
def test_fused_queries_and_keys_follow_the_weights(fused, change):
    change(fused)
    torch.testing.assert_close(flow(fused), plain_flow(fused), **CLOSE)
    assert fused.layers[0].fused_qk is not None


def test_adapters_take_effect_on_a_fused_network(fused):
    before = flow(fused)
    fused.add_adapter(LoraConfig(r=2, target_modules=["to_k"]))
    for name, parameter in fused.named_parameters():
        if "lora_B" in name:
            nn.init.constant_(parameter, 0.3)
    adapted = flow(fused)
    assert not torch.allclose(adapted, before, atol=1e-3)
    fused.fuse_lora()
    fused.unload_lora()
    torch.testing.assert_close(flow(fused), adapted, **CLOSE)
    assert fused.layers[0].fused_qk is not None


def test_a_fused_network_saves_copies_and_trains(fused, tmp_path):
    expected = flow(fused)
    fused.save_pretrained(tmp_path)
    assert torch.equal(flow(CausalWanModel.from_pretrained(tmp_path)), plain_flow(fused))
    torch.testing.assert_close(flow(copy.deepcopy(fused)), expected, **CLOSE)
    fused.requires_grad_(True)(clip(), per_frame(500.0, 4), PROMPT).square().mean().backward()
    attn = fused.layers[0].attn1
    assert attn.to_q.weight.grad.abs().sum() > 0 and attn.norm_k.weight.grad.abs().sum() > 0


# ---- positions ----


def test_tables_of_positions_are_kept_for_the_newest_positions():
    device = torch.device("cpu")
    tables = RotaryTables(16, capacity=2)
    first = tables.get(((3, 2),), (1, 2), device)
    assert torch.equal(first, rotary_table(16, 3, (2, 1, 2), device))
    assert tables.get(((3, 2),), (1, 2), device) is first
    two = tables.get(((3, 2), (0, 1)), (1, 2), device)
    assert torch.equal(two, torch.cat([first, rotary_table(16, 0, (1, 1, 2), device)]))
    tables.get(((7, 2),), (1, 2), device)
    assert tables.get(((3, 2),), (1, 2), device) is not first


def test_rotation_by_real_numbers_equals_complex_rotation(monkeypatch):
    x, rope = randn(2, 4, 3, 16), rotary_table(16, 9, (1, 2, 2), torch.device("cpu"))
    expected = rotate(x, rope)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(rotate(x, rope), expected)


# ---- plain layers and CPU kernels ----


@pytest.mark.parametrize("level", [torch.tensor([700.0]), torch.tensor([[100.0, 700.0]])])
@torch.no_grad()
def test_plain_layers_equal_modules(fused, make_net, level):
    net, x = make_net(num_layers=1), clip(2, batch=2)
    text = net.encode_text(PROMPT.expand(2, -1, -1))
    assert fused.layers[0].plain is not None and net.layers[0].plain is None
    torch.testing.assert_close(fused(x, fused.condition(level), text), net(x, net.condition(level), text), **CLOSE)


@pytest.mark.parametrize(
    "change", [lambda net: net.bfloat16(), lambda net: net.add_adapter(LoraConfig(r=2, target_modules=["ffn.net.2"]))]
)
def test_unsupported_layers_run_as_modules(fused, change):
    change(fused)
    flow(fused)
    assert fused.layers[0].plain is None and fused.layers[0].fused_qk is not None


def test_compiled_layers_are_not_plain(fused, monkeypatch):
    monkeypatch.setattr(causal_wan, "compile_layers", lambda layers, fall_back: None)
    fused.compile_layers()
    flow(fused)
    assert fused.layers[0].plain is None


def test_a_plain_layer_uses_the_chosen_attention_backend(fused):
    expected = flow(fused)
    with attention_backend():  # restores the default of all other networks
        fused.set_attention_backend("_native_math")
    torch.testing.assert_close(flow(fused), expected, **CLOSE)
    assert fused.layers[0].plain.cross_processor._attention_backend == "_native_math"


@torch.no_grad()
def test_cpu_kernels_equal_pytorchs(monkeypatch):
    x, weight, bias = 3 * randn(2, 5, 16), randn(8, 16, seed=1), randn(8, seed=2)
    torch.testing.assert_close(cpu_kernels.tanh_gelu(x), F.gelu(x, approximate="tanh"))
    for scale in (1, 1e-4):  # for small values, eps matters
        expected = F.rms_norm(scale * x, (16,), weight[0], 1e-6)
        torch.testing.assert_close(cpu_kernels.rms_norm_(scale * x, weight[0], 1e-6), expected)
    rope = rotary_table(16, 9, (5, 1, 1), torch.device("cpu"))
    torch.testing.assert_close(cpu_kernels.rotate_(x.clone()[:, :, None], rope), rotate(x[:, :, None], rope))
    expected = F.linear(x, weight, bias)
    monkeypatch.setattr(cpu_kernels, "_ONEDNN_FLOPS", 0)
    monkeypatch.setattr(F, "linear", lambda *_: pytest.fail("the product did not run in oneDNN"))
    torch.testing.assert_close(cpu_kernels.linear(x, weight, bias), expected)
