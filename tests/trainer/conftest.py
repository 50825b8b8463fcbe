"""Tiny things to train: a toy objective for the loop alone, and presets and data for the real objectives."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_model import TEXT_ENCODER, TRANSFORMER, VAE, write_model
from torch import Tensor, nn

from model import presets
from trainer.datasets.clips import write_shard
from trainer.datasets.ode_pairs import pair_file, write_ode_pair, write_sigmas
from trainer.objectives.base import SingleNetObjective
from utils.config import Config
from utils.process_group import process_group
from utils.rng import keyed_generator


@pytest.fixture(autouse=True, scope="session")
def group():
    """The group of one process that train.py would open."""
    with process_group(torch.device("cpu")):
        yield


CAPTIONS = ("a red circle", "a blue square", "a green triangle")


class Toy(SingleNetObjective):
    """Fit a random linear map by a net with a matrix and a vector, and a buffer that counts."""

    def __init__(self, width: int = 6):
        self.config = Config()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(width, 8), nn.Tanh(), nn.Linear(8, 1), Counter())
        self.iterations: list[int] = []
        self.exported: tuple[Path, dict[str, Tensor]] | None = None

    def loss(self, iteration: int, part: int) -> tuple[Tensor, dict[str, float]]:
        self.iterations.append(iteration)
        x = torch.randn(16, self.net[0].in_features, generator=keyed_generator("toy", iteration, part))
        loss = (self.net(x) - x.sum(1, keepdim=True)).square().mean()
        return loss, {"twice": 2.0 * iteration}

    def export(self, folder: Path, weights: dict[str, Tensor]) -> None:
        self.exported = folder, {name: weight.clone() for name, weight in weights.items()}


class Counter(nn.Module):
    """An integer buffer, as batch norm has one."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x


@pytest.fixture
def toy() -> type[Toy]:
    """The toy objective's class."""
    return Toy


@pytest.fixture
def tiny_presets(monkeypatch) -> str:
    """The name under which presets of tiny networks are known."""
    monkeypatch.setitem(presets.TRANSFORMERS, "tiny", TRANSFORMER)
    monkeypatch.setitem(presets.VAES, "tiny", VAE)
    monkeypatch.setitem(presets.TEXT_ENCODERS, "tiny", TEXT_ENCODER)
    return "tiny"


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """A tiny random model that nobody changes."""
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
    """Four ODE pairs of 5 points (4 steps and the end) of clips as above."""
    folder = tmp_path_factory.mktemp("pairs")
    for index in range(4):
        points = torch.randn(5, 6, 16, 4, 4, generator=torch.Generator().manual_seed(index))
        write_ode_pair(pair_file(folder, index), CAPTIONS[index % 3], points)
    write_sigmas(folder, [1.0, 0.9375, 0.8333, 0.625, 0.0])
    return folder


@pytest.fixture
def make_config(model) -> Callable[..., Config]:
    """make_config(data path, **changes to the train section): two clips per iteration, every one logged."""

    def make(path: Path | str = "", **train) -> Config:
        config = Config()
        config.model.base, config.model.text_length, config.model.dtype = str(model), 24, "float32"
        config.data.path = str(path)
        config.runtime.device = "cpu"
        small = dict(network="tiny", batch_size=2, max_iterations=6, warmup=2, log_every=1, checkpoint_every=2)
        for key, value in (small | train).items():
            assert hasattr(config.train, key), key
            setattr(config.train, key, value)
        return config

    return make
