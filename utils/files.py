"""Atomic writes, JSON files and fingerprints. An atomic write leaves a complete file or no file."""

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError

from utils.errors import UserError

_UMASK = os.umask(0)  # the umask can only be read by setting it, so this happens once, before threads start
os.umask(_UMASK)


def partial_path(path: Path) -> Path:
    """Return a new hidden path beside `path`: its name has the process ID and ten random digits.

    Nobody can guess the name and place a symbolic link there, which would overwrite another file. The suffix is kept,
    because some writers choose their format by the suffix.
    """
    return path.with_name(f".{path.stem}.{os.getpid()}{secrets.randbelow(10**10):010}.partial{path.suffix}")


def open_own_file(path: Path, mode: str) -> IO[Any]:
    """Open a file for writing as `open` does, but never through a symbolic link, and no pipe or device.

    Raises:
        UserError: if `path` is a symbolic link, a pipe, a device or a socket.
    """
    try:
        return open(path, mode, opener=_open_ordinary_file)
    except OSError as error:
        if error.errno == errno.ENXIO:  # a socket, or a pipe without a reader
            raise _not_ordinary(path) from None
        if error.errno != errno.ELOOP:
            raise
        raise UserError(f"{path} is a symbolic link, and would overwrite another file; delete the link") from None


def _open_ordinary_file(path: str, flags: int) -> int:
    file = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)  # O_NONBLOCK: do not wait for a pipe's reader
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise _not_ordinary(path)
    return file


def _not_ordinary(path: str | Path) -> UserError:
    return UserError(f"cannot write {path}: it is no ordinary file; move it or choose another name")


def refuse_device(path: Path) -> None:
    """Raise `UserError` if `path` is a pipe, a device or a socket, also through a symbolic link.

    Atomic writes would replace it: as root, even /dev/full.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise _not_ordinary(path)


def _share(path: Path) -> None:
    """Give all files of `path` the usual permissions of new files; safetensors makes files private to their owner."""
    for file in path.rglob("*") if path.is_dir() else (path,):
        if file.is_file() and not file.is_symlink():
            file.chmod(file.stat().st_mode | (0o666 & ~_UMASK))


def _full_disk_number(error: BaseException | None) -> int | None:
    """Return the error number of the full disk that caused `error`, directly or in a library; None if none did."""
    while error is not None:
        for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            if getattr(error, "errno", None) == number or f"(os error {number})" in str(error):
                return number
        error = error.__cause__ or error.__context__
    return None


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path for a file or folder; rename it to `path` if the body succeeds, else delete it.

    Raises:
        OSError: if nothing was written to the temporary path, it cannot be renamed, or the disk is full. A full disk is
            reported with `path`, also if torch or safetensors raise errors of their own.
        UserError: if `path` is a pipe or a device.
    """
    path = Path(path)
    refuse_device(path)
    temporary = partial_path(path)
    try:
        yield temporary
        _share(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError, SafetensorError) as error:
        number = _full_disk_number(error)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from None
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a UTF-8 text file atomically."""
    with atomic_path(path) as temporary, temporary.open("x", encoding="utf-8") as file:
        file.write(text)


def write_json(path: str | os.PathLike[str], content: Any, indent: int | None = 2) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(content, indent=indent, ensure_ascii=False) + "\n")


def writable_folder(path: str | os.PathLike[str]) -> Path:
    """Create the folder `path` if it does not exist, check that it is writable, and return it.

    Raises:
        UserError: if it cannot be created or is not writable.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise UserError(f"cannot write to folder {path}: {error.strerror}; choose another output folder") from None
    except ValueError:
        raise UserError(f"cannot write to folder {str(path)!r}: it holds a null byte; choose another one") from None
    return path


def output_file(path: str | os.PathLike[str]) -> Path:
    """Check that a file can be written at `path`, and return it. Creates its folder.

    Raises:
        UserError: if the folder is not writable, or `path` is a folder or a device, or its name is too long.
    """
    path = Path(path)
    writable_folder(path.parent)
    require_no_folder(path)
    return path


def require_no_folder(path: Path) -> None:
    """Raise `UserError` if no file can have this path, because a folder or a device has it, or it is too long."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it holds a null byte"
        raise UserError(f"cannot write {str(path)!r}: {reason}; choose another name") from None
    if stat.S_ISDIR(mode):
        raise UserError(f"cannot write {path}: it is a folder; move it or choose another name")
    refuse_device(path)


def fingerprint(folder: Path, patterns: Iterable[str]) -> str:
    """Return a hash of the files in a folder that match `patterns`, independent of the folder's path.

    The hash covers names, sizes, and the first and last 64 KiB of each file, so it is fast for large weights.
    """
    digest, end = hashlib.sha256(), 1 << 16
    for path in sorted(path for pattern in patterns for path in folder.glob(pattern)):
        if path.is_file() and not path.name.startswith("."):
            size = path.stat().st_size
            digest.update(f"{path.relative_to(folder).as_posix()} {size}\0".encode())
            with path.open("rb") as file:
                digest.update(file.read(end))
                file.seek(max(0, size - end))
                digest.update(file.read(end))
    return digest.hexdigest()


def read_json(path: str | os.PathLike[str], kind: str = "JSON file") -> Any:
    """Return the content of a JSON file.

    Args:
        kind: noun for the file in error messages, such as "prompt list".

    Raises:
        UserError: if the file is missing, unreadable or not valid JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {kind} {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a valid {kind}: {error}") from None
