"""The training loop, shared by all objectives: updates, EMA, checkpoints, logs and sample videos."""

import contextlib
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist
from torch import Tensor, tensor

from model.weight_checks import is_finite
from trainer.banner import next_command, training_banner
from trainer.checkpoints import CONFIG_FILE, Checkpoints
from trainer.divergence import DivergenceCheck
from trainer.ema import EMA
from trainer.logging import MetricsLog
from trainer.objectives.base import Objective
from trainer.optim import build_optimizers, learning_rate_scale, optimizer_state, set_learning_rate
from trainer.resume import changed_keys
from trainer.sampling import read_sample_prompts
from trainer.sharding import (
    clip_gradients,
    full_tensor,
    local_micro_batches,
    local_shard,
    loss_scale,
    reshard,
    sum_gradients,
)
from trainer.stop_signal import StopSignal
from utils.config import Config
from utils.config_checks import num_micro_batches
from utils.config_loading import load_config
from utils.distributed import rank, world_size
from utils.errors import UserError
from utils.files import writable_folder, write_text
from utils.locks import lock_folder
from utils.process_group import max_over_ranks

SNAPSHOTS = "snapshots"
"""Subfolder of a log folder: EMA weights of several iterations, each a folder that inference.py loads."""


class Trainer:
    """Train an objective for `config.train.max_iterations`. The same call resumes from the last checkpoint."""

    def __init__(self, config: Config, objective: Objective, logdir: str):
        self.config = config
        self.train_config = config.train
        self.objective = objective
        self.logdir = writable_folder(logdir)
        self.iteration = 0
        if self.train_config.output and rank() == 0:
            writable_folder(self.train_config.output)
        if self.train_config.sample_every:
            read_sample_prompts(self.train_config.sample_prompts)  # reports a bad file before training
        self.optimizers = {
            name: build_optimizers(net, self.train_config, objective.learning_rate(name))
            for name, net in objective.nets.items()
        }
        self.net = next(iter(objective.nets.values()))
        self.device = next(self.net.parameters()).device
        self.ema = EMA(self.net, self.train_config.ema_decay, self.train_config.ema_start)
        self.checkpoints = Checkpoints(self.logdir, self.train_config.keep_checkpoints)
        self.stop_signal = StopSignal()
        self.divergence = DivergenceCheck(self.train_config)
        self.stopping = False  # equal on all ranks; training stops after this iteration

    def train(self, resume: Path | None = None) -> None:
        """Resume if there is a checkpoint, train to the last iteration, and export the EMA weights.

        Args:
            resume: the checkpoint to start from, see `Checkpoints.load`.

        Raises:
            UserError: if the run cannot start or diverges.
            KeyboardInterrupt: after a stop signal, once the checkpoint is written.
        """
        with lock_folder(self.logdir, "training in") if rank() == 0 else contextlib.nullcontext():
            self.resume(resume)
            if rank() == 0:
                write_text(self.logdir / CONFIG_FILE, self.config_text())
                print(training_banner(self.config, self.objective, self.logdir, self.iteration), flush=True)
            self._run_iterations()
            if self.stopping:
                raise KeyboardInterrupt
            if self.train_config.output:
                self.export(Path(self.train_config.output))
            if rank() == 0:
                self._print_result()

    def _run_iterations(self) -> None:
        config = self.train_config
        with MetricsLog(self.logdir, self.config, self.iteration) as log, self.stop_signal:
            try:
                while self.iteration < config.max_iterations and not self.stopping:
                    metrics = self.step()
                    self.iteration += 1
                    log.write(self.iteration, metrics)
                    self.checkpoints.poll()
                    is_last = self.stopping or self.iteration == config.max_iterations
                    if config.snapshot_every and self.iteration % config.snapshot_every == 0:
                        # Before the checkpoint: a run that is killed in between then writes the snapshot again.
                        self.export(self.logdir / SNAPSHOTS / f"{self.iteration:08d}")
                    if self.iteration % config.checkpoint_every == 0 or is_last:
                        self.save()
                    if config.sample_every and self.iteration % config.sample_every == 0:
                        self.sample(log)
            finally:
                self.checkpoints.finish()

    def _print_result(self) -> None:
        if saved := self.checkpoints.saved():
            print(f"last checkpoint: {saved[-1]}")
        if command := next_command(self.config, self.logdir):
            print(f"next: {command}")

    # ---- One iteration ----

    def step(self) -> dict[str, float]:
        """Run one iteration: update the networks that the objective names, and return the metrics."""
        metrics = {"rate_scale": learning_rate_scale(self.iteration, self.train_config)}
        for name in self.objective.networks_to_update(self.iteration):
            metrics |= self.update(name, metrics["rate_scale"])
        return metrics

    def update(self, name: str, rate_scale: float) -> dict[str, float]:
        """Update one network on the whole batch and return its metrics.

        Args:
            name: key of `objective.nets`.
            rate_scale: factor on the peak learning rate.

        Raises:
            UserError: if a loss or the gradient diverges; the network is then unchanged.
        """
        net = self.objective.nets[name]
        metrics = self.accumulate(name)
        for trained in self.objective.nets.values():  # gradients and optimizer state belong to the shards
            reshard(trained)
        norm = clip_gradients(net.parameters(), self.train_config.grad_clip)
        if problems := self.divergence.problems(metrics, name, norm):
            self.abort(", ".join(problems))
        for optimizer in self.optimizers[name]:
            set_learning_rate(optimizer, rate_scale)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if net is self.net:
            self.ema.update(net, self.iteration)
        prefix = "" if len(self.objective.nets) == 1 else f"{name}_"
        return metrics | {f"{prefix}grad_norm": norm}

    def accumulate(self, name: str) -> dict[str, float]:
        """Accumulate the gradient of the whole batch on every rank and return the mean metrics.

        The stop signals of the ranks are summed with the metrics, so all ranks stop after the same iteration.
        """
        net = self.objective.nets[name]
        scale = loss_scale(net, self.num_micro_batches)
        sums: dict[str, float] = {}
        micro_batches = local_micro_batches(self.train_config)
        for micro_batch in micro_batches:
            is_last = micro_batch == micro_batches[-1]
            for key, value in self.objective.backward(name, self.iteration, micro_batch, scale, is_last).items():
                sums[key] = sums.get(key, 0.0) + value / self.num_micro_batches
        sums["stop signals"] = float(self.stop_signal.received)
        totals = sum_gradients(net, sums, self.device)
        self.stopping = totals.pop("stop signals") > 0 or self.stopping
        return totals

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of a batch, over all ranks."""
        return num_micro_batches(self.train_config, world_size())

    def abort(self, reason: str) -> NoReturn:
        """Finish the pending checkpoint and end the run.

        Raises:
            UserError: always; it names the iteration, the reason and the last good checkpoint.
        """
        self.checkpoints.finish()
        saved = self.checkpoints.saved()
        last_good = f"the last good checkpoint is {saved[-1]}" if saved else "no checkpoint was saved yet"
        raise UserError(f"iteration {self.iteration}: {reason}; {last_good}; resume with a lower learning rate")

    # ---- Results ----

    def sample(self, log: MetricsLog) -> None:
        """Write sample videos with the EMA weights to logdir/samples/ITERATION and to W&B."""
        folder = self.logdir / "samples" / f"{self.iteration:08d}"
        with self.ema.applied_to(self.net):
            self.objective.sample(folder)
        dist.barrier()  # all ranks have written their videos
        log.write_videos(self.iteration, folder)

    def export(self, folder: Path) -> None:
        """Write the EMA weights to `folder`. Rank 0 gathers them one by one."""
        weights = {}
        for name, shard in self.ema.weights.items():
            gathered = full_tensor(shard)
            if rank() == 0:
                weights[name] = gathered.cpu()
        if rank() == 0:
            self.objective.export(folder, weights)
            print(f"wrote {folder}")

    # ---- Checkpoints ----

    def state(self) -> dict[str, Tensor]:
        """Return every tensor that determines the rest of the run, by name. The tensors are not copied.

        The position in the data follows from the iteration and the batch size.
        """
        state: dict[str, Any] = {"iteration": tensor(self.iteration)}
        for name, net in self.objective.nets.items():
            state |= {f"nets/{name}/{key}": value for key, value in net.state_dict().items()}
            for optimizer in self.optimizers[name]:
                kind = type(optimizer).__name__
                state |= {f"{kind}/{name}/{key}": value for key, value in optimizer_state(optimizer, net).items()}
        return state | {f"ema/{key}": value for key, value in self.ema.weights.items()}

    def save(self) -> None:
        """Write a checkpoint in the background. If the run is killed meanwhile, the checkpoint before it remains."""
        if not self.train_config.save:
            return
        state = self.state()
        if bad := self._not_finite(state):
            self.abort(f"{bad} is not finite")
        self.checkpoints.save(self.iteration, state, self.config_text())

    def _not_finite(self, state: Mapping[str, Tensor]) -> str:
        """Return the name of a tensor with NaN or infinity on any rank; empty if there is none."""
        bad = [name for name, value in state.items() if not is_finite(local_shard(value))]
        found = max_over_ranks(len(bad), self.device) > 0
        return (bad[0] if bad else "a tensor of another rank") if found else ""

    def config_text(self) -> str:
        """Return the configuration as YAML, with the total batch size filled in."""
        config = deepcopy(self.config)
        config.train.total_batch_size = self.num_micro_batches * config.train.batch_size
        return config.to_yaml()

    def resume(self, path: Path | None = None) -> None:
        """Load the newest checkpoint of the log folder, or start from `path`, and print the changed configuration keys.

        The total batch size of the checkpoint is kept for any world size, unless the configuration sets one.

        Args:
            path: see `Checkpoints.load`.

        Raises:
            UserError: if the checkpoint belongs to another objective, cannot be loaded, or holds NaN.
        """
        state = self.state()
        source = self.checkpoints.load(state, path)
        if source is None:
            return
        if bad := self._not_finite(state):
            raise UserError(f"{source} is damaged: {bad} is not finite; delete it to resume from the one before")
        self.iteration = int(state["iteration"])
        changes: list[str] = []
        if (source / CONFIG_FILE).exists():
            before = load_config(str(source / CONFIG_FILE))
            if before.train.objective != self.train_config.objective:
                raise UserError(
                    f"{source} belongs to a run with train.objective={before.train.objective}, not "
                    f"{self.train_config.objective}; choose another --logdir"
                )
            if not self.train_config.total_batch_size:
                self.train_config.total_batch_size = before.train.total_batch_size
            changes = changed_keys(before, self.config)
        if rank() == 0:
            print(f"resumed from {source} at iteration {self.iteration}")
            if self.iteration > self.train_config.max_iterations:
                changes.insert(0, f"the checkpoint is beyond train.max_iterations={self.train_config.max_iterations}")
            for change in changes:
                print(f"note: {change}")
