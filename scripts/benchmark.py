"""Measure speed, memory and operations of rollouts, decoding, text encoding and training; see docs/benchmarks.md.

python scripts/benchmark.py                                # the shipped miniature on a CPU, a minute or two
python scripts/benchmark.py --preset h100 --attention native _native_cudnn --compile on off
python scripts/benchmark.py --what training --iterations 100 --block_backward on off
python scripts/benchmark.py --output new.json --against old.json

Every combination of the options becomes a row of a Markdown table; JSON has the same with the spread.
"""

import argparse
import dataclasses
import itertools
import json
import platform
import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch._dynamo.exc import TorchDynamoException
from tqdm import tqdm

from benchmark.inference import (
    Networks,
    Watch,
    measure_decoder,
    measure_passes,
    measure_rollout,
    measure_text_encoder,
    peer_config,
)
from benchmark.measure import Effort, Figures, Spread, matmul_peak
from benchmark.training import measure_training
from model.compilation import compile_failure
from pipeline.output import device_name
from utils.config import Config, load_config
from utils.device import DTYPES, pick_device
from utils.errors import UserError, command
from utils.files import writable_folder, write_json


class Preset(NamedTuple):
    """A model and a size to measure at."""

    config: str
    training: str
    overrides: list[str]
    random: str = ""  # name of a DiT with random weights; empty: what the configuration names


PRESETS = {
    "shapes": Preset("configs/shapes.yaml", "configs/shapes/hiar.yaml", ["video.num_output_frames=30"]),
    "h100": Preset(
        "configs/hiar.yaml",
        "configs/hiar.yaml",
        ["video.num_output_frames=42", "runtime.device=cuda"],
        random="wan-1.3b",
    ),
}
ON = {"on": "true", "off": "false"}
KINDS = ["rollout", "baseline", "pass", "decoder", "text_encoder", "training"]

# Options that multiply: flag, key, choices or a type, and for which kinds it makes a difference.
ROLLOUTS = ("rollout", "baseline")
NETWORKS = (*ROLLOUTS, "pass", "decoder", "text_encoder")
OPTIONS: dict[str, tuple[str, Any, tuple[str, ...]]] = {
    "schedule": ("rollout.schedule", ["timestep_first", "block_first"], ("rollout",)),
    "order": ("rollout.order", ["step_major", "diagonal"], ("rollout",)),
    "fuse": ("rollout.fuse_context", ["on", "off"], ("rollout",)),
    "window": ("rollout.window", int, (*ROLLOUTS, "pass")),
    "frames": ("video.num_output_frames", int, ROLLOUTS),
    "size": ("video.height", str, (*NETWORKS[:-1], "training")),
    "dtype": ("model.dtype", list(DTYPES), NETWORKS),
    "attention": ("model.attention_backend", str, (*ROLLOUTS, "pass")),
    "compile": ("model.compile", ["on", "off"], (*ROLLOUTS, "pass")),
    "block_backward": ("distill.block_backward", ["on", "off"], ("training",)),
    "checkpointing": ("train.activation_checkpointing", ["on", "off"], ("training",)),
}
SWEPT_BY_DEFAULT = {"shapes": {"schedule": ["timestep_first", "block_first"], "fuse": ["on", "off"]}}


class Case(NamedTuple):
    """A row: what is measured, of which configuration."""

    kind: str
    config: Config
    settings: dict[str, str]


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="shapes")
    parser.add_argument("--config_path", help="measure the networks that this YAML names, instead of a preset's")
    parser.add_argument("--what", nargs="+", choices=KINDS, help="default: all but pass and training")
    for flag, (key, kind, _) in OPTIONS.items():
        choices = kind if isinstance(kind, list) else None
        parser.add_argument(f"--{flag}", nargs="+", choices=choices, metavar=None if choices else "X", help=key)
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=PASSES, help="of --what pass")
    parser.add_argument("--warmup", type=int, default=1, help="how often each is done before it is timed")
    parser.add_argument("--repeats", type=int, default=3, help="how often each is timed")
    parser.add_argument("--iterations", type=int, default=10, help="of --what training, after a few to warm up")
    parser.add_argument("--device", help="default: the preset's")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmark.json"), help="JSON; also after each row")
    parser.add_argument("--against", type=Path, help="an earlier JSON: also print ratios to it")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the configuration")
    # Taken out first: an option with several values would take them for its own.
    changes = [word for word in sys.argv[1:] if re.match(r"\w+\.\w+=", word)]
    args = parser.parse_intermixed_args([word for word in sys.argv[1:] if word not in changes])
    args.overrides += changes
    if args.repeats < 1 or args.warmup < 0:
        raise UserError("--repeats must be at least 1, and --warmup not negative")
    return args


