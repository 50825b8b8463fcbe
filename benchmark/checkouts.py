"""Comparison of whole videos with those of another checkout of this repository, or with an earlier result file."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmark.measure import Measurement
from benchmark.report import Row, read_rows
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = Path("scripts/benchmark.py")
SPEEDS = {"rollout": "fps_video", "decoder": "fps_decode"}
"""Kinds of rows that are compared, and the result that is."""


def compare_videos(old: Path, words: Sequence[str], turns: int) -> dict[str, Measurement]:
    """Return how many times as fast videos and decoding are as in an older version.

    Args:
        old: another checkout, or a JSON file of an earlier run. Benchmarks of two checkouts run in turns.
        words: arguments of scripts/benchmark.py, which both versions accept.
        turns: runs of each version.

    Returns:
        The ratios by name: the kind of row and its schedule.

    Raises:
        UserError: if a benchmark fails.
    """
    if old.is_dir():
        pairs = [(run_benchmark(old, words), run_benchmark(ROOT, words)) for _ in range(turns)]
    else:
        earlier = speeds(read_rows(old))
        pairs = [(earlier, run_benchmark(ROOT, words)) for _ in range(turns)]
    names = [name for name in pairs[0][1] if name in pairs[0][0]]
    return {name: Measurement.of(new[name] / before[name] for before, new in pairs) for name in names}


def check_old(old: Path) -> None:
    """Check the argument of `compare_videos`.

    Raises:
        UserError: if it is neither a checkout nor a result file.
    """
    if not old.is_dir():
        read_rows(old)
    elif not (old / SCRIPT).is_file():
        raise UserError(f"{old} is no checkout of this repository: it has no {SCRIPT}")


def run_benchmark(checkout: Path, words: Sequence[str]) -> dict[str, float]:
    """Run the benchmark of a checkout in a new process and return the `speeds` of its rows.

    Raises:
        UserError: if the benchmark fails.
    """
    script = checkout / SCRIPT
    # Checkouts before the plain loop do not have this flag.
    words = [*words, *(["--no-plain"] if '"--plain"' in script.read_text() else [])]
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "results.json"
        command = [sys.executable, str(SCRIPT), *words, "--output", str(output)]
        done = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
        if done.returncode:
            lines = [*done.stderr.splitlines(), "no message"]
            raise UserError(f"{checkout / SCRIPT} failed: {next((x for x in lines if 'rror' in x), lines[-1])}")
        return speeds(json.loads(output.read_text())["results"])


def speeds(rows: Iterable[Row]) -> dict[str, float]:
    """Return the frames per second of rows by kind and schedule; of several such rows, those of the fastest."""
    found: dict[str, float] = {}
    for row in rows:
        figure = SPEEDS.get(row["what"])
        if figure and row["figures"].get(figure):
            name = " ".join([row["what"], row["settings"].get("schedule", "")]).strip()
            found[name] = max(found.get(name, 0), row["figures"][figure]["median"])
    return found
