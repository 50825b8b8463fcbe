"""Checkpoints of a run: sharded, written in the background, complete or absent, the last few kept."""

import re
import shutil
import warnings
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from utils.distributed import rank
from utils.errors import UserError

_NAME = re.compile(r"\d{8}")


class Checkpoints:
    """The folder `checkpoints/` of a run: a folder per saved iteration, each in torch.distributed.checkpoint's format.

    A folder appears under its name when all of it is on the disk. Tensors that are sharded are written in parts by the
    processes that hold them, and can be loaded by any number of processes.
    """

    def __init__(self, logdir: Path, keep: int):
        self.folder = logdir / "checkpoints"
        self.keep = keep
        self._pending: tuple[Future, int] | None = None
        # A group of its own: the background thread's messages must not get between those of training.
        self._group = dist.new_group(backend="gloo")

    def saved(self) -> list[Path]:
        """The complete checkpoints, oldest first."""
        return saved_in(self.folder)

    def save(self, iteration: int, state: Mapping[str, Tensor]) -> None:
        """Copy the state and write it in the background; waits only for the save before to be done."""
        self.finish()
        # A run that was killed while it saved may have left the very same name.
        partial = self._partial(iteration)
        if rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            self.folder.mkdir(exist_ok=True)
        # What lies on the CPU would be written while training changes it.
        copy = {name: x.detach().clone() if x.device.type == "cpu" else x for name, x in state.items()}
        self._pending = dcp.async_save(copy, checkpoint_id=partial, process_group=self._group), iteration  # type: ignore[assignment]

    def finish(self) -> None:
        """Wait for the save that is under way, give it its name, and drop those that are too old."""
        if self._pending is None:
            return
        future, iteration = self._pending
        self._pending = None
        future.result()
        if rank() > 0:
            return
        final = self.folder / f"{iteration:08d}"
        shutil.rmtree(final, ignore_errors=True)
        self._partial(iteration).rename(final)
        for old in self.saved()[: -self.keep]:
            shutil.rmtree(old, ignore_errors=True)

    def load(self, state: Mapping[str, Tensor], path: Path | None = None) -> Path | None:
        """Load the newest checkpoint, or that at `path`, into the tensors of `state`; returns where it was, if any.

        Raises:
            UserError: if it is of another network or optimizer, or broken.
        """
        saved = self.saved()
        if rank() == 0 and self.folder.is_dir():
            for leftover in self.folder.glob(".*.partial"):
                shutil.rmtree(leftover, ignore_errors=True)
        if path is None and not saved:
            return None
        source = path or saved[-1]
        try:
            dcp.load(dict(state), checkpoint_id=source)
        except (CheckpointException, ValueError, RuntimeError, OSError, KeyError) as error:
            reason = str(error).splitlines()[-1][:200] if str(error) else type(error).__name__
            raise UserError(
                f"{source} does not fit this configuration's networks and optimizers, or is broken ({reason}); choose "
                "another --logdir, or the configuration that it was made with"
            ) from None
        return source

    def _partial(self, iteration: int) -> Path:
        return self.folder / f".{iteration:08d}.partial"


def saved_in(folder: Path) -> list[Path]:
    """The complete checkpoints of a folder, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))


def find_checkpoint(logdir: Path, iteration: int | None = None) -> Path:
    """The checkpoint of a run's iteration, or its last one.

    Raises:
        UserError: if there is none; it names those that there are.
    """
    saved = saved_in(logdir / "checkpoints")
    if not saved:
        raise UserError(f"no checkpoints in {logdir}; is it the --logdir of a training run?")
    chosen = [path for path in saved if iteration in (None, int(path.name))]
    if not chosen:
        raise UserError(
            f"{logdir} has no checkpoint of iteration {iteration}, but of {', '.join(str(int(p.name)) for p in saved)}"
        )
    return chosen[-1]


def read_tensors(checkpoint: Path, prefix: str) -> dict[str, Tensor]:
    """The whole tensors of a checkpoint whose names begin with `prefix`, without it, by a single process.

    Raises:
        UserError: if it is no checkpoint, or holds none.
    """
    try:
        entries = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    except (OSError, CheckpointException) as error:
        raise UserError(f"{checkpoint} is no checkpoint of train.py ({type(error).__name__})") from None
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
        if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }
    if not tensors:
        raise UserError(f"{checkpoint} holds no {prefix.rstrip('/')}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it is a single process, which is what we want
        dcp.load(tensors, checkpoint_id=checkpoint, no_dist=True)
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
