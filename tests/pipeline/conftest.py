"""inference.py on a tiny random model, called in the process of the tests: importing torch takes seconds."""

import contextlib
import io
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
from tiny_model import write_config, write_model

import inference

PROMPTS = ("a red circle", "blue square 🎈 up/down\\left", "green triangle")


@dataclass(frozen=True)
class Result:
    """The exit code and the output of a command."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class World:
    """Files for command lines."""

    folder: Path
    model: Path
    config: Path
    prompts: Path


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> World:
    """A tiny model, its configuration, and a file of three prompts. Tests do not change it."""
    folder = tmp_path_factory.mktemp("world")
    model = write_model(folder / "model")
    (folder / "prompts.txt").write_text("\n\n".join(PROMPTS) + "\n  \n", encoding="utf-8")
    return World(folder, model, write_config(folder / "tiny.yaml", model), folder / "prompts.txt")


@pytest.fixture(scope="session")
def command() -> Callable[..., Result]:
    """command(word, ...): run inference.py with these words."""

    def run(*words: object) -> Result:
        out, err = io.StringIO(), io.StringIO()
        argv = ["inference.py", *map(str, words)]
        with mock.patch.object(sys, "argv", argv), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = 0
            try:
                inference.main()
            except SystemExit as end:
                code = int(end.code or 0)
        return Result(code, out.getvalue(), err.getvalue())

    return run


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
