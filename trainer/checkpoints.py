"""Checkpoints of a run: sharded, written in the background, atomic; the latest few are kept."""

import contextlib
import itertools
import pickle
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
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
"""File in a checkpoint: the configuration of the run that wrote it."""
_NAME = re.compile(r"\d{8}")
_RESUMED_FROM = "resumed_from"  # file in checkpoints/: path of the checkpoint that the run started from


class Checkpoints:
    """The folder `checkpoints/` of a run, with one folder per saved iteration in torch.distributed.checkpoint's format.

    A checkpoint gets its final name only when it is complete on disk, so a killed run leaves no broken checkpoint. Each
    rank writes its own shards; a run of any world size can load them.
    """

    def __init__(self, logdir: Path, keep: int):
        self.folder = logdir / "checkpoints"
        self.keep = keep
        self._pending: tuple[Future, int] | None = None  # the save in progress and its iteration
        # The background thread needs its own group, so that its messages do not mix with those of training.
        self._group = dist.new_group(backend="gloo")

    def saved(self) -> list[Path]:
        """Return the complete checkpoints, oldest first."""
        return list_checkpoints(self.folder)

    def save(self, iteration: int, state: Mapping[str, Tensor], config: str) -> None:
        """Copy the state and write it with the configuration in the background. Wait for the previous save first."""
        self.finish()
        partial = self._partial_folder(iteration)
        if rank() == 0:
            with self._delete_if_disk_fails(iteration):
                if partial.is_symlink():
                    partial.unlink()  # the checkpoint would be written into another folder
                partial.mkdir(parents=True, exist_ok=True)  # another rank may have created it
                write_text(partial / CONFIG_FILE, config)
        # async_save copies every tensor, also those on the CPU, before it returns; training may then change them.
        self._pending = dcp.async_save(dict(state), checkpoint_id=partial, process_group=self._group), iteration  # type: ignore[assignment]

    def poll(self) -> None:
        """Finish the save in progress if it is already written; never wait."""
        if self._pending is not None and self._pending[0].done():
            self.finish()

    def finish(self) -> None:
        """Wait for the save in progress, give it its final name, and delete the oldest checkpoints."""
        if self._pending is None:
            return
        future, iteration = self._pending
        self._pending = None
        with self._delete_if_disk_fails(iteration):
            future.result()
            if rank() > 0:
                return
            final = self.folder / f"{iteration:08d}"
            shutil.rmtree(final, ignore_errors=True)
            self._partial_folder(iteration).rename(final)
        for old in self.saved()[: -self.keep]:
            shutil.rmtree(old, ignore_errors=True)

    @contextlib.contextmanager
    def _delete_if_disk_fails(self, iteration: int) -> Iterator[None]:
        """Delete the partial checkpoint at once if the disk is full, and raise one line.

        Raises:
            UserError: with the reason, and the last checkpoint that is complete.
        """
        try:
            yield
        except (CheckpointException, OSError) as error:
            shutil.rmtree(self._partial_folder(iteration), ignore_errors=True)
            if not _is_disk_error(error):
                raise
            saved = self.saved()
            last = f"the last checkpoint is {saved[-1]}" if saved else "no checkpoint was saved yet"
            raise UserError(
                f"cannot write the checkpoint of iteration {iteration} to {self.folder} ({_reason(error)}); check that "
                f"the disk is not full; {last}"
            ) from None

    def load(self, state: Mapping[str, Tensor], path: Path | None = None) -> Path | None:
        """Load a checkpoint into the tensors of `state` and return its folder; None if there is no checkpoint.

        Without `path`, the newest checkpoint of this run is loaded. With `path`, there are three cases:

        - The run has loaded `path` before: it continues from its newest checkpoint.
        - `path` is a checkpoint of this run: it is loaded, and later checkpoints are renamed to abandoned-*.
        - `path` is a checkpoint of another run: it is loaded, if this run has no checkpoints yet.

        Args:
            path: the checkpoint that `--resume` names.

        Raises:
            UserError: if `path` is not a checkpoint or conflicts with those of the run; if the checkpoint is broken or
                belongs to another network or optimizer.
        """
        source = self._agree_on_source(path)
        if source is None:
            return None
        try:
            read_checkpoint_metadata(source)  # dcp.load prints a traceback if the metadata is broken
            dcp.load(dict(state), storage_reader=CheckpointReader(source))
        except _UNREADABLE as error:
            earlier = _previous_checkpoint(source)
            raise UserError(
                f"{source} does not fit this configuration's networks and optimizers, or is broken ({_reason(error)}); "
                "choose another --logdir, or use the configuration that wrote it"
                + (f", or resume from the previous checkpoint with --resume {earlier}" if earlier else "")
            ) from None
        if rank() == 0 and source == path:
            self._branch_from(path)
        return source

    def _agree_on_source(self, path: Path | None) -> Path | None:
        """Return the checkpoint that rank 0 chooses: on a shared disk, other ranks may see an older state."""
        answer: list[Path | UserError | None] = [None]
        if rank() == 0:
            try:
                answer = [self._choose_source(path)]
            except UserError as error:
                answer = [error]
        dist.broadcast_object_list(answer, src=0, group=self._group)
        [source] = answer
        if isinstance(source, UserError):
            raise source
        return source

    def _choose_source(self, requested: Path | None) -> Path | None:
        """Return the checkpoint to load, `requested` or the newest of this run; None if there is neither.

        If an earlier start of this run has loaded `requested` already, the newest checkpoint is the right one.

        Raises:
            UserError: if `requested` is not a checkpoint, or is of another run although this one has checkpoints.
        """
        self._clean_up_after_crash()
        saved = self.saved()
        newest = saved[-1] if saved else None
        if requested is None or (saved and self._resumed_from() == str(requested.resolve())):
            return newest
        if not (requested / ".metadata").is_file():
            raise UserError(
                f"--resume {requested} is not a checkpoint; give auto or a folder such as LOGDIR/checkpoints/00000500"
            )
        if saved and requested.resolve() not in [folder.resolve() for folder in saved]:
            raise UserError(
                f"{self.folder} already has checkpoints; leave out --resume to continue from them, or choose another "
                f"--logdir to start from {requested}"
            )
        return requested

    def _clean_up_after_crash(self) -> None:
        """Finish the rename of complete checkpoints, and delete those that were being written."""
        for partial in self.folder.glob(".*.partial"):
            final = self.folder / partial.name.removeprefix(".").removesuffix(".partial")
            if (partial / ".metadata").exists() and not final.exists():  # .metadata is written last
                partial.rename(final)
            else:
                shutil.rmtree(partial, ignore_errors=True)

    def _resumed_from(self) -> str:
        file = self.folder / _RESUMED_FROM
        return file.read_text() if file.exists() else ""

    def _branch_from(self, path: Path) -> None:
        """Continue this run from `path`: set its later checkpoints aside, and remember `path` for the next start."""
        for later in self.saved():
            if later.name > path.name:
                names = (self.folder / f"abandoned-{later.name}-{n}" for n in itertools.count())
                later.rename(next(name for name in names if not name.exists()))
        self.folder.mkdir(exist_ok=True)
        write_text(self.folder / _RESUMED_FROM, str(path.resolve()))

    def _partial_folder(self, iteration: int) -> Path:
        return self.folder / f".{iteration:08d}.partial"


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints in a folder, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))


