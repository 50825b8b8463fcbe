"""Makefile: targets are listed, and a missing Python is reported in one line before anything is installed."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from pages import ROOT, text_of


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A folder with the Makefile, without a virtual environment."""
    for file in ("Makefile", "requirements.txt", "requirements-demo.txt", "requirements-dev.txt"):
        shutil.copy(ROOT / file, tmp_path)
    return tmp_path


def make(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["make", *words], cwd=folder, capture_output=True, text=True)


def test_help_lists_every_target(checkout):
    [targets] = re.findall(r"^\.PHONY: (.*)$", text_of(ROOT / "Makefile"), re.MULTILINE)
    listed = make(checkout, "help").stdout
    assert re.findall(r"^  make ([a-z-]+) ", listed, re.MULTILINE) == targets.split()
    assert make(checkout).stdout == listed


def test_a_missing_python_is_one_line(checkout):
    result = make(checkout, "demo", "PYTHON=false")
    lines = [line for line in result.stderr.splitlines() if not line.startswith("make")]
    assert result.returncode and len(lines) == 1 and "Python 3.11, 3.12 or 3.13" in lines[0]
    assert not (checkout / ".venv").exists()


def test_a_python_on_the_path_is_found(checkout):
    assert re.search(r"^python3(\.1[123])? -m venv", make(checkout, "-n", "demo").stdout, re.MULTILINE)
