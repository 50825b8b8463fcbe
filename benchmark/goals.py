"""Goals for the speed on a CPU, relative to the plain loop and to an older version."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from benchmark.cases import PRESETS, make_cases
from benchmark.checkouts import compare_videos
from benchmark.measure import Measurement, Repeats, Results
from benchmark.networks import BenchmarkNetworks
from benchmark.passes import PASSES
from benchmark.run import run_case
from utils.tables import markdown_table


class Ratio(NamedTuple):
    """A measured ratio: how many times as fast this code is."""

    work: str
    reference: str
    measured: Measurement
    goal: float = 0.0
    """Smallest median that meets the goal. 0: there is no goal."""


def pass_ratios(repeats: Repeats) -> Iterator[Ratio]:
    """Yield the speed of single passes, relative to the plain loop, at the miniature's size and at width 1536."""
    for preset, goal, label in (("shapes", 2.0, "the miniature"), ("wide", 1.25, "width 1536, 4 layers")):
        results = _run(preset, "pass", [], repeats)
        for name in PASSES:
            measured = results[f"times_plain_{name}"]
            assert isinstance(measured, Measurement)
            yield Ratio(f"{name} pass, {label}", "plain loop", measured, goal)


def rollout_ratios(repeats: Repeats) -> Iterator[Ratio]:
    """Yield the speed of rollouts of 21 frames, relative to the plain loop."""
    for schedule in ("block_first", "timestep_first"):
        measured = _run("shapes", "rollout", [schedule], repeats)["times_plain"]
        assert isinstance(measured, Measurement)
        yield Ratio(f"rollout of 21 frames, {schedule}", "plain loop", measured)


def video_ratios(old: Path, turns: int) -> Iterator[Ratio]:
    """Yield the speed of whole videos and of decoding, relative to another checkout or an earlier result file."""
    words = ["--what", "rollout", "decoder", "--schedule", "timestep_first", "block_first", "--fuse", "on"]
    words += ["--frames", "21", "--warmup", "1", "--repeats", "1"]
    for name, measured in compare_videos(old, words, turns).items():
        kind, _, schedule = name.partition(" ")
        if kind == "decoder":
            yield Ratio("decoding", str(old), measured, 2.0)
        else:
            yield Ratio(f"video of 21 frames, {schedule}", str(old), measured, 1.6)


def _run(preset: str, kind: str, schedules: Sequence[str], repeats: Repeats) -> Results:
    """Return the results of the only case of a preset."""
    values = {"schedule": schedules, "fuse": ["on"], "frames": ["21"]}
    [case] = make_cases(PRESETS[preset], [kind], values, [], iterations=0)
    tqdm.write(f"measuring: {preset} {case}")
    networks = BenchmarkNetworks(case.config, torch.device("cpu"), PRESETS[preset].random)
    return run_case(case, networks, repeats, 1.0, PASSES, 0)


def ratio_table(rows: Sequence[Ratio]) -> str:
    """Return a Markdown table of the ratios and their goals."""
    table = [["work", "relative to", "times as fast", "goal", "met"]]
    for work, reference, measured, goal in rows:
        text = f"{measured.median:.2f} ({measured.low:.2f}-{measured.high:.2f})"
        met = ("yes" if measured.median >= goal else "no") if goal else ""
        table.append([work, reference, text, f"{goal:g}" if goal else "", met])
    return markdown_table(table)