def find_checkpoint(logdir: Path, iteration: int | None = None) -> Path:
    """Return the checkpoint of an iteration of a run; default: the last one.

    Raises:
        UserError: if there is none; it lists the iterations that have one.
    """
    saved = list_checkpoints(logdir / "checkpoints")
    if not saved:
        raise UserError(f"no checkpoints in {logdir}; give the --logdir of a training run")
    chosen = [path for path in saved if iteration in (None, int(path.name))]
    if not chosen:
        iterations = ", ".join(str(int(path.name)) for path in saved)
        raise UserError(f"{logdir} has no checkpoint of iteration {iteration}; choose from {iterations}")
    return chosen[-1]


def read_tensors(checkpoint: Path, prefix: str) -> dict[str, Tensor]:
    """Return the unsharded tensors with names that start with `prefix`; the prefix is removed. Needs no process group.

    Raises:
        UserError: if the checkpoint is broken or has no such tensors.
    """
    try:
        entries = read_checkpoint_metadata(checkpoint).state_dict_metadata
        tensors = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype)
            for name, entry in entries.items()
            if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
        }
        if not tensors:
            raise UserError(f"{checkpoint} contains no {prefix.rstrip('/')}; choose the --logdir of another run")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about loading without a process group
            dcp.load(tensors, storage_reader=CheckpointReader(checkpoint), no_dist=True)
    except UserError:
        raise
    except _UNREADABLE as error:
        earlier = _previous_checkpoint(checkpoint)
        raise UserError(
            f"{checkpoint} is broken, or not a checkpoint of train.py ({_reason(error)}); "
            + (f"the previous checkpoint is {earlier}" if earlier else "choose another --logdir")
        ) from None
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


_UNREADABLE = (
    *(CheckpointException, pickle.UnpicklingError, EOFError, OSError, RuntimeError, AssertionError),
    *(ValueError, TypeError, LookupError, AttributeError),
)
"""The exceptions that torch raises for a broken or foreign checkpoint."""


def _reason(error: BaseException) -> str:
    if isinstance(error, CheckpointException):  # it collects the errors of all ranks; show one
        error = next((failure for failure, _ in error.failures.values()), error)
    return f"{type(error).__name__}: {error}".splitlines()[0].removesuffix(": ")[:100]


def _is_disk_error(error: BaseException) -> bool:
    failures = [failure for failure, _ in error.failures.values()] if isinstance(error, CheckpointException) else []
    # torch's zip writer hides the error number.
    return any(isinstance(e, OSError) or "write" in str(e).lower() for e in [error, *failures])


def _previous_checkpoint(checkpoint: Path) -> Path | None:
    earlier = [path for path in list_checkpoints(checkpoint.parent) if path.name < checkpoint.name]
    return earlier[-1] if earlier else None
