"""inference.py on a tiny random model, called in the process of the tests: importing torch takes seconds."""

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import Result, World, run_main, write_world

import inference

PROMPTS = ("a red circle", "blue square 🎈 up/down\\left", "green triangle")


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> World:
    """A tiny model, its configuration, and a file of three prompts. Tests do not change it."""
    return write_world(tmp_path_factory.mktemp("world"), "\n\n".join(PROMPTS) + "\n  \n")


@pytest.fixture(scope="session")
def command() -> Callable[..., Result]:
    """command(word, ...): run inference.py with these words."""
    return functools.partial(run_main, lambda: inference.main(), name="inference.py")


@pytest.fixture(scope="session")
def infer(world, command) -> Callable[..., Result]:
    """infer(output folder, word, ...): make a video of each prompt (default: the three), and check the exit code."""

    def run(folder: Path, *words: object) -> Result:
        prompts = () if "--prompt" in words else ("--data_path", world.prompts)
        always = ("--config_path", world.config, *prompts, "--output_folder", folder)
        result = command(*always, "--save_latents", *words)
        assert result.code == 0, result.err
        return result

    return run


@pytest.fixture(scope="session")
def reference(tmp_path_factory, infer) -> Path:
    """The folder of an uninterrupted run over the three prompts, in step-major order. Tests do not change it."""
    folder = tmp_path_factory.mktemp("reference")
    infer(folder)
    return folder