PASSES = ["denoise", "context", "context+denoise"]


@command
def main() -> None:
    args = parse_arguments()
    preset = PRESETS[args.preset]
    if args.config_path:
        preset = Preset(args.config_path, args.config_path, [])
    before = read_results(args.against) if args.against else None
    cases = list(make_cases(args, preset))
    device = pick_device(cases[0].config.runtime.device)
    for config in {repr(case.config): case.config for case in cases if case.kind != "training"}.values():
        Networks(config, device, preset.random).check()
    writable_folder(args.output.parent)

    peak = cache(lambda dtype: matmul_peak(device, DTYPES[dtype]))
    results: list[dict[str, Any]] = []
    document = {"machine": describe(device), "matmul_peak": {}, "results": results}
    interval = 0.5 if sys.stderr.isatty() else 15
    for case in tqdm(cases, desc="rows", unit="row", mininterval=interval):
        dtype = (case.config.train if case.kind == "training" else case.config.model).dtype
        document["matmul_peak"][dtype] = peak(dtype)
        figures = measure(case, args, preset, device, peak(dtype))
        results.append({"what": case.kind, "settings": case.settings, "figures": to_json(figures)})
        compare_with_baseline(results)
        write_json(args.output, document, indent=1)
    print(report(document))
    if before is not None:
        print(ratios(results, before, str(args.against)))
    print(f"\nwrote {args.output}")


def make_cases(args: argparse.Namespace, preset: Preset) -> Iterator[Case]:
    """All combinations of the options that make a difference to what is asked for."""
    kinds = args.what or [kind for kind in KINDS if kind not in ("pass", "training")]
    swept = {} if args.config_path else SWEPT_BY_DEFAULT.get(args.preset, {})
    for kind in dict.fromkeys(kinds):
        flags = [flag for flag, (_, _, of) in OPTIONS.items() if kind in of]
        seen = set()
        for values in itertools.product(*(getattr(args, flag) or swept.get(flag) or [None] for flag in flags)):
            words = [word for flag, value in zip(flags, values, strict=True) for word in override(flag, value)]
            if args.device:
                words.append(f"runtime.device={args.device}")
            path, own = (preset.training, []) if kind == "training" else (preset.config, preset.overrides)
            config = load_config(path, [*own, *words, *args.overrides])
            if kind == "baseline":
                config = peer_config(config)
            if kind == "training":
                check_training(config, path, args.iterations)
            if config.rollout.schedule == "block_first":
                config.rollout.order = "step_major"  # one cache has one order
            settings = describe_settings(config, flags)
            if str(settings) not in seen:
                seen.add(str(settings))
                yield Case(kind, config, settings)


def check_training(config: Config, path: str, iterations: int) -> None:
    """Refuse what cannot be timed."""
    if config.train.objective != "score_distillation":
        raise UserError(f"{path} trains {config.train.objective or 'nothing'}; only score distillation is timed")
    if iterations < config.distill.generator_every:
        raise UserError(f"--iterations must be at least distill.generator_every={config.distill.generator_every}")


def override(flag: str, value: str | None) -> list[str]:
    """The configuration's words for one value of an option."""
    if value is None:
        return []
    if flag == "size":
        height, _, width = value.partition("x")
        if not (height.isdigit() and width.isdigit()):
            raise UserError(f"--size {value}: give HEIGHTxWIDTH in pixels, such as 480x832")
        return [f"video.height={height}", f"video.width={width}"]
    return [f"{OPTIONS[flag][0]}={ON.get(value, value)}"]


