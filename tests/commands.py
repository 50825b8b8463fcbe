"""Commands called in the process of the tests (importing torch takes seconds), and the files that they read."""

import contextlib
import io
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from tiny_model import write_config, write_model


@dataclass(frozen=True)
class Result:
    """The exit code and the output of a command."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class World:
    """Files for command lines. Tests do not change them."""

    folder: Path
    model: Path
    config: Path
    prompts: Path


def write_world(folder: Path, prompts: str) -> World:
    """Write a tiny model, its configuration and a file with the text `prompts` to a folder."""
    model = write_model(folder / "model")
    (folder / "prompts.txt").write_text(prompts, encoding="utf-8")
    return World(folder, model, write_config(folder / "tiny.yaml", model), folder / "prompts.txt")


def run_main(main: Callable[[], None], *words: object, name: str = "command") -> Result:
    """Run a command's `main` with these words; `name` is its file name in sys.argv."""
    out, err = io.StringIO(), io.StringIO()
    argv = [name, *map(str, words)]
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    with mock.patch.object(sys, "argv", argv), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = 0
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        finally:  # pipeline ranks block Ctrl-C in the main thread; later tests and their processes need it
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    return Result(code, out.getvalue(), err.getvalue())
