"""Tools of the tables of bad input: every case runs in this process and must end with one line."""

import contextlib
import io
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
from tiny_model import ROOT, write_config, write_model


@dataclass(frozen=True)
class World:
    """Good files, of which tests make bad ones. Tests do not change them."""

    folder: Path
    model: Path
    config: Path
    prompts: Path


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> World:
    """A tiny model, its configuration, and a file of two prompts."""
    folder = tmp_path_factory.mktemp("bad_input")
    model = write_model(folder / "model")
    (folder / "prompts.txt").write_text("a red circle\na blue square\n", encoding="utf-8")
    return World(folder, model, write_config(folder / "tiny.yaml", model), folder / "prompts.txt")


def run(main: Callable[[], None], words: tuple[object, ...]) -> tuple[int, str]:
    """Run a command's `main` in this process; return its exit code and what it printed to stderr."""
    out, err = io.StringIO(), io.StringIO()
    argv = ["command", *map(str, words)]
    with mock.patch.object(sys, "argv", argv), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            return int(end.code or 0), err.getvalue()
    return 0, err.getvalue()


@pytest.fixture(scope="session")
def refuse() -> Callable[..., str]:
    """refuse(main, words, fragment): check that the command ends with one error line that holds the fragment.

    argparse prints its usage before the line; that is accepted. Notes before the error are accepted, too.
    """

    def check(main: Callable[[], None], words: tuple[object, ...], fragment: str = "") -> str:
        code, err = run(main, words)
        lines = [line for line in err.splitlines() if "error: " in line]
        assert code != 0, f"no error: {words}"
        assert "Traceback" not in err
        assert len(lines) == 1 and err.rstrip().endswith(lines[0]), err
        assert lines[0].startswith("error: ") or err.startswith("usage: "), err
        assert fragment in lines[0], f"{fragment!r} is not in {lines[0]!r}"
        return lines[0]

    return check


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch):
    """Relative paths of the shipped configurations are those of the repository."""
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="session")
def run_command() -> Callable[..., tuple[int, str]]:
    """run_command(main, words): the exit code of a command and what it printed to stderr."""
    return run
