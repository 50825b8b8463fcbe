"""The one training loop: optimizers, EMA, checkpoints, logging. What is learned is the objective's business."""

import contextlib
import math
import signal
import statistics
import sys
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.checkpoints import CONFIG, Checkpoints
from trainer.logging import MetricsLog
from trainer.objectives.base import Objective
from trainer.optim import build_optimizers, learning_rate_scale
from trainer.sampling import read_captions
from trainer.sharding import clip_gradients, local, local_micro_batches, loss_scale, settle, sum_gradients, whole
from utils.config import Config, load_config, num_micro_batches
from utils.distributed import rank, world_size
from utils.errors import UserError
from utils.files import only_user, writable_folder, write_text
from utils.process_group import largest_of_processes

LOSSES = ("loss", "critic", "forward_kl")
"""Metrics that stop a run when they grow beyond all proportion."""


class Trainer:
    """Trains an objective for `config.train.max_iterations`; running it again goes on from the last checkpoint."""

    def __init__(self, config: Config, objective: Objective, logdir: str):
        self.config = config
        self.train_config = config.train
        self.objective = objective
        self.logdir = writable_folder(logdir)
        self.iteration = 0
        if self.train_config.output and rank() == 0:
            writable_folder(self.train_config.output)
        if self.train_config.sample_every:
            read_captions(self.train_config.sample_prompts)  # what is wrong with them is said now, and not hours later
        self.optimizers = {
            name: build_optimizers(net, self.train_config, objective.learning_rate(name))
            for name, net in objective.nets.items()
        }
        self.net = next(iter(objective.nets.values()))
        self.ema = {name: tensor.detach().clone() for name, tensor in self.net.state_dict().items()}
        self.checkpoints = Checkpoints(self.logdir, self.train_config.keep_checkpoints)
        self.notice = Notice()
        self.recent: dict[str, deque[float]] = {name: deque(maxlen=100) for name in LOSSES}
        self.stopping = False  # by common knowledge of all processes: with the iteration that is under way

    def train(self, resume: Path | None = None) -> None:
        """Resume if there is a checkpoint, train to the last iteration, export the EMA weights.

        Args:
            resume: what to begin with, see `Checkpoints.load`.
        """
        with only_user(self.logdir, "training in") if rank() == 0 else contextlib.nullcontext():
            self.resume(resume)
            self._train()

    def _train(self) -> None:
        config = self.train_config
        if rank() == 0:
            write_text(self.logdir / CONFIG, self.config_text())
        with MetricsLog(self.logdir, config, self.config, self.iteration) as log, self.notice:
            try:
                while self.iteration < config.max_iterations and not self.stopping:
                    metrics = self.step()
                    self.iteration += 1
                    log.write(self.iteration, metrics)
                    self.checkpoints.poll()
                    last = self.stopping or self.iteration == config.max_iterations
                    if self.iteration % config.checkpoint_every == 0 or last:
                        self.save()
                    if config.sample_every and self.iteration % config.sample_every == 0:
                        folder = self.logdir / "samples" / f"{self.iteration:08d}"
                        with self.average_weights():
                            self.objective.sample(folder)
                        dist.barrier()  # every process has written its videos
                        log.write_videos(self.iteration, folder)
            finally:
                self.checkpoints.finish()
        if self.stopping:
            raise KeyboardInterrupt
        if config.output:
            self.export(Path(config.output))

    def export(self, folder: Path) -> None:
        """Write the EMA weights, which the first process gathers one by one."""
        weights = {}
        for name, tensor in self.ema.items():
            gathered = whole(tensor)
            if rank() == 0:
                weights[name] = gathered.cpu()
        if rank() == 0:
            self.objective.export(folder, weights)
            print(f"wrote {folder}")

    @property
    def num_micro_batches(self) -> int:
        """In how many parts of `batch_size` a batch is computed, over all processes."""
        return num_micro_batches(self.train_config, world_size())

    def step(self) -> dict[str, float]:
        """One iteration: an update of every net whose turn it is; returns what to log."""
        metrics: dict[str, float] = {"rate_scale": learning_rate_scale(self.iteration, self.train_config)}
        for name in self.objective.networks_to_update(self.iteration):
            metrics |= self.update(name, metrics["rate_scale"])
        return metrics

    def update(self, name: str, rate_scale: float) -> dict[str, float]:
        """One optimizer update of one net, on the whole batch."""
        config, net = self.train_config, self.objective.nets[name]
        metrics = self.accumulate(name)
        for used in self.objective.nets.values():  # gradients, optimizer and checkpoint are of their shards
            settle(used)
        norm = clip_gradients(net.parameters(), config.grad_clip)
        self.refuse_bad(metrics, name, norm)
        for optimizer in self.optimizers[name]:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate_scale
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if net is self.net:
            self.update_ema()
        prefix = "" if len(self.objective.nets) == 1 else f"{name}_"
        return metrics | {f"{prefix}grad_norm": norm}

    def accumulate(self, name: str) -> dict[str, float]:
        """Leave the whole batch's gradient in every process; returns the objective's metrics."""
        net = self.objective.nets[name]
        scale = loss_scale(net, self.num_micro_batches)
        sums: dict[str, float] = {}
        micro_batches = local_micro_batches(self.train_config)
        for micro_batch in micro_batches:
            last = micro_batch == micro_batches[-1]
            for key, value in self.objective.backward(name, self.iteration, micro_batch, scale, last).items():
                sums[key] = sums.get(key, 0.0) + value / self.num_micro_batches
        sums["told to stop"] = float(self.notice.given)
        totals = sum_gradients(net, sums, next(net.parameters()).device)
        self.stopping = totals.pop("told to stop") > 0 or self.stopping
        return totals

    def refuse_bad(self, metrics: Mapping[str, float], name: str, norm: float) -> None:
        """Stop before an update that would ruin the run.

        Raises:
            UserError: if a loss or the gradient is not finite or out of all proportion; it says which.
        """
        config = self.train_config
        losses = {key: metrics[key] for key in LOSSES if key in metrics}
        bad = [f"{key} is {value:.4g}" for key, value in metrics.items() if not math.isfinite(value)]
        for key, value in losses.items():
            usual = self.usual(key)
            if value > config.stop_loss_growth * usual:
                bad.append(f"{key} is {value:.4g} where {usual:.4g} is usual")
        if not math.isfinite(norm) or norm > config.stop_grad_norm:
            shares = [f"{key} {value:.4g}" for key, value in metrics.items() if key.endswith("_output_gradient")]
            bad.append(f"the gradient norm of the {name} is {norm:.4g}" + f" ({', '.join(shares)})" * bool(shares))
        if bad:
            self.stop(", ".join(bad))
        for key, value in losses.items():
            self.recent[key].append(value)

    def usual(self, loss: str) -> float:
        """The median of a loss's latest values; infinite, so that nothing exceeds it, where they cannot say."""
        recent = self.recent[loss]
        return statistics.median(recent) or math.inf if len(recent) >= 20 else math.inf

    def stop(self, reason: str) -> NoReturn:
        """End a run that cannot go on, saying which state is left.

        Raises:
            UserError: always.
        """
        self.checkpoints.finish()
        saved = self.checkpoints.saved()
        good = f"the last good state is {saved[-1]}" if saved else "nothing was saved yet"
        raise UserError(f"iteration {self.iteration}: {reason}; {good}, go on with a lower learning rate")

    @torch.no_grad()
    def update_ema(self) -> None:
        """Move the EMA towards the weights.

        Until `ema_start` it is the weights. One that starts with random weights has, early on, no longer a memory than
        a tenth of the run so far.
        """
        config = self.train_config
        if config.ema_start:
            decay = config.ema_decay if self.iteration > config.ema_start else 0.0
        else:
            decay = min(config.ema_decay, (1 + self.iteration) / (10 + self.iteration))
        for name, value in self.net.state_dict().items():
            if value.is_floating_point():
                self.ema[name].lerp_(value, 1 - decay)
            else:
                self.ema[name].copy_(value)

    @contextlib.contextmanager
    def average_weights(self) -> Iterator[None]:
        """The first net with its EMA for weights."""
        with torch.no_grad():
            own = {name: tensor.clone() for name, tensor in self.net.state_dict().items()}
            for name, tensor in self.net.state_dict().items():
                tensor.copy_(self.ema[name])
            try:
                yield
            finally:
                settle(self.net)
                for name, tensor in self.net.state_dict().items():
                    tensor.copy_(own[name])

    def state(self) -> dict[str, Tensor]:
        """Every tensor that decides how the run goes on, by name; they are the run's own, not copies.

        Where in the data a run is follows from its iteration and the size of its batches.
        """
        state = {"iteration": torch.tensor(self.iteration)}
        for name, net in self.objective.nets.items():
            state |= {f"nets/{name}/{key}": tensor for key, tensor in net.state_dict().items()}
            names: dict[Any, str] = {parameter: key for key, parameter in net.named_parameters()}
            for optimizer in self.optimizers[name]:
                kind = type(optimizer).__name__
                for parameter, values in optimizer.state.items():
                    state |= {f"{kind}/{name}/{names[parameter]}/{key}": value for key, value in values.items()}
        return state | {f"ema/{key}": tensor for key, tensor in self.ema.items()}

    def save(self) -> None:
        """Write a checkpoint in the background; a kill in between leaves the one before."""
        if not self.train_config.save:
            return
        state = self.state()
        self.refuse_ruined(state)
        self.checkpoints.save(self.iteration, state, self.config_text())

    def refuse_ruined(self, state: Mapping[str, Tensor]) -> None:
        """Stop before a state with what is not finite takes the place of a good one.

        Raises:
            UserError: naming the first of it.
        """
        ruined = [name for name, tensor in state.items() if not local(tensor).isfinite().all()]
        if largest_of_processes(len(ruined), next(self.net.parameters()).device):
            self.stop(f"{ruined[0] if ruined else 'what another process holds'} is not finite")

    def config_text(self) -> str:
        """The configuration as YAML, with the size of the batches, which may follow from the number of processes."""
        config = deepcopy(self.config)
        config.train.total_batch_size = self.num_micro_batches * config.train.batch_size
        return config.to_yaml()

    def resume(self, path: Path | None = None) -> None:
        """Load the newest checkpoint of this logdir, or begin with the one at `path`; say what is no longer as it was.

        Batches stay as large as they were on any number of processes, unless the configuration says a size.
        """
        state = self.state()
        source = self.checkpoints.load(state, path)
        if source is None:
            return
        self.iteration = int(state["iteration"])
        if (source / CONFIG).exists():
            before = load_config(str(source / CONFIG))
            if before.train.objective != self.train_config.objective:
                raise UserError(
                    f"{source} is of a run with train.objective={before.train.objective}, not "
                    f"{self.train_config.objective}; choose another --logdir"
                )
            if not self.train_config.total_batch_size:
                self.train_config.total_batch_size = before.train.total_batch_size
            changes = changed_keys(before, self.config)
        else:
            changes = []
        if rank() == 0:
            print(f"resumed from {source} at iteration {self.iteration}")
            if self.iteration > self.train_config.max_iterations:
                print(f"note: that is beyond train.max_iterations={self.train_config.max_iterations}")
            for change in changes:
                print(f"note: {change}")


