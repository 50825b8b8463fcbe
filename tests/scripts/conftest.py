"""Running a script in this process."""

import sys

import pytest


@pytest.fixture
def call(monkeypatch, capsys):
    """call(module, word, ...): run a script's main with these words; returns (exit code, stdout, stderr)."""

    def run(module, *words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, words)])
        code = 0
        try:
            module.main()
        except SystemExit as end:
            code = int(end.code or 0)
        return code, *capsys.readouterr()

    return run