def describe_settings(config: Config, flags: list[str]) -> dict[str, str]:
    """What tells a row from others, in the words of the options."""
    settings = {}
    for flag in flags:
        section, key = OPTIONS[flag][0].split(".")
        value = getattr(getattr(config, section), key)
        settings[flag] = {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)
    if "size" in settings:
        settings["size"] = f"{config.video.height}x{config.video.width}"
    return settings


def measure(case: Case, args: argparse.Namespace, preset: Preset, device: torch.device, peak: float) -> Figures:
    """The figures of one row; none if the device's memory is too small for it, or it cannot be compiled."""
    networks, effort = Networks(case.config, device, preset.random), Effort(args.warmup, args.repeats)
    torch.compiler.reset()  # it compiles a function a few times at most, and then leaves it as it is
    try:
        if case.kind in ROLLOUTS:
            pipeline = networks.pipeline()
            runs = (effort.warmup + effort.repeats) * (2 if case.kind == "rollout" else 1) + 1
            label = " ".join(case.settings.values())
            with tqdm(total=runs * pipeline.num_ops(), desc=label, unit="op", leave=False, disable=None) as bar:
                watch = Watch(pipeline, lambda op: bar.update(), peer=case.kind == "baseline")
                return measure_rollout(watch, effort, peak)
        if case.kind == "pass":
            return measure_passes(networks, args.passes, effort, peak)
        if case.kind == "training":
            return measure_training(case.config, args.iterations, peak)
        around = measure_decoder if case.kind == "decoder" else measure_text_encoder
        return around(networks, effort, peak)
    except torch.OutOfMemoryError:
        why = "out of memory"
    except TorchDynamoException as error:
        why = f"cannot be compiled ({compile_failure(error)})"
    tqdm.write(f"{why}: {case.kind} {' '.join(case.settings.values())}", file=sys.stderr)
    return {}


def compare_with_baseline(results: list[dict[str, Any]]) -> None:
    """Note how many times as fast as the baseline of the same settings each rollout is."""
    for baseline in (r for r in results if r["what"] == "baseline" and r["figures"]):
        for rollout in (r for r in results if r["what"] == "rollout" and r["figures"]):
            if baseline["settings"].items() <= rollout["settings"].items():
                theirs, ours = (r["figures"]["fps_rollout"]["median"] for r in (baseline, rollout))
                rollout["figures"]["times_baseline"] = ours / theirs


def describe(device: torch.device) -> dict[str, str]:
    """The machine, and the command."""
    name = device_name(device)
    if device.type == "cpu":
        info = Path("/proc/cpuinfo")
        lines = info.read_text().splitlines() if info.exists() else []
        models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        name = f"{models[0] if models else platform.processor() or 'CPU'}, threads: {torch.get_num_threads()}"
    command = shlex.join(["python", *sys.argv])
    return {"device": name, "torch": torch.__version__, "date": date.today().isoformat(), "command": command}


# ---- Tables ----

# Figure: column title, factor, format.
COLUMNS: dict[str, tuple[str, float, str]] = {
    "denoise_pass": ("denoise pass, ms", 1e3, ".4g"),
    "context_pass": ("context pass, ms", 1e3, ".4g"),
    "context+denoise_pass": ("joint pass, ms", 1e3, ".4g"),
    "block": ("block, ms", 1e3, ".4g"),
    "pixel_frame": ("pixel frame, ms", 1e3, ".3g"),
    "prompt": ("prompt, ms", 1e3, ".3g"),
    "critic_iteration": ("critic's iteration, s", 1, ".3g"),
    "generator_iteration": ("iteration with generator, s", 1, ".3g"),
    "iterations_per_second": ("iterations/s", 1, ".3g"),
    "fps_rollout": ("FPS, rollout", 1, ".3g"),
    "fps_steady": ("FPS, full window", 1, ".3g"),
    "fps_decode": ("FPS, decoding", 1, ".3g"),
    "fps_video": ("FPS, video", 1, ".3g"),
    "first_frame": ("first frame, s", 1, ".3g"),
    "times_baseline": ("x baseline", 1, ".3g"),
    "critic_memory": ("memory, critic only, GB", 1e-9, ".3g"),
    "peak_memory": ("memory, GB", 1e-9, ".3g"),
    "parameters": ("parameters, 1e9", 1e-9, ".3g"),
    "cache": ("cache, GB", 1e-9, ".3g"),
    "flops": ("TFLOP", 1e-12, ".3g"),
    "share_of_peak": ("of peak", 100, ".0f"),
    "host_syncs": ("host syncs", 1, ".0f"),
}


