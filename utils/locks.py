"""Locks of folders and files. A lock file names its holder, and the lock ends with the holder's process."""

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from utils.distributed import rank
from utils.errors import UserError
from utils.files import open_own_file

_RETRIES = 20  # 10 ms apart: another process may test the lock just now


@contextlib.contextmanager
def lock_folder(folder: Path, activity: str, keep: bool = True) -> Iterator[None]:
    """Lock `folder` for this process inside the `with` block.

    Args:
        activity: what holds the lock, for the error message, such as "training in".
        keep: leave the unlocked file; false deletes it.

    Raises:
        UserError: if another process holds the lock, or `.lock` is a symbolic link. It names the holder.
    """
    with lock_file(folder / ".lock", f"{activity} {folder}", keep):
        yield


@contextlib.contextmanager
def lock_output(folder: Path, activity: str) -> Iterator[None]:
    """Lock an output folder for all ranks of this run inside the `with` block. Rank 0 holds the lock.

    Raises:
        UserError: on rank 0, if another run holds the lock; torchrun then ends the other ranks.
    """
    with lock_folder(folder, activity, keep=False) if rank() == 0 else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def lock_file(path: Path, activity: str, keep: bool = True) -> Iterator[None]:
    """Hold the lock `path` inside the `with` block. A file system without locks locks nothing.

    Args:
        activity: what the holder does, for the error message, such as "making cat.mp4".
        keep: leave the unlocked file; false deletes it.

    Raises:
        UserError: if another process holds the lock, or `path` is a symbolic link. It names the holder.
    """
    with _open_locked(path, activity) as file:
        file.truncate(0)
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {started}\n")
        file.flush()
        try:
            yield
        finally:
            if keep:
                file.truncate(0)
            else:
                path.unlink(missing_ok=True)  # before it is unlocked; see `_open_locked`


def check_unlocked(path: Path, activity: str) -> None:
    """Check that no other process holds the lock `path`.

    Raises:
        UserError: if one does. It names the holder.
    """
    if path.exists():
        with contextlib.suppress(FileNotFoundError), lock_file(path, activity, keep=False):
            pass


def _open_locked(path: Path, activity: str) -> IO[str]:
    """Return the open and locked file `path`."""
    for last in range(_RETRIES):
        file: IO[str] = open_own_file(path, "a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            if last == _RETRIES - 1:
                raise UserError(
                    f"another process is {activity}{_holder(path)}; wait for it or end it, then run the same command "
                    "again"
                ) from None
            time.sleep(0.01)
            continue
        except OSError:  # the file system has no locks
            return file
        # The last holder may have deleted the file between `open` and `flock`; then this lock protects nothing.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()
    raise UserError(f"{path} changes all the time; end the other processes that are {activity}")


def _holder(path: Path) -> str:
    """Return the first line of a lock file in brackets; empty if it is not readable text."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        line = " ".join(file.readline(200).decode(errors="replace").split())
        return f" ({line})" if line and line.isprintable() else ""
    return ""
