"""The report of a benchmark run: results as JSON and Markdown tables, and their ratios to an earlier run."""

import dataclasses
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmark.cases import KINDS
from benchmark.measure import Measurement, Results
from pipeline.output import device_name
from utils.errors import UserError
from utils.files import read_json
from utils.tables import markdown_table


class Column(NamedTuple):
    """A column of the table: its title, the factor to its unit, and the number format."""

    title: str
    factor: float
    format: str


COLUMNS = {
    "denoise_pass": Column("denoise pass, ms", 1e3, ".4g"),
    "context_pass": Column("context pass, ms", 1e3, ".4g"),
    "context+denoise_pass": Column("joint pass, ms", 1e3, ".4g"),
    "batch_pass": Column("batched pass, ms", 1e3, ".4g"),
    "block": Column("block, ms", 1e3, ".4g"),
    "pixel_frame": Column("pixel frame, ms", 1e3, ".3g"),
    "prompt": Column("prompt, ms", 1e3, ".3g"),
    "critic_iteration": Column("critic's iteration, s", 1, ".3g"),
    "generator_iteration": Column("iteration with generator, s", 1, ".3g"),
    "iterations_per_second": Column("iterations/s", 1, ".3g"),
    "fps_rollout": Column("FPS, rollout", 1, ".3g"),
    "fps_steady": Column("FPS, full window", 1, ".3g"),
    "fps_decode": Column("FPS, decoding", 1, ".3g"),
    "fps_video": Column("FPS, video", 1, ".3g"),
    "first_frame": Column("first frame, s", 1, ".3g"),
    "times_baseline": Column("x no cache", 1, ".3g"),
    "plain_denoise_pass": Column("plain denoise pass, ms", 1e3, ".4g"),
    "times_plain_denoise": Column("x plain, denoise", 1, ".3g"),
    "plain_context_pass": Column("plain context pass, ms", 1e3, ".4g"),
    "times_plain_context": Column("x plain, context", 1, ".3g"),
    "plain_context+denoise_pass": Column("plain joint pass, ms", 1e3, ".4g"),
    "times_plain_context+denoise": Column("x plain, joint", 1, ".3g"),
    "plain_block": Column("plain block, ms", 1e3, ".4g"),
    "times_plain": Column("x plain", 1, ".3g"),
    "critic_memory": Column("memory, critic only, GB", 1e-9, ".3g"),
    "peak_memory": Column("memory, GB", 1e-9, ".3g"),
    "parameters": Column("parameters, 1e9", 1e-9, ".3g"),
    "cache": Column("cache, GB", 1e-9, ".3g"),
    "flops": Column("TFLOP", 1e-12, ".3g"),
    "share_of_peak": Column("of peak", 1, ".0%"),
    "kernels": Column("kernels", 1, ".0f"),
    "elementwise_kernels": Column("elementwise kernels", 1, ".0f"),
    "bytes": Column("traffic, GB", 1e-9, ".3g"),
    "elementwise_bytes": Column("elementwise traffic, GB", 1e-9, ".3g"),
    "host_syncs": Column("host syncs", 1, ".0f"),
    "device_mismatches": Column("device mismatches", 1, ".0f"),
}
Row = dict[str, Any]
"""A case in JSON, with the keys `what` (its kind), `settings` and `figures` (its results by name)."""


def describe_machine(device: torch.device) -> dict[str, str]:
    """Return the device, the torch version, the date and the command line."""
    name = device_name(device)
    if device.type == "cpu":
        info = Path("/proc/cpuinfo")
        lines = info.read_text().splitlines() if info.exists() else []
        models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        name = f"{models[0] if models else platform.processor() or 'CPU'}, threads: {torch.get_num_threads()}"
    command = shlex.join(["python", *sys.argv])
    return {"device": name, "torch": torch.__version__, "date": date.today().isoformat(), "command": command}


def to_json(results: Results) -> dict[str, Any]:
    """Return results as JSON values; a measurement becomes a mapping."""
    return {name: dataclasses.asdict(r) if isinstance(r, Measurement) else r for name, r in results.items()}


