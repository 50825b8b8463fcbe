"""The metrics of a run: printed, written to metrics.jsonl, and sent to Weights & Biases."""

import json
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from utils.config import Config, TrainConfig
from utils.distributed import rank
from utils.errors import UserError
from utils.files import writable_folder, write_text


def check_wandb(mode: str) -> None:
    """Find out, before anything is loaded, whether a run can be logged to W&B as `train.wandb` says.

    Raises:
        UserError: if online runs have no credentials. Nobody is asked for any.
    """
    if mode == "online" and rank() == 0:
        import wandb

        if not wandb.login(prompt=False):
            raise UserError(
                "train.wandb=online finds no credentials for W&B; set WANDB_API_KEY, or train.wandb=offline or off"
            )


def run_id(logdir: Path) -> str:
    """W&B's name for the run, kept in its folder, so that a run that goes on is one run there too."""
    file = logdir / "wandb_id"
    if not file.exists():
        write_text(file, secrets.token_hex(8))
    return file.read_text()


class MetricsLog:
    """Means of the metrics since the last line: on the console, in logdir/metrics.jsonl, and to W&B if asked."""

    def __init__(self, logdir: Path, train: TrainConfig, config: Config, iteration: int):
        self.path = logdir / "metrics.jsonl"
        self.train = train
        self.sums: dict[str, float] = {}
        self.counts: dict[str, int] = {}
        self.started = time.perf_counter()
        self.first_iteration = iteration
        self.wandb: Any = None
        if rank() > 0:
            return
        # A killed run may have logged iterations that were lost with it.
        if self.path.exists():
            lines = self.path.read_text().splitlines()
            keep = [line for line in lines if line.endswith("}") and json.loads(line)["iteration"] <= iteration]
            write_text(self.path, "".join(line + "\n" for line in keep))
        if train.wandb != "off":
            import wandb

            try:
                self.wandb = wandb.init(
                    project=train.project,
                    name=logdir.name,
                    id=run_id(logdir),
                    resume="allow",
                    dir=writable_folder(train.wandb_dir or logdir),
                    mode=train.wandb,
                    config={"yaml": config.to_yaml()},
                )
            except wandb.Error as error:
                raise UserError(f"W&B cannot start ({error}); train.wandb=offline keeps its log on the disk") from None

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *exception: object) -> None:
        if self.wandb is not None:
            self.wandb.finish()

    def write(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """Take in one iteration's metrics; every `log_every` iterations write a line."""
        if rank() > 0:
            return
        for name, value in metrics.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0) + 1
        if iteration % self.train.log_every and iteration != self.train.max_iterations:
            return
        means = {name: value / self.counts[name] for name, value in self.sums.items()}
        seconds = (time.perf_counter() - self.started) / (iteration - self.first_iteration)
        left = seconds * (self.train.max_iterations - iteration)
        text = "  ".join(f"{name} {value:.4g}" for name, value in means.items())
        print(
            f"{iteration}/{self.train.max_iterations}  {text}  {seconds:.2f} s/it, {left / 60:.0f} min left", flush=True
        )
        with self.path.open("a") as file:
            file.write(json.dumps({"iteration": iteration, **means}) + "\n")
        if self.wandb is not None:
            self.wandb.log(means, step=iteration)
        self.sums, self.counts = {}, {}

    def write_videos(self, iteration: int, folder: Path) -> None:
        """Send the sample videos of an iteration to W&B, if that is asked for."""
        if self.wandb is not None:
            import wandb

            files = [path for path in sorted(folder.glob("*.mp4")) if path.is_file()]
            self.wandb.log({f"samples/{path.stem}": wandb.Video(str(path)) for path in files}, step=iteration)
