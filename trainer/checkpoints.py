"""Checkpoints of a run: sharded, written in the background, complete or absent, the last few kept."""

import itertools
import pickle
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

from trainer.checkpoint_reader import CheckpointReader, read_checkpoint_metadata
from utils.distributed import rank
from utils.errors import UserError
from utils.files import write_text

CONFIG_FILE = "config.yaml"
"""In a checkpoint: the configuration of the run that wrote it."""
_NAME = re.compile(r"\d{8}")
_RESUMED = "resumed_from"  # beside checkpoints that descend from another: where that was


class Checkpoints:
    """The folder `checkpoints/` of a run: a folder per saved iteration, each in torch.distributed.checkpoint's format.

    A folder appears under its name when all of it is on the disk, whatever becomes of the run meanwhile. Tensors that
    are sharded are written in parts by the processes that hold them, and can be loaded by any number of processes.
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

    def save(self, iteration: int, state: Mapping[str, Tensor], config: str) -> None:
        """Copy the state and write it, beside the configuration, in the background; waits only for the save before."""
        self.finish()
        partial = self._partial(iteration)
        if rank() == 0:
            partial.mkdir(parents=True, exist_ok=True)  # another process may have begun to write
            write_text(partial / CONFIG_FILE, config)
        # What lies on the CPU would be written while training changes it.
        copy = {name: x.detach().clone() if x.device.type == "cpu" else x for name, x in state.items()}
        self._pending = dcp.async_save(copy, checkpoint_id=partial, process_group=self._group), iteration  # type: ignore[assignment]

    def poll(self) -> None:
        """Give the save that is under way its name if it is done; never waits."""
        if self._pending is not None and self._pending[0].done():
            self.finish()

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
        """Load the newest checkpoint into the tensors of `state`; returns where it was, if there is any.

        Args:
            path: what a run is to begin with: a checkpoint of another run, in a folder without any, or one of its own,
                for which later ones are put aside. Once it has, the same path goes on from the newest.

        Raises:
            UserError: if `path` is none or cannot be begun with; if it is of another network or optimizer, or broken.
        """
        source = self._chosen_by_one(path)
        if source is None:
            return None
        try:
            read_checkpoint_metadata(source)  # dcp.load prints a traceback if the metadata is broken
            dcp.load(dict(state), storage_reader=CheckpointReader(source))
        except _UNREADABLE as error:
            earlier = _before(source)
            raise UserError(
                f"{source} does not fit this configuration's networks and optimizers, or is broken ({_reason(error)}); "
                "choose another --logdir, or the configuration that it was made with"
                + (f", or go on from the one before it by --resume {earlier}" if earlier else "")
            ) from None
        if rank() == 0 and source == path:
            self._begin_at(path)
        return source

    def _chosen_by_one(self, path: Path | None) -> Path | None:
        """What the first process takes for the source: a shared disk may show others something older for a while."""
        answer: list[Path | UserError | None] = [None]
        if rank() == 0:
            try:
                answer = [self._source(path)]
            except UserError as error:
                answer = [error]
        dist.broadcast_object_list(answer, src=0, group=self._group)
        [source] = answer
        if isinstance(source, UserError):
            raise source
        return source

    def _source(self, path: Path | None) -> Path | None:
        """Tidy up behind a run that was killed, and choose."""
        for partial in self.folder.glob(".*.partial"):
            final = self.folder / partial.name.removeprefix(".").removesuffix(".partial")
            if (partial / ".metadata").exists() and not final.exists():  # which is written last
                partial.rename(final)
            else:
                shutil.rmtree(partial, ignore_errors=True)
        saved = self.saved()
        if path is None or (saved and self._resumed_from() == str(path.resolve())):
            return saved[-1] if saved else None
        if not (path / ".metadata").is_file():
            raise UserError(f"--resume {path} is no checkpoint folder such as LOGDIR/checkpoints/00000500, nor auto")
        if saved and path.resolve() not in [folder.resolve() for folder in saved]:
            raise UserError(
                f"{self.folder} has checkpoints of its own; leave out --resume to go on from them, or choose another "
                f"--logdir to begin with {path}"
            )
        return path

    def _resumed_from(self) -> str:
        note = self.folder / _RESUMED
        return note.read_text() if note.exists() else ""

    def _begin_at(self, path: Path) -> None:
        """Put later checkpoints aside, and note where this run comes from."""
        for later in self.saved():
            if later.name > path.name:
                aside = (self.folder / f"abandoned-{later.name}-{n}" for n in itertools.count())
                later.rename(next(name for name in aside if not name.exists()))
        self.folder.mkdir(exist_ok=True)
        write_text(self.folder / _RESUMED, str(path.resolve()))

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
        UserError: if it is no checkpoint, broken, or holds none.
    """
    try:
        entries = read_checkpoint_metadata(checkpoint).state_dict_metadata
        tensors = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype)
            for name, entry in entries.items()
            if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
        }
        if not tensors:
            raise UserError(f"{checkpoint} holds no {prefix.rstrip('/')}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that it is a single process, which is what we want
            dcp.load(tensors, storage_reader=CheckpointReader(checkpoint), no_dist=True)
    except _UNREADABLE as error:
        earlier = _before(checkpoint)
        raise UserError(
            f"{checkpoint} is no checkpoint of train.py, or broken ({_reason(error)})"
            + (f"; the one before it is {earlier}" if earlier else "")
        ) from None
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


_UNREADABLE = (
    *(CheckpointException, pickle.UnpicklingError, EOFError, OSError, RuntimeError, AssertionError),
    *(ValueError, TypeError, LookupError, AttributeError),
)
"""What torch reports a broken checkpoint by, or one of something else."""


def _reason(error: BaseException) -> str:
    if isinstance(error, CheckpointException):  # of all processes; one will do
        error = next((failure for failure, _ in error.failures.values()), error)
    return f"{type(error).__name__}: {error}".splitlines()[0].removesuffix(": ")[:100]


def _before(checkpoint: Path) -> Path | None:
    """The complete checkpoint before one of the same run."""
    return next((path for path in reversed(saved_in(checkpoint.parent)) if path.name < checkpoint.name), None)