def to_json(figures: Figures) -> dict[str, Any]:
    """Figures as JSON has them: a spread is a mapping."""
    return {name: dataclasses.asdict(f) if isinstance(f, Spread) else f for name, f in figures.items()}


def report(document: Mapping[str, Any]) -> str:
    """A Markdown table for each kind of row; rollouts share theirs with the baseline."""
    machine = document["machine"]
    peaks = ", ".join(f"{peak / 1e12:.3g} TFLOP/s in {dtype}" for dtype, peak in document["matmul_peak"].items())
    lines = [f"    {machine['command']}", "", f"{machine['device']}, torch {machine['torch']}, {machine['date']}."]
    lines += [f"Matrix products: {peaks}. Medians, with the smallest and largest in brackets."]
    for kinds in (ROLLOUTS, *((kind,) for kind in KINDS if kind not in ROLLOUTS)):
        rows = [row for row in document["results"] if row["what"] in kinds]
        if rows:
            lines += ["", *table(rows)]
    return "\n".join(lines)


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Rows of one kind, the settings that they all share above them."""
    names = list(dict.fromkeys(name for row in rows for name in row["settings"]))
    shared = [n for n in names if len({row["settings"].get(n) for row in rows if n in row["settings"]}) == 1]
    varied = [name for name in names if name not in shared]
    figures = [name for name in COLUMNS if any(row["figures"].get(name) is not None for row in rows)]
    values = {name: next(row["settings"][name] for row in rows if name in row["settings"]) for name in shared}
    head = ["", *varied, *(COLUMNS[name][0] for name in figures)]
    lines = [", ".join(f"{name} {value}" for name, value in values.items()), "", row_of(head), "|---" * len(head) + "|"]
    for row in rows:
        cells = [row["settings"].get(name, "") for name in varied]
        lines.append(row_of([row["what"], *cells, *(cell(name, row["figures"].get(name)) for name in figures)]))
    return lines


def row_of(cells: list[str]) -> str:
    """A line of a table."""
    return "| " + " | ".join(cells) + " |"


def cell(name: str, figure: Any) -> str:
    """A figure, with its spread where it was measured several times."""
    if figure is None:
        return "-"
    _, factor, form = COLUMNS[name]
    unit = "%" if name == "share_of_peak" else ""
    if not isinstance(figure, dict):
        return f"{figure * factor:{form}}{unit}"
    median, low, high = (f"{figure[key] * factor:{form}}" for key in ("median", "low", "high"))
    return median if low == high else f"{median} ({low}-{high})"


def ratios(results: list[dict[str, Any]], before: list[dict[str, Any]], name: str) -> str:
    """How each figure compares with the same row of an earlier run."""
    lines = ["", f"Against {name}:", "", row_of(["row", "figure", "then", "now", "now / then"]), "|---" * 5 + "|"]
    earlier = {(row["what"], str(sorted(row["settings"].items()))): row["figures"] for row in before}
    for row in results:
        then = earlier.get((row["what"], str(sorted(row["settings"].items()))), {})
        for key, now in row["figures"].items():
            if key in COLUMNS and now is not None and then.get(key) is not None:
                old, new = (f["median"] if isinstance(f, dict) else f for f in (then[key], now))
                ratio = f"{new / old:.3f}" if old else "-"
                label = " ".join([row["what"], *row["settings"].values()])
                lines.append(row_of([label, COLUMNS[key][0], cell(key, then[key]), cell(key, now), ratio]))
    return "\n".join(lines) if len(lines) > 5 else f"\nno row of {name} has the settings of this run's"


def read_results(path: Path) -> list[dict[str, Any]]:
    """The rows of an earlier run.

    Raises:
        UserError: if the file is something else.
    """
    try:
        rows = json.loads(path.read_text())["results"]
        [(row["what"], row["settings"].items(), row["figures"].items()) for row in rows]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no JSON of scripts/benchmark.py ({error})") from None
    return rows


if __name__ == "__main__":
    main()
