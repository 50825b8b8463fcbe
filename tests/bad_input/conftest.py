"""Tools of the tables of bad input: every case runs in this process and must end with one line."""

from collections.abc import Callable

import pytest
from commands import World, run_main, write_world
from tiny_model import ROOT


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> World:
    """A tiny model, its configuration, and a file of two prompts."""
    return write_world(tmp_path_factory.mktemp("bad_input"), "a red circle\na blue square\n")


def run(main: Callable[[], None], words: tuple[object, ...]) -> tuple[int, str]:
    """Run a command's `main` in this process; return its exit code and what it printed to stderr."""
    result = run_main(main, *words)
    return result.code, result.err


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
