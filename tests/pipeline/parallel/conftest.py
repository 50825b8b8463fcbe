"""A tiny model with its inputs, and ranks that run the pipeline script on it."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rank_processes import RankPool, RankProcesses, read_latents_in
from safetensors.torch import save_file
from tiny_model import write_config

from utils.video import VideoWriter


@pytest.fixture(scope="session")
def inputs(world, tmp_path_factory) -> Path:
    """A folder with a configuration, prompts, and an image, a clip and latents to start from."""
    folder = tmp_path_factory.mktemp("inputs")
    write_config(folder / "tiny.yaml", world.model, video={"num_output_frames": 12})
    (folder / "one.txt").write_text("a red circle\n")
    (folder / "two.txt").write_text("a red circle\na blue square\n")
    (folder / "track.txt").write_text("1: a blue square\n1.1s: a green star\n")
    Image.new("RGB", (32, 32), (200, 40, 40)).save(folder / "start.png")
    Image.new("RGB", (50, 40), (40, 40, 200)).save(folder / "other.png")
    (folder / "pairs.json").write_text('{"start.png": "a red circle", "other.png": "a blue square"}')
    with VideoWriter(folder / "seven.mp4") as video:  # seven latent frames: the last block is short
        video.write(np.random.default_rng(1).integers(256, size=(25, 32, 32, 3), dtype=np.uint8))
    with VideoWriter(folder / "start.mp4") as video:  # two latent frames
        video.write(np.random.default_rng(0).integers(256, size=(5, 32, 32, 3), dtype=np.uint8))
    save_file({"latents": torch.randn(2, 16, 4, 4).half()}, folder / "start.safetensors")
    return folder


def arguments(inputs: Path, folder: Path, words: tuple) -> list:
    """Return the words of a command that writes videos and latents to a folder."""
    common = ["--config_path", inputs / "tiny.yaml", "--output_path", folder, "--save_latents"]
    prompts = [] if {"--prompt", "--data_path"} & set(words) else ["--data_path", inputs / "one.txt"]
    return [*common, *prompts, *words]


@pytest.fixture(scope="session")
def start(inputs) -> Callable[..., RankProcesses]:
    """start(folder, number of ranks, word, ..., **options of RankProcesses): start a run that is meant to fail."""

    def run(folder: Path, count: int, *words: object, **options: object) -> RankProcesses:
        return RankProcesses(folder, count, arguments(inputs, folder, words), **options)  # type: ignore[arg-type]

    return run


@pytest.fixture(scope="session")
def run_ranks(inputs) -> Iterator[Callable[..., str]]:
    """run_ranks(folder, number of ranks, word, ...): run all ranks successfully and return their output."""
    pool = RankPool()
    yield lambda folder, count, *words: pool.run(folder, count, arguments(inputs, folder, words))
    pool.close()


@pytest.fixture(scope="session")
def expected(inputs, command, tmp_path_factory) -> Callable[..., dict[str, torch.Tensor]]:
    """expected(word, ...): the latents that inference.py generates, by file stem; each command runs once."""
    made: dict[tuple, dict[str, torch.Tensor]] = {}

    def make(*words: object) -> dict[str, torch.Tensor]:
        if words not in made:
            folder = tmp_path_factory.mktemp("expected")
            renamed = {"--output_path": "--output_folder"}
            result = command(*(renamed.get(word, word) for word in arguments(inputs, folder, words)))
            assert result.code == 0, result.err
            made[words] = read_latents_in(folder)
        return made[words]

    return make
