"""Commands on a tiny model in processes of their own, for the kills and the full disks of this folder.

All processes are forked from one server that has imported everything, so a start takes no seconds.
"""

import contextlib
import importlib
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/pipeline/parallel")]
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tiny_model", "pipeline.generate", "pipeline.parallel.runner", "trainer.trainer"])
TIMEOUT = 300  # seconds of one command
VOLATILE = ("seconds", "command")  # keys of a video's metadata that differ between runs


@dataclass(frozen=True)
class Command:
    """A command that is started, killed and started again."""

    name: str
    module: str
    ranks: int
    words: Callable[[Path], list[str]]
    """words(folder): the command line that writes to `folder`."""


def run_process(module: str, words: list[str], environment: dict[str, str], log: str) -> None:
    """Run a command's main() as one process, with its output in a file."""
    import torch
    from tiny_model import TEXT_ENCODER, TRANSFORMER, VAE

    from model import presets

    for table, preset in (
        (presets.TRANSFORMERS, TRANSFORMER),
        (presets.VAES, VAE),
        (presets.TEXT_ENCODERS, TEXT_ENCODER),
    ):
        table["tiny"] = preset
    os.environ.update(environment)
    torch.set_num_threads(1)
    with open(log, "a", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = [module, *words]
    importlib.import_module(module).main()


@contextlib.contextmanager
def started(command: Command, folder: Path, log: Path | None = None) -> Iterator[list[Any]]:
    """Start the processes of a command; kill those that remain at the end of the `with` block."""
    from rank_processes import environments

    log = log or folder.with_suffix(".log")
    words = command.words(folder)
    settings = environments(command.ranks) if command.ranks > 1 else [{}]
    processes = [
        CONTEXT.Process(target=run_process, args=(command.module, words, environment, str(log)), daemon=True)
        for environment in settings
    ]
    for process in processes:
        process.start()
    try:
        yield processes
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()


def run(command: Command, folder: Path, log: Path | None = None) -> tuple[list[int | None], str]:
    """Run a command to its end; return the exit codes of its processes and what they printed."""
    log = log or folder.with_suffix(".log")
    log.unlink(missing_ok=True)
    end = time.monotonic() + TIMEOUT
    with started(command, folder, log) as processes:
        for process in processes:
            process.join(max(0.0, end - time.monotonic()))
        codes = [process.exitcode for process in processes]
    return codes, log.read_text()


def contents(folder: Path) -> dict[str, bytes]:
    """Return the files of a run, without what may differ between runs; checkpoints are compared as tensors."""
    from trainer.checkpoints import read_tensors

    found: dict[str, bytes] = {}
    for file in sorted(file for file in folder.rglob("*") if file.is_file() and ".lock" not in file.name):
        name = str(file.relative_to(folder))
        if file.parent.parent.name == "checkpoints":
            if file.name == ".metadata":
                tensors = read_tensors(file.parent, "")
                found |= {f"{name} {key}": tensor.numpy().tobytes() for key, tensor in sorted(tensors.items())}
        elif file.suffix == ".json" and file.with_suffix(".png").exists():
            record = {key: value for key, value in json.loads(file.read_text()).items() if key not in VOLATILE}
            found[name] = json.dumps(record).encode()
        else:
            found[name] = file.read_bytes()
    return found


def make_commands(folder: Path) -> list[Command]:
    """Write a tiny model, its configurations and data; return the three commands."""
    import torch
    from tiny_model import write_config, write_model

    from trainer.datasets.clips import write_shard

    model = write_model(folder / "model")
    captions = ("a red circle", "a blue square", "a green triangle")
    (folder / "prompts.txt").write_text("\n".join(captions) + "\n")
    latents = torch.randn(3, 6, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    (folder / "clips").mkdir()
    write_shard(folder / "clips/0.safetensors", latents, captions)
    videos = str(write_config(folder / "videos.yaml", model))
    train = dict(objective="flow_matching", network="tiny", batch_size=2, max_iterations=12, warmup=2)
    train |= dict(log_every=1, checkpoint_every=2, optimizer="muon")
    training = str(write_config(folder / "train.yaml", model, train=train, data={"path": str(folder / "clips")}))
    made = ["--config_path", videos, "--data_path", str(folder / "prompts.txt"), "--save_latents"]

    def train_words(target: Path) -> list[str]:
        return ["--config_path", training, "--logdir", str(target)]

    script = "scripts.pipeline_parallel_inference"
    return [
        Command("inference", "inference", 1, lambda target: [*made, "--output_folder", str(target)]),
        Command("pipeline", script, 3, lambda target: [*made, "--output_path", str(target)]),
        Command("training", "train", 1, train_words),
    ]