class Notice:
    """Whether this process was told to stop, by Ctrl-C or by a cluster's SIGTERM.

    A process that stopped at once would be in another iteration than others, and its own weights, optimizer and EMA
    would not be of one. A second Ctrl-C does not wait.
    """

    def __init__(self) -> None:
        self.given = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Notice":
        if threading.current_thread() is threading.main_thread():  # the others get no signals
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        if self.given and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.given = True
        print("stopping after this iteration; Ctrl-C again stops at once", file=sys.stderr, flush=True)


_FREE = {
    *("train.output", "train.save", "train.checkpoint_every", "train.keep_checkpoints"),
    *("train.sample_every", "train.sample_prompts", "train.log_every", "train.wandb", "train.wandb_dir"),
    *("train.project", "train.stop_grad_norm", "train.stop_loss_growth", "model.text_cache", "runtime.device"),
}
"""What a run may change without becoming another."""
_PLACE = {"train.total_batch_size", "distill.generator_every"}
"""From which, with the iteration, follows where in its data a run is."""


def changed_keys(before: Config, now: Config) -> list[str]:
    """What a run that goes on does differently: a line for each key that decides about its weights."""
    free = _FREE | ({"train.max_iterations"} if now.train.decay == "constant" else set())
    lines = []
    for section in fields(Config):
        old, new = getattr(before, section.name), getattr(now, section.name)
        for key in fields(old):
            name, was, now_is = f"{section.name}.{key.name}", getattr(old, key.name), getattr(new, key.name)
            if was != now_is and name not in free:
                where = ", and the place in the data with it" if name in _PLACE else ""
                lines.append(f"{name} was {was!r} and is {now_is!r} from here on{where}")
    return lines
