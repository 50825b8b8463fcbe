"""model.offload: the order of loading, and weights that are on the device only while they are used.

The device of these tests is `meta`, which computes nothing and refuses to mix its tensors with the CPU's.
"""

import copy

import pytest
import torch
from test_text_to_video import HOME, RecordingEncoder
from torch import nn

from model.embeddings import EmbeddingCache
from model.offload import StreamedWeights, stream_weights_
from pipeline import prompt_embeddings, text_to_video
from pipeline.build import load_embeddings, prepare_network
from pipeline.prompt_embeddings import PromptEmbeddings
from pipeline.text_to_video import TextToVideo
from utils.config import Config
from utils.config_loading import load_config

CPU = torch.device("cpu")


@torch.no_grad()
def passes(net, device=CPU) -> list[torch.Tensor]:
    """Run every kind of pass and return its results."""
    cache = net.new_cache(1, 4, 4, 6, 3)
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(1, 4, 3, 4, 4, generator=generator).to(device) for _ in range(2))
    timestep = torch.full((1, 3), 500.0, device=device)
    text = net.encode_text(torch.randn(1, 5, 24, generator=generator).to(device))
    net.write_block(x, timestep, text, cache)
    flow = net.denoise_block(y, timestep, text, cache, 3)
    both = torch.cat([y, x], dim=2), timestep.repeat(1, 2)
    return [flow, net.write_then_denoise(*both, text, cache, 3, 3), net(x, timestep, text)]


def linears(net: nn.Module) -> list[nn.Linear]:
    return [module for layer in net.layers for module in layer.modules() if isinstance(module, nn.Linear)]


@pytest.fixture
def own_net(net):
    return copy.deepcopy(net)


def test_streamed_layers_give_the_same_bits(net, own_net):
    stream_weights_(own_net, own_net.layers, CPU)
    for own, expected in zip(passes(own_net), passes(net), strict=True):
        assert torch.equal(own, expected)


def test_one_linear_layer_is_on_the_device_at_a_time(own_net, monkeypatch):
    config, counts = Config(), []
    config.model.offload, config.model.compile = "all", "on"  # streamed layers are not compiled
    prepare_network(own_net, config, HOME)
    pre_forward = StreamedWeights.pre_forward

    def counting(hook, module, *args, **kwargs):
        result = pre_forward(hook, module, *args, **kwargs)
        counts.append(sum(layer.weight.device == HOME for layer in linears(own_net)))
        return result

    monkeypatch.setattr(StreamedWeights, "pre_forward", counting)
    assert all(result.device == HOME for result in passes(own_net, HOME))
    assert set(counts) == {1} and len(counts) > 3 * len(linears(own_net))
    on_cpu = [name for name, weight in own_net.named_parameters() if weight.device == CPU]
    assert len(on_cpu) == 2 * len(linears(own_net)) and own_net.device == HOME  # weights and biases


def test_a_streamed_text_encoder_gives_the_same_embeddings(world):
    config = load_config(str(world.config))
    expected = load_embeddings(config, CPU).get(["a red circle"])
    streamed = PromptEmbeddings(load_embeddings(config, CPU), CPU, "all")
    assert torch.equal(streamed.of(["a red circle"]), expected)
    encoder, _ = streamed.cache.encoder.networks()
    assert hasattr(encoder.encoder.block[0].layer[0].SelfAttention.q, "_hf_hook")


class StreamingEncoder(RecordingEncoder):
    num_bytes = 10**9

    def stream(self, device):
        self.streamed, self.place = True, device
        self.moves.append("streamed")


@pytest.mark.parametrize(
    ("offload", "free", "moves"),
    [
        ("text", 2e9, ["meta", "cpu"] * 2),
        ("text", 1.2e9, ["streamed"] * 2),
        ("all", 2e9, ["streamed"] * 2),
        ("none", 0, []),
    ],
)
def test_a_text_encoder_that_does_not_fit_beside_the_other_networks_is_streamed(monkeypatch, offload, free, moves):
    monkeypatch.setattr(prompt_embeddings, "free_bytes", lambda device: free)
    encoder = StreamingEncoder()
    embeddings = PromptEmbeddings(EmbeddingCache(encoder), HOME, offload)
    for prompt in ("a", "b", "a"):
        embeddings.of([prompt])
    assert encoder.done == ["a", "b"] and encoder.moves == moves


@pytest.mark.parametrize(("offload", "moves"), [("text", ["meta", "cpu"]), ("all", ["streamed"]), ("none", ["meta"])])
def test_the_text_encoder_leaves_the_device_before_other_networks_reach_it(monkeypatch, world, offload, moves):
    encoder, events = StreamingEncoder(), []

    def reaches_device(name):
        def load(*arguments):
            assert arguments[-1] == HOME and encoder.done == ["a", ""]  # the negative prompt too
            events.extend([*encoder.moves, name])
            encoder.moves.clear()
            return torch.nn.Linear(1, 1, device=HOME)

        return load

    def load_encoder(config, device):
        if device == HOME:
            encoder.to(device)
        return EmbeddingCache(encoder)

    monkeypatch.setattr(text_to_video, "load_weights", lambda config: events.append("read"))
    monkeypatch.setattr(text_to_video, "load_embeddings", load_encoder)
    monkeypatch.setattr(text_to_video, "prepare_network", reaches_device("net"))
    monkeypatch.setattr(text_to_video, "load_vae", reaches_device("vae"))
    monkeypatch.setattr(TextToVideo, "__init__", lambda *arguments: None)
    options = f"model.offload={offload}", "rollout.guidance_scale=2"
    TextToVideo.load(str(world.config), *options, device=HOME, prompts=["a"])
    assert events == ["read", *moves, "net", "vae"]


@pytest.mark.parametrize(("value", "expected"), [("true", "text"), ("false", "none"), ("none", "none"), ("all", "all")])
def test_booleans_of_older_files_still_load(tmp_path, value, expected):
    path = tmp_path / "config.yaml"
    path.write_text(f"model: {{offload: {value}}}")
    assert load_config(str(path)).model.offload == expected
    assert load_config("configs/hiar.yaml", [f"model.offload={value}"]).model.offload == expected
