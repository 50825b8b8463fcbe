"""Manifests of downloads: the repository, its revision, and the size and sha256 of every file.

The manifest of `ckpts/hiar.pt` is `ckpts/hiar.pt.manifest.json`; that of the folder `wan_models/X` is
`wan_models/X.manifest.json`. A later download uses the same revision and must give the same files. Loading compares the
sizes of all files, and the sha256 of small files and of files that changed after the manifest was written.
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
class ListedFile:
    """Size in bytes and sha256 (hexadecimal) of a file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class DownloadManifest:
    """The content of a manifest. `files` has the paths in the repository."""

    repo: str
    revision: str
    files: Mapping[str, ListedFile]

    def paths(self, target: Path) -> dict[Path, ListedFile]:
        """Return the listed files by their paths on the disk; `target` is the downloaded file or folder."""
        if target.is_file():
            return dict.fromkeys([target], *self.files.values())
        return {target / name: listed for name, listed in self.files.items()}


def manifest_path(target: Path) -> Path:
    """Return the path of the manifest of a downloaded file or folder; older downloads have `X.lock.json`."""
    new, old = (target.with_name(f"{target.name}.{kind}.json") for kind in ("manifest", "lock"))
    return old if old.is_file() and not new.is_file() else new


def hash_files(folder: Path, names: Iterable[str]) -> dict[str, ListedFile]:
    """Return the sizes and hashes of files in a folder."""
    return {name: _hash_file(folder / name) for name in sorted(names)}


def write_manifest(target: Path, manifest: DownloadManifest) -> None:
    """Write the manifest of a download."""
    files = {name: {"size": listed.size, "sha256": listed.sha256} for name, listed in manifest.files.items()}
    write_json(manifest_path(target), {"repo": manifest.repo, "revision": manifest.revision, "files": files})


def read_manifest(target: Path) -> DownloadManifest | None:
    """Return the manifest of a download, or None if it has no manifest.

    Raises:
        UserError: if the file is no manifest.
    """
    path = manifest_path(target)
    if not path.is_file():
        return None
    content = read_json(path, "manifest of a download")
    try:
        files = {str(name): ListedFile(int(e["size"]), str(e["sha256"])) for name, e in content["files"].items()}
        manifest = DownloadManifest(str(content["repo"]), str(content["revision"]), files)
    except (KeyError, TypeError, ValueError, AttributeError):
        manifest = None
    if manifest is None or not manifest.files or (target.is_file() and len(manifest.files) > 1):
        raise UserError(f"{path} is not the manifest of a download; delete it, and {target} to download it again")
    return manifest


def check_loaded(path: str | Path) -> None:
    """Compare a file or folder with the manifest of its download, if there is one, before it is loaded.

    Absent files are skipped: the loader reports those that it needs.

    Raises:
        UserError: naming the first file that differs.
    """
    path = Path(os.path.abspath(path))
    for target in (path, *path.parents[:-1]):
        manifest = read_manifest(target)
        if manifest is None:
            continue
        written_at = manifest_path(target).stat().st_mtime_ns
        for file, listed in manifest.paths(target).items():
            if file.is_relative_to(path) and file.is_file():
                changed_later = file.stat().st_mtime_ns > written_at
                _check_file(file, listed, manifest_path(target), with_hash=listed.size <= SMALL_BYTES or changed_later)


def check_download(target: Path) -> None:
    """Compare every file of a download with its manifest, by size and sha256.

    Raises:
        UserError: if there is no manifest, a file is missing, or a file differs.
    """
    manifest, path = read_manifest(target), manifest_path(target)
    if manifest is None:
        raise UserError(f"{target} has no manifest {path}; delete {target} and download it again")
    for file, listed in manifest.paths(target).items():
        if not file.is_file():
            raise UserError(f"{file} is missing; run the download again without --check")
        _check_file(file, listed, path, with_hash=True)
    with contextlib.suppress(OSError):
        path.touch()  # copied files may be newer than the manifest; they need not be hashed when they are loaded


def _check_file(file: Path, listed: ListedFile, manifest: Path, with_hash: bool) -> None:
    size = file.stat().st_size
    if size != listed.size:
        difference = f"it has {size} bytes, not {listed.size}"
    elif with_hash and (found := _hash_file(file).sha256) != listed.sha256:
        difference = f"its sha256 is {found}, not {listed.sha256}"
    else:
        return
    raise UserError(
        f"{file} is not the downloaded file: {difference}; delete it and download it again, or delete {manifest} if "
        "you changed the file yourself"
    )


def _hash_file(file: Path) -> ListedFile:
    status = file.stat()
    return ListedFile(status.st_size, _sha256(file, status.st_size, status.st_mtime_ns))


@functools.cache
def _sha256(file: Path, size: int, mtime_ns: int) -> str:
    """Return the sha256 of a file. The size and time are keys of the cache: a run loads from a folder several times."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
