"""Fixtures of tiny training runs: a toy objective, presets of tiny networks, and small data sets."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_model import TEXT_ENCODER, TINY_DECODER, TRANSFORMER, VAE, write_model
from toy import Toy

from model import presets
from trainer.datasets.clips import write_shard
from trainer.datasets.ode_pairs import pair_file, write_ode_pair, write_sigmas
from utils.config import Config
from utils.process_group import process_group


@pytest.fixture(autouse=True, scope="session")
def group():
    """The process group of one rank that train.py would open."""
    with process_group(torch.device("cpu")):
        yield


CAPTIONS = ("a red circle", "a blue square", "a green triangle")


@pytest.fixture
def toy() -> type[Toy]:
    """The toy objective's class."""
    return Toy


@pytest.fixture
def tiny_presets(monkeypatch) -> str:
    """The name of the registered presets of tiny networks."""
    monkeypatch.setitem(presets.TRANSFORMERS, "tiny", TRANSFORMER)
    monkeypatch.setitem(presets.VAES, "tiny", VAE)
    monkeypatch.setitem(presets.TEXT_ENCODERS, "tiny", TEXT_ENCODER)
    monkeypatch.setitem(presets.TINY_DECODERS, "tiny", TINY_DECODER)
    return "tiny"


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """A tiny random model; tests only read it."""
    return write_model(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="session")
def clips(tmp_path_factory) -> Path:
    """Six encoded clips of 6 latent frames of 4x4, in two shards."""
    folder = tmp_path_factory.mktemp("clips")
    for number in range(2):
        latents = torch.randn(3, 6, 16, 4, 4, generator=torch.Generator().manual_seed(number))
        write_shard(folder / f"{number}.safetensors", latents, CAPTIONS)
    return folder


@pytest.fixture(scope="session")
def pairs(tmp_path_factory) -> Path:
    """Four ODE pairs with 5 points (4 steps and the end) of such clips."""
    folder = tmp_path_factory.mktemp("pairs")
    for index in range(4):
        points = torch.randn(5, 6, 16, 4, 4, generator=torch.Generator().manual_seed(index))
        write_ode_pair(pair_file(folder, index), CAPTIONS[index % 3], points)
    write_sigmas(folder, [1.0, 0.9375, 0.8333, 0.625, 0.0])
    return folder


@pytest.fixture
def make_config(model) -> Callable[..., Config]:
    """make_config(data path, **train keys): a configuration with two clips per iteration, all logged."""

    def make(path: Path | str = "", **train) -> Config:
        config = Config()
        config.model.base, config.model.text_length, config.model.dtype = str(model), 24, "float32"
        config.data.path = str(path)
        config.runtime.device = "cpu"
        config.video.height = config.video.width = 32
        config.data.num_frames = 6
        small = dict(network="tiny", batch_size=2, max_iterations=6, warmup=2, log_every=1, checkpoint_every=2)
        for key, value in (small | train).items():
            assert hasattr(config.train, key), key
            setattr(config.train, key, value)
        return config

    return make
