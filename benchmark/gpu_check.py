"""Everything that only a GPU can show, in ten minutes: tests, tables, memory and a profile, as one report."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from utils.config import Config
from utils.files import write_json, write_text

ROOT = Path(__file__).resolve().parents[1]
BENCHMARK = "scripts/benchmark.py"
TAIL = 40  # lines of the error output of a failed part


class Part(NamedTuple):
    """A command of the check."""

    name: str
    seconds: int
    """Time limit."""
    words: list[str]
    """Arguments of Python."""
    results: Path | None = None
    """JSON file that the command writes."""


class Outcome(NamedTuple):
    """What happened to a part. `status`: passed, failed, timed out, or not available."""

    part: Part
    status: str
    seconds: float
    output: str
    errors: str


def check_parts(device: str, small: bool, folder: Path) -> list[Part]:
    """Return all parts.

    Args:
        small: the miniature and few repeats instead of Wan2.1-1.3B, to try the check on a CPU.
        folder: where the parts write.
    """
    preset = ["--preset", "shapes" if small else "h100", "--device", device]
    repeats = ["--repeats", "1", "--warmup", "0"] if small else ["--repeats", "10", "--warmup", "3"]
    once = ["--repeats", "1", "--warmup", "0" if small else "1"]
    steps = ["rollout.denoising_step_list=[1000,500]"] if small else []
    train = ["data.num_frames=6", "distill.max_rollout_frames=6", "train.batch_size=1", "train.total_batch_size=1"]

    def measure(name: str, seconds: int, *words: str) -> Part:
        results = folder / f"{name.replace(' ', '_').replace(',', '')}.json"
        return Part(name, seconds, [BENCHMARK, *words, "--output", str(results)], results)

    def passes(name: str, seconds: int, *words: str) -> Part:
        return measure(name, seconds, "--what", "pass", *preset, *repeats, *words, *steps)

    pipeline = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    pipeline += ["scripts/pipeline_parallel_inference.py", "--config_path", "configs/shapes.yaml", "--overwrite"]
    pipeline += ["--prompt", "a red circle", "--num_output_frames", "6", "--output_path", str(folder / "pipeline")]
    frames = ["--frames", "6"] if small else []
    eight_bits = "int8" if small else "fp8"
    trained = ["distill.generator_every=1", "--iterations", "1", *train] if small else ["--iterations", "5"]
    return [
        Part("tests", 85, ["-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", *GPU_TESTS]),
        passes("passes, eager", 55, "--attention", *(["native"] if small else ["native", "auto"]), "--compile", "off"),
        passes("passes, compiled", 70, "--no-plain", "--attention", "auto", "--compile", "on"),
        passes("passes, CUDA graphs", 45, "--no-plain", "--attention", "auto", "model.cuda_graphs=true"),
        passes("passes, 8-bit layers", 45, "--no-plain", "--attention", "auto", f"model.quantization={eight_bits}"),
        passes("passes, FP8 caches", 25, "--no-plain", "rollout.cache_dtype=float8_e4m3fn"),
        measure("rollouts", 65, "--what", "rollout", *preset, *once, "--fuse", "on", *frames, *steps,
                "--schedule", "block_first", "timestep_first"),
        measure("decoder", 25, "--what", "decoder", *preset, *repeats),
        Part("pipeline of one rank", 30, [*pipeline, *steps, f"runtime.device={device}"]),
        measure("training, FSDP2", 40, "--what", "training", "--preset", "shapes", "--device", device, *trained,
                "train.sharding=shard", "train.compile=false"),
        *(memory_part(file, measure, [*preset, *steps]) for file in sorted((ROOT / "configs/gpu").glob("*.yaml"))),
        Part("profile", 30, ["scripts/profile_pass.py", *preset, "--output", str(folder / "profile.json")]),
    ]  # fmt: skip


GPU_TESTS = ["tests/model/test_gpu_attention.py", "tests/pipeline/test_gpu_rollout.py"]


MEMORY_RUN = [
    "--repeats",
    "1",
    "--warmup",
    "0",
    "--no-plain",
    "--fuse",
    "on",
    "--schedule",
    "timestep_first",
    "--compile",
    "off",
]


def memory_part(file: Path, measure: Callable[..., Part], words: Sequence[str]) -> Part:
    """Return the part that measures the memory of a video of 21 frames with the options of a file in configs/gpu/."""
    sections = yaml.safe_load(file.read_text()) or {}
    overrides = [f"{s}.{key}={value}" for s in ("model", "rollout") for key, value in sections.get(s, {}).items()]
    kept = [word for word in overrides if not word.startswith(("model.base=", "model.generator="))]
    return measure(f"memory, {file.stem}", 20, "--what", "rollout", "--frames", "21", *MEMORY_RUN, *words, *kept)


def is_available(part: Part) -> bool:
    """Return whether this version has all configuration keys of a part."""
    keys = {f"{section.name}.{key.name}" for section in fields(Config) for key in fields(section.type)}  # type: ignore
    words = [word.split("=")[0] for word in part.words if "=" in word and not word.startswith("-")]
    return all(word in keys for word in words)


def run_part(part: Part, patience: float = 1) -> Outcome:
    """Run a part in a new process, and end its processes when its time is over.

    Args:
        patience: factor on the time limit.
    """
    if not is_available(part):
        return Outcome(part, "not available", 0, "", "")
    start = time.perf_counter()
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "TQDM_DISABLE": "1"}
    process = subprocess.Popen(
        [sys.executable, *part.words], cwd=ROOT, env=environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    status = ""
    try:
        output, errors = process.communicate(timeout=patience * part.seconds)
    except subprocess.TimeoutExpired:
        status = "timed out"
        os.killpg(process.pid, signal.SIGKILL)
        output, errors = process.communicate()
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    status = status or ("passed" if process.returncode == 0 else "failed")
    return Outcome(part, status, time.perf_counter() - start, output, errors)


def write_report(outcomes: Sequence[Outcome], machine: dict[str, str], folder: Path) -> None:
    """Write the outcomes so far as report.md and report.json."""
    lines = ["# GPU check", "", f"{machine['device']}, torch {machine['torch']}, {machine['date']}", ""]
    document: list[dict[str, Any]] = []
    for part, status, seconds, output, errors in outcomes:
        command = " ".join(["python", *part.words])
        lines += [f"## {part.name}: {status}, {seconds:.0f} s", "", f"    {command}", ""]
        lines += [line for line in output.strip("\n").splitlines() if not line.startswith(("    python", "wrote "))]
        if status in ("failed", "timed out"):
            lines += ["", "```", *errors.strip().splitlines()[-TAIL:], "```"]
        lines.append("")
        results = None
        if part.results and part.results.exists():
            results = json.loads(part.results.read_text())
        document.append({"part": part.name, "status": status, "seconds": round(seconds, 1), "command": command,
                         "results": results})  # fmt: skip
    write_text(folder / "report.md", "\n".join(lines))
    write_json(folder / "report.json", {"machine": machine, "parts": document}, indent=1)
