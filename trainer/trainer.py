"""The one training loop: optimizer, EMA, checkpoints, logging. What is learned is the objective's business."""

import contextlib
import json
import math
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from trainer.muon import Muon
from utils.config import Config, TrainConfig
from utils.distributed import rank, sum_over_processes, world_size
from utils.errors import UserError
from utils.files import atomic_path, writable_folder


class Objective(Protocol):
    """A network, and the loss it is trained with."""

    @property
    def net(self) -> nn.Module:
        """What the optimizer updates."""
        ...

    def loss(self, iteration: int, part: int) -> tuple[Tensor, dict[str, float]]:
        """The loss of part `part` of iteration `iteration`'s batch, and what to log beside it.

        All randomness is a pure function of (seed, iteration, part), so that a resumed run goes on exactly, and any
        number of processes trains on the same batches.
        """
        ...

    def export(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Write finished `weights` of `net` in the diffusers layout."""
        ...


class Trainer:
    """Trains an objective for `config.train.iterations`; running it again resumes from the last checkpoint."""

    def __init__(self, config: Config, objective: Objective, logdir: str):
        self.config = config
        self.train_config = config.train
        self.objective = objective
        self.logdir = writable_folder(logdir)
        self.iteration = 0
        self.parts = my_parts(self.train_config)
        self.optimizers = build_optimizers(objective.net, self.train_config)
        self.base_rates = [[group["lr"] for group in o.param_groups] for o in self.optimizers]
        self.ema = {name: p.detach().clone() for name, p in objective.net.state_dict().items()}

    @property
    def checkpoint(self) -> Path:
        """The file that a rerun resumes from."""
        return self.logdir / "checkpoint.pt"

    def train(self) -> None:
        """Resume if there is a checkpoint, train to the last iteration, export the EMA weights."""
        config = self.train_config
        self.resume()
        if rank() == 0:
            (self.logdir / "config.yaml").write_text(self.config.to_yaml())
        with MetricsLog(self.logdir, config, self.config, self.iteration) as log:
            try:
                while self.iteration < config.iterations:
                    with ctrl_c_waits():
                        metrics = self.step()
                        self.iteration += 1
                    log.write(self.iteration, metrics)
                    if self.iteration % config.checkpoint_every == 0 or self.iteration == config.iterations:
                        self.save()
            except KeyboardInterrupt:
                self.save()
                raise
        if config.output and rank() == 0:
            self.objective.export(Path(config.output), self.ema)
            print(f"wrote {config.output}")

    def step(self) -> dict[str, float]:
        """One optimizer update; returns what to log."""
        net, config = self.objective.net, self.train_config
        scale = learning_rate_scale(self.iteration, config)
        for optimizer, rates in zip(self.optimizers, self.base_rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * scale
        metrics = self.accumulate()
        norm = nn.utils.clip_grad_norm_(net.parameters(), config.grad_clip)
        if not (math.isfinite(metrics["loss"]) and torch.isfinite(norm)):
            raise UserError(
                f"loss {metrics['loss']:.4g} and gradient norm {norm.item():.4g} at iteration {self.iteration}: "
                f"not finite; the last good state is {self.checkpoint}, go on with a lower train.learning_rate"
            )
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.update_ema()
        return metrics | {"grad_norm": norm.item(), "rate_scale": scale}

    def accumulate(self) -> dict[str, float]:
        """Leave the whole batch's gradient in every process; returns its loss and the objective's metrics."""
        parts = num_parts(self.train_config)
        sums: dict[str, float] = {}
        for part in self.parts:
            loss, metrics = self.objective.loss(self.iteration, part)
            (loss / parts).backward()
            for name, value in ({"loss": loss.item()} | metrics).items():
                sums[name] = sums.get(name, 0.0) + value / parts
        values = torch.tensor(list(sums.values()), device=loss.device)
        gradients = [p.grad for p in self.objective.net.parameters() if p.grad is not None]
        sum_over_processes([values, *gradients])
        return dict(zip(sums, values.tolist(), strict=True))

    @torch.no_grad()
    def update_ema(self) -> None:
        """Move the EMA towards the weights; early on its memory is no longer than a tenth of the run so far."""
        decay = min(self.train_config.ema_decay, (1 + self.iteration) / (10 + self.iteration))
        for name, value in self.objective.net.state_dict().items():
            if value.is_floating_point():
                self.ema[name].lerp_(value, 1 - decay)
            else:
                self.ema[name].copy_(value)

    def save(self) -> None:
        """Write the checkpoint; a kill in between leaves the previous one."""
        if rank() > 0:
            return
        state = {
            "iteration": self.iteration,
            "net": self.objective.net.state_dict(),
            "ema": self.ema,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "config": self.config.to_yaml(),
        }
        with atomic_path(self.checkpoint) as path:
            torch.save(state, path)

    def resume(self) -> None:
        """Load the checkpoint of this logdir, if there is one."""
        for leftover in self.logdir.glob(".checkpoint.*.partial.pt"):  # of a run that was killed while it saved
            leftover.unlink(missing_ok=True)
        if not self.checkpoint.exists():
            return
        state = torch.load(self.checkpoint, weights_only=True, map_location="cpu")
        try:
            self.objective.net.load_state_dict(state["net"])
        except RuntimeError:
            raise UserError(
                f"{self.checkpoint} is of another network; choose another --logdir or the config it was made with"
            ) from None
        try:
            for optimizer, optimizer_state in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(optimizer_state)
        except ValueError:
            raise UserError(
                f"{self.checkpoint} was made with another optimizer; choose another --logdir or its train.optimizer"
            ) from None
        for name, value in state["ema"].items():
            self.ema[name].copy_(value)
        self.iteration = state["iteration"]
        if rank() == 0:
            print(f"resumed from {self.checkpoint} at iteration {self.iteration}")


def num_parts(config: TrainConfig) -> int:
    """In how many parts of `batch_size` an iteration's batch is computed, over all processes.

    Raises:
        UserError: if it does not divide into the same number of parts for each process.
    """
    total = config.total_batch_size or config.batch_size * world_size()
    if total <= 0 or total % (config.batch_size * world_size()):
        raise UserError(
            f"train.total_batch_size={total} must be a multiple of train.batch_size={config.batch_size} times the "
            f"number of processes, {world_size()}"
        )
    return total // config.batch_size


def my_parts(config: TrainConfig) -> range:
    """Which parts of every iteration's batch this process computes."""
    share = num_parts(config) // world_size()
    return range(rank() * share, (rank() + 1) * share)


@contextlib.contextmanager
def ctrl_c_waits() -> Iterator[None]:
    """Hold Ctrl-C back until the block is done: in between, weights, optimizer and EMA are not of one iteration."""
    if threading.current_thread() is not threading.main_thread():  # the others are not interrupted
        yield
        return
    pressed = []
    before = signal.signal(signal.SIGINT, lambda *_: pressed.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt


def learning_rate_scale(iteration: int, config: TrainConfig) -> float:
    """Factor on the peak learning rate: linear warm-up, then a cosine down to a twentieth."""
    if iteration < config.warmup:
        return (iteration + 1) / config.warmup
    progress = (iteration - config.warmup) / max(1, config.iterations - config.warmup)
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def build_optimizers(net: nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the matrices and convolutions inside and AdamW for the rest.

    Muon is not meant for embeddings, inputs and outputs, nor for vectors.
    """
    named = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
    inside = [p for name, p in named if config.optimizer == "muon" and is_inner_matrix(name, p)]
    chosen = {id(p) for p in inside}
    others = [p for _, p in named if id(p) not in chosen]
    beta1, beta2 = config.betas
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(others, lr=config.learning_rate, betas=(beta1, beta2), weight_decay=config.weight_decay)
    ]
    if inside:
        optimizers.append(Muon(inside, lr=config.muon_learning_rate, weight_decay=config.weight_decay))
    return optimizers


def is_inner_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter is a weight matrix or convolution kernel between two hidden layers."""
    outer = ("conv_in.", "conv_out.", "patch_embedding.", "proj_out.", "condition_embedder.", "heads.", "shared.")
    is_kernel = name.endswith(".weight") and parameter.ndim >= 2
    return is_kernel and not any(word in f"{name}." for word in outer)


class MetricsLog:
    """Means of the metrics since the last line: on the console, in logdir/metrics.jsonl, and to W&B if asked."""

    def __init__(self, logdir: Path, train: TrainConfig, config: Config, iteration: int):
        self.path = logdir / "metrics.jsonl"
        self.train = train
        self.sums: dict[str, float] = {}
        self.count = 0
        self.started = time.perf_counter()
        self.first_iteration = iteration
        self.wandb: Any = None
        if rank() > 0:
            return
        # A killed run may have logged iterations that were lost with it.
        if self.path.exists():
            lines = self.path.read_text().splitlines()
            keep = [line for line in lines if line.endswith("}") and json.loads(line)["iteration"] <= iteration]
            self.path.write_text("".join(line + "\n" for line in keep))
        if train.wandb != "off":
            import wandb

            self.wandb = wandb.init(
                project=train.project, name=logdir.name, dir=logdir, mode=train.wandb, config={"yaml": config.to_yaml()}
            )

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *exception: object) -> None:
        if self.wandb is not None:
            self.wandb.finish()

    def write(self, iteration: int, metrics: dict[str, float]) -> None:
        """Take in one iteration's metrics; every `log_every` iterations write a line."""
        if rank() > 0:
            return
        self.count += 1
        for name, value in metrics.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        if iteration % self.train.log_every and iteration != self.train.iterations:
            return
        means = {name: value / self.count for name, value in self.sums.items()}
        seconds = (time.perf_counter() - self.started) / (iteration - self.first_iteration)
        left = seconds * (self.train.iterations - iteration)
        text = "  ".join(f"{name} {value:.4g}" for name, value in means.items())
        print(f"{iteration}/{self.train.iterations}  {text}  {seconds:.2f} s/it, {left / 60:.0f} min left", flush=True)
        with self.path.open("a") as file:
            file.write(json.dumps({"iteration": iteration, **means}) + "\n")
        if self.wandb is not None:
            self.wandb.log(means, step=iteration)
        self.sums, self.count = {}, 0
