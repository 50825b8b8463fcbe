"""The metrics of a run: printed, appended to metrics.jsonl, and sent to Weights & Biases (W&B)."""

import json
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from utils.config import Config
from utils.config_checks import is_number
from utils.distributed import rank
from utils.errors import UserError
from utils.files import open_own_file, refuse_device, writable_folder, write_text

METRICS_FILE = "metrics.jsonl"


class MetricsLog:
    """Log the mean of each metric every `train.log_every` iterations. Ranks other than 0 log nothing."""

    def __init__(self, logdir: Path, config: Config, iteration: int):
        """
        Args:
            iteration: the iteration that the run starts from. Later lines of the file are deleted: a killed run may
                have logged iterations after its last checkpoint.

        Raises:
            UserError: if W&B cannot start, or the file is a pipe or a device.
        """
        self.path = logdir / METRICS_FILE
        self.train = config.train
        self._first_iteration = iteration
        self._started = time.perf_counter()
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        self._wandb: Any = None
        if rank() > 0:
            return
        refuse_device(self.path)  # reading it might not end
        if self.path.exists():
            keep = [line for line in read_metrics(self.path) if line["iteration"] <= iteration]
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in keep))
        if self.train.wandb != "off":
            self._wandb = start_wandb(config, logdir)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._wandb is not None:
            self._wandb.finish()

    def write(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """Add the metrics of one iteration; every `train.log_every` iterations, log their means."""
        if rank() > 0:
            return
        for name, value in metrics.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
            self._counts[name] = self._counts.get(name, 0) + 1
        if iteration % self.train.log_every and iteration != self.train.max_iterations:
            return
        means = {name: total / self._counts[name] for name, total in self._sums.items()}
        self._sums, self._counts = {}, {}
        seconds = (time.perf_counter() - self._started) / (iteration - self._first_iteration)
        minutes_left = seconds * (self.train.max_iterations - iteration) / 60
        text = "  ".join(f"{name} {value:.4g}" for name, value in means.items())
        progress = f"{iteration}/{self.train.max_iterations}"
        print(f"{progress}  {text}  {seconds:.2f} s/it, {minutes_left:.0f} min left", flush=True)
        with open_own_file(self.path, "a") as file:
            file.write(json.dumps({"iteration": iteration, **means}) + "\n")
        if self._wandb is not None:
            self._wandb.log(means, step=iteration)

    def write_videos(self, iteration: int, folder: Path) -> None:
        """Send the sample videos of an iteration to W&B."""
        if self._wandb is not None:
            import wandb

            files = [path for path in sorted(folder.glob("*.mp4")) if path.is_file()]
            self._wandb.log({f"samples/{path.stem}": wandb.Video(str(path)) for path in files}, step=iteration)


def read_metrics(file: Path) -> list[dict[str, float]]:
    """Return the lines of a metrics.jsonl. Damaged lines, as of a killed run, are skipped with a note.

    Raises:
        OSError: if the file cannot be read.
    """
    texts = [text for text in file.read_text(encoding="utf-8", errors="replace").splitlines() if text.strip()]
    lines = [line for text in texts if (line := _parse_metrics(text)) is not None]
    if skipped := len(texts) - len(lines):
        print(f"note: {skipped} damaged line{'s' * (skipped > 1)} of {file} skipped", flush=True)
    return lines


def _parse_metrics(text: str) -> dict[str, float] | None:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or not all(map(is_number, line.values())):
        return None
    iteration = line.get("iteration")
    return line if isinstance(iteration, int) else None


def read_curves(logdir: Path, smooth: int = 1) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return the curve of each metric in a run's log file: iterations and values.

    Args:
        smooth: logged lines to average per point.

    Raises:
        UserError: if the file is missing or has no valid line.
    """
    file = logdir / METRICS_FILE
    try:
        lines = read_metrics(file)
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}; give the --logdir of a training run") from None
    if not lines and file.stat().st_size:
        raise UserError(f"{file} has no valid line; give the --logdir of a training run")
    points: dict[str, list[tuple[float, float]]] = {}
    for line in lines:
        for name, value in line.items():
            if name != "iteration":
                points.setdefault(name, []).append((line["iteration"], value))
    curves = {}
    for name, pairs in points.items():
        x, y = np.array(pairs).T
        chunks = np.array_split(np.arange(len(x)), max(1, len(x) // smooth))
        curves[name] = (np.array([x[c].mean() for c in chunks]), np.array([y[c].mean() for c in chunks]))
    return curves


# ---- W&B ----


def check_wandb(mode: str) -> None:
    """Check that W&B has credentials, without prompting for them.

    Args:
        mode: value of `train.wandb`.

    Raises:
        UserError: if an online run has no credentials.
    """
    if mode == "online" and rank() == 0:
        import wandb

        if not wandb.login(prompt=False):
            raise UserError(
                "train.wandb=online needs credentials; set WANDB_API_KEY, or use train.wandb=offline or train.wandb=off"
            )


def start_wandb(config: Config, logdir: Path) -> Any:
    """Start a W&B run, or resume the one of this log folder.

    Raises:
        UserError: if W&B cannot start.
    """
    import wandb

    train = config.train
    try:
        return wandb.init(
            project=train.project,
            name=logdir.name,
            id=wandb_run_id(logdir),
            resume="allow",
            dir=writable_folder(train.wandb_dir or logdir),
            mode=train.wandb,
            config={"yaml": config.to_yaml()},
        )
    except wandb.Error as error:
        raise UserError(f"W&B cannot start ({error}); train.wandb=offline logs to the disk instead") from None


def wandb_run_id(logdir: Path) -> str:
    """Return the W&B run ID that the log folder stores, so that a resumed run continues the same W&B run."""
    file = logdir / "wandb_id"
    if not file.exists():
        write_text(file, secrets.token_hex(8))
    return file.read_text()
