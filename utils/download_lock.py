"""Lock files of downloads: the repository, its revision, and the size and sha256 of every file.

The lock file of `ckpts/hiar.pt` is `ckpts/hiar.pt.lock.json`; that of the folder `wan_models/X` is
`wan_models/X.lock.json`. A later download uses the same revision and must give the same files. Loading compares the
sizes of all files, and the sha256 of small files and of files that changed after the lock file was written.
"""

import contextlib
import functools
import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from utils.errors import UserError
from utils.files import read_json, write_json

SMALL_BYTES = 16 * 2**20
"""Files up to this size are hashed whenever they are loaded; it takes some hundredths of a second."""


@dataclass(frozen=True)
class LockedFile:
    """Size in bytes and sha256 (hexadecimal) of a file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class DownloadLock:
    """The content of a lock file. `files` has the paths in the repository."""

    repo: str
    revision: str
    files: Mapping[str, LockedFile]

    def paths(self, target: Path) -> dict[Path, LockedFile]:
        """Return the locked files by their paths on the disk; `target` is the downloaded file or folder."""
        if target.is_file():
            return dict.fromkeys([target], *self.files.values())
        return {target / name: locked for name, locked in self.files.items()}


def lock_path(target: Path) -> Path:
    """Return the path of the lock file of a downloaded file or folder."""
    return target.with_name(f"{target.name}.lock.json")


def hash_files(folder: Path, names: Iterable[str]) -> dict[str, LockedFile]:
    """Return the sizes and hashes of files in a folder."""
    return {name: _hash_file(folder / name) for name in sorted(names)}


def write_lock(target: Path, lock: DownloadLock) -> None:
    """Write the lock file of a download."""
    files = {name: {"size": locked.size, "sha256": locked.sha256} for name, locked in lock.files.items()}
    write_json(lock_path(target), {"repo": lock.repo, "revision": lock.revision, "files": files})


def read_lock(target: Path) -> DownloadLock | None:
    """Return the lock of a download, or None if it has no lock file.

    Raises:
        UserError: if the file is no lock file.
    """
    path = lock_path(target)
    if not path.is_file():
        return None
    content = read_json(path, "lock file of a download")
    try:
        files = {str(name): LockedFile(int(e["size"]), str(e["sha256"])) for name, e in content["files"].items()}
        lock = DownloadLock(str(content["repo"]), str(content["revision"]), files)
    except (KeyError, TypeError, ValueError, AttributeError):
        lock = None
    if lock is None or not lock.files or (target.is_file() and len(lock.files) > 1):
        raise UserError(f"{path} is not the lock file of a download; delete it, and {target} to download it again")
    return lock


def check_loaded(path: str | Path) -> None:
    """Compare a file or folder with the lock file of its download, if there is one, before it is loaded.

    Absent files are skipped: the loader reports those that it needs.

    Raises:
        UserError: naming the first file that differs.
    """
    path = Path(os.path.abspath(path))
    for target in (path, *path.parents[:-1]):
        lock = read_lock(target)
        if lock is None:
            continue
        locked_at = lock_path(target).stat().st_mtime_ns
        for file, locked in lock.paths(target).items():
            if file.is_relative_to(path) and file.is_file():
                changed_later = file.stat().st_mtime_ns > locked_at
                _check_file(file, locked, lock_path(target), with_hash=locked.size <= SMALL_BYTES or changed_later)


def check_download(target: Path) -> None:
    """Compare every file of a download with its lock file, by size and sha256.

    Raises:
        UserError: if there is no lock file, a file is missing, or a file differs.
    """
    lock, path = read_lock(target), lock_path(target)
    if lock is None:
        raise UserError(f"{target} has no lock file {path}; delete {target} and download it again")
    for file, locked in lock.paths(target).items():
        if not file.is_file():
            raise UserError(f"{file} is missing; run the download again without --check")
        _check_file(file, locked, path, with_hash=True)
    with contextlib.suppress(OSError):
        path.touch()  # copied files may be newer than the lock file; they need not be hashed when they are loaded


def _check_file(file: Path, locked: LockedFile, lock: Path, with_hash: bool) -> None:
    size = file.stat().st_size
    if size != locked.size:
        difference = f"it has {size} bytes, not {locked.size}"
    elif with_hash and (found := _hash_file(file).sha256) != locked.sha256:
        difference = f"its sha256 is {found}, not {locked.sha256}"
    else:
        return
    raise UserError(
        f"{file} is not the downloaded file: {difference}; delete it and download it again, or delete {lock} if you "
        "changed the file yourself"
    )


def _hash_file(file: Path) -> LockedFile:
    status = file.stat()
    return LockedFile(status.st_size, _sha256(file, status.st_size, status.st_mtime_ns))


@functools.cache
def _sha256(file: Path, size: int, mtime_ns: int) -> str:
    """Return the sha256 of a file. The size and time are keys of the cache: a run loads from a folder several times."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