def add_speedups(rows: Sequence[Row]) -> None:
    """Add the result `times_baseline`, the speed relative to the baseline with the same settings, to each rollout."""
    for baseline in (row for row in rows if row["what"] == "baseline" and row["figures"]):
        for rollout in (row for row in rows if row["what"] == "rollout" and row["figures"]):
            if baseline["settings"].items() <= rollout["settings"].items():
                reference, speed = (row["figures"]["fps_rollout"]["median"] for row in (baseline, rollout))
                rollout["figures"]["times_baseline"] = speed / reference


def markdown_report(document: Mapping[str, Any]) -> str:
    """Return the Markdown report: the machine, then one table per kind of case; rollouts and baselines share a table.

    Args:
        document: `machine`, `attention` (lines), `matmul_peak` (FLOP/s by dtype) and `results` (rows), as in the JSON
            file.
    """
    machine = document["machine"]
    peaks = ", ".join(f"{peak / 1e12:.3g} TFLOP/s in {dtype}" for dtype, peak in document["matmul_peak"].items())
    lines = [f"    {machine['command']}", "", f"{machine['device']}, torch {machine['torch']}, {machine['date']}."]
    lines += [f"Matrix products: {peaks}. Cells: median (smallest-largest)."] if peaks else []
    lines += document.get("attention", [])
    for kinds in (KINDS[:2], *((kind,) for kind in KINDS[2:])):
        rows = [row for row in document["results"] if row["what"] in kinds]
        if rows:
            lines += ["", *results_table(rows)]
    return "\n".join(lines)


def results_table(rows: Sequence[Row]) -> list[str]:
    """Return the settings that all rows share, and a Markdown table of the other settings and the results, as lines."""
    names = list(dict.fromkeys(name for row in rows for name in row["settings"]))
    values = {name: {row["settings"][name] for row in rows if name in row["settings"]} for name in names}
    varied = [name for name in names if len(values[name]) > 1]
    columns = [name for name in COLUMNS if any(row["figures"].get(name) is not None for row in rows)]
    table = [["", *varied, *(COLUMNS[name].title for name in columns)]]
    for row in rows:
        settings = [row["settings"].get(name, "") for name in varied]
        table.append([row["what"], *settings, *(format_result(name, row["figures"].get(name)) for name in columns)])
    shared = ", ".join(f"{name} {value}" for name in names if len(values[name]) == 1 for value in values[name])
    return [shared, "", markdown_table(table)]


def format_result(name: str, result: Any) -> str:
    """Return a result as text, with its range if it was measured several times."""
    if result is None:
        return "-"
    _, factor, form = COLUMNS[name]
    if not isinstance(result, dict):
        return f"{result * factor:{form}}"
    median, low, high = (f"{result[key] * factor:{form}}" for key in ("median", "low", "high"))
    return median if low == high else f"{median} ({low}-{high})"


def comparison_table(rows: Sequence[Row], earlier: Sequence[Row], name: str) -> str:
    """Return a Markdown table with the ratio of each result to that of the same case in an earlier run.

    Args:
        earlier: rows of the earlier run.
        name: file of the earlier run, for the title.
    """

    def row_key(row: Row) -> tuple[str, str]:
        return row["what"], str(sorted(row["settings"].items()))

    results_before = {row_key(row): row["figures"] for row in earlier}
    table = [["row", "figure", "then", "now", "now / then"]]
    for row in rows:
        before = results_before.get(row_key(row), {})
        for key, now in row["figures"].items():
            if key in COLUMNS and now is not None and before.get(key) is not None:
                old, new = (r["median"] if isinstance(r, dict) else r for r in (before[key], now))
                ratio = f"{new / old:.3f}" if old else "-"
                label = " ".join([row["what"], *row["settings"].values()])
                cells = (format_result(key, before[key]), format_result(key, now), ratio)
                table.append([label, COLUMNS[key].title, *cells])
    if len(table) == 1:
        return f"\nno row of {name} has the settings of this run"
    return f"\nAgainst {name}:\n\n{markdown_table(table)}"


def read_rows(path: Path) -> list[Row]:
    """Return the rows of an earlier run.

    Raises:
        UserError: if the file is missing or is not a result file.
    """
    content = read_json(path, "result file of scripts/benchmark.py")
    try:
        rows = content["results"]
        [(row["what"], row["settings"].items(), row["figures"].items()) for row in rows]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a result file of scripts/benchmark.py ({error})") from None
    return rows
