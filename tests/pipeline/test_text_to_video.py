"""pipeline/text_to_video.py and pipeline/parallel/rank.py: offloaded text encoders, and layers that do not compile."""

from dataclasses import replace

import pytest
import torch
from tiny_model import write_config

from model.compilation import compile_failure
from model.embeddings import EmbeddingCache
from model.text_encoder import TextEncoder
from pipeline.parallel import rank as parallel
from pipeline.parallel.rank import PipelineRank
from pipeline.parallel.stages import plan_pipelines
from pipeline.prompt_embeddings import PromptEmbeddings
from pipeline.schedule import Schedule
from utils.config_loading import load_config

HOME = torch.device("meta")


class RecordingEncoder(TextEncoder):
    """Records its prompts and moves, and encodes on one device only."""

    def __init__(self) -> None:
        super().__init__(None, None, length=4)
        self.place = HOME
        self.done: list[str] = []
        self.moves: list[str] = []

    def to(self, device):
        self.place = torch.device(device)
        self.moves.append(self.place.type)
        return self

    def encode(self, prompts):
        assert self.place == HOME, prompts
        self.done += prompts
        return torch.ones(len(prompts), self.length, 2)


@pytest.fixture
def encoder() -> RecordingEncoder:
    return RecordingEncoder()


def test_encoding_prompts_ahead_moves_the_text_encoder_once(encoder):
    embeddings = PromptEmbeddings(EmbeddingCache(encoder), HOME, offload="text")
    embeddings.encode(["a", "b", "a"])
    assert embeddings.of(["b"]).shape == embeddings.of(["a"]).shape == (1, 4, 2)
    assert encoder.done == ["a", "b"] and encoder.place.type == "cpu" and encoder.moves == ["meta", "cpu"]


def test_a_later_prompt_moves_the_text_encoder_again(encoder):
    embeddings = PromptEmbeddings(EmbeddingCache(encoder), HOME, offload="text")
    for prompt in ("a", "b", "a"):
        embeddings.of([prompt])  # the encoder asserts its device
    assert encoder.done == ["a", "b"] and encoder.moves == ["meta", "cpu"] * 2


def test_without_offload_the_text_encoder_is_never_moved(encoder):
    embeddings = PromptEmbeddings(EmbeddingCache(encoder), HOME, offload="none")
    embeddings.of(["a"])
    embeddings.of(["b"])
    assert encoder.done == ["a", "b"] and encoder.moves == []


@pytest.mark.parametrize(("num_ranks", "offloads"), [(1, "text"), (4, "text"), (5, "text"), (6, "none")])
def test_a_rank_with_only_the_text_encoder_does_not_offload_it(monkeypatch, tmp_path, encoder, num_ranks, offloads):
    config = load_config(str(write_config(tmp_path / "tiny.yaml", tmp_path)))
    for name, network in (("network", "net"), ("vae", "vae"), ("embeddings", EmbeddingCache(encoder))):
        monkeypatch.setattr(parallel, f"load_{name}", lambda config, device, network=network: network)
    monkeypatch.setattr(parallel, "handoff_groups", list)
    [pipeline] = pipelines = plan_pipelines(num_ranks, Schedule(num_steps=4, num_blocks=3))
    for changes, expected in (({}, offloads), ({"offload": "none"}, "none")):
        own = replace(config, model=replace(config.model, **changes))
        rank = PipelineRank(own, pipelines, pipeline.text_rank, None, HOME)  # type: ignore[arg-type]
        assert rank.embeddings is not None and rank.embeddings.offload == expected
        assert rank.embeddings.device == HOME


def failing(graph, inputs):
    raise RuntimeError("no compiler here\nand many more lines")


@pytest.fixture
def broken_compiler(monkeypatch):
    """Replace the compiler by one that fails, as Inductor does without a C++ compiler."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **_: compile(function, backend=failing))
    yield
    torch._dynamo.reset()


def test_layers_that_do_not_compile_run_uncompiled_with_one_note(broken_compiler, make_net, capsys):
    net = make_net(num_layers=2).requires_grad_(False)
    arguments = torch.randn(1, 4, 1, 4, 4), torch.tensor([500.0]), torch.randn(1, 5, 24)
    expected = net(*arguments)
    net.compile_layers()
    for _ in range(2):
        assert torch.equal(net(*arguments), expected)
    assert capsys.readouterr().err == "note: layers run uncompiled: RuntimeError: no compiler here\n"


def test_a_compile_error_without_a_message_is_named():
    assert compile_failure(torch._dynamo.exc.TorchDynamoException()) == "TorchDynamoException: "


def test_without_fallback_a_compile_error_is_raised(broken_compiler, make_net):
    net = make_net(num_layers=1).requires_grad_(False)
    net.compile_layers(fall_back=False)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="no compiler here"):
        net(torch.randn(1, 4, 1, 4, 4), torch.tensor([500.0]), torch.randn(1, 5, 24))
