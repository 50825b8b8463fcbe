"""Downloads of public weights and prompts from the Hugging Face Hub."""

import contextlib
import fnmatch
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
from huggingface_hub import DatasetInfo, HfApi, ModelInfo, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from utils.download_manifest import (
    DownloadManifest,
    check_download,
    hash_files,
    manifest_path,
    read_manifest,
    write_manifest,
)
from utils.errors import UserError
from utils.files import refuse_device, writable_folder


@dataclass(frozen=True)
class Download:
    """A folder of files (`file` is None) or one file of a repository, and its destination."""

    repo: str
    destination: str
    license: str
    file: str | None = None
    patterns: tuple[str, ...] = ()  # of the folder's files; default: `MODEL_FILES`
    repo_type: str = "model"  # or "dataset"

    @property
    def page(self) -> str:
        """The address of the repository."""
        return f"https://huggingface.co/{'datasets/' if self.repo_type == 'dataset' else ''}{self.repo}"


_WAN = "Apache-2.0"
_SELF_FORCING = "CC BY-NC-SA 4.0"
_UNKNOWN = "see its page"
DOWNLOADS = {
    "wan-1.3b": Download("Wan-AI/Wan2.1-T2V-1.3B", "wan_models/Wan2.1-T2V-1.3B", _WAN),
    "wan-1.3b-diffusers": Download("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "wan_models/Wan2.1-T2V-1.3B-Diffusers", _WAN),
    "wan-14b": Download("Wan-AI/Wan2.1-T2V-14B", "wan_models/Wan2.1-T2V-14B", _WAN),
    "wan-14b-diffusers": Download("Wan-AI/Wan2.1-T2V-14B-Diffusers", "wan_models/Wan2.1-T2V-14B-Diffusers", _WAN),
    "hiar": Download("jackyhate/HiAR", "ckpts/hiar.pt", _UNKNOWN, "hiar.pt"),
    "self-forcing": Download(
        "gdhe17/Self-Forcing", "ckpts/self_forcing_dmd.pt", _SELF_FORCING, "checkpoints/self_forcing_dmd.pt"
    ),
    "ode-init": Download("gdhe17/Self-Forcing", "ckpts/ode_init.pt", _SELF_FORCING, "checkpoints/ode_init.pt"),
    "causvid": Download("tianweiy/CausVid", "ckpts/causvid.pt", _UNKNOWN, "autoregressive_checkpoint/model.pt"),
    "mixkit-latents": Download(
        "tianweiy/CausVid", "data/mixkit_latents_lmdb/data.mdb", _UNKNOWN, "mixkit_latents_lmdb/data.mdb"
    ),
    "mixkit-ode": Download("tianweiy/CausVid", "data/mixkit_ode_lmdb/data.mdb", _UNKNOWN, "mixkit_ode_lmdb/data.mdb"),
    # Public guides give different subfolders for the prompts, so the file is searched by its name.
    "prompts": Download(
        "gdhe17/Self-Forcing", "prompts/vidprom_filtered_extended.txt", _SELF_FORCING, "*vidprom_filtered_extended.txt"
    ),
}
MODEL_FILES = ["*.json", "*.safetensors", "*.pth", "*.model", "*.txt", "LICENSE*"]


def fetch_weights(download: Download, root: Path, revision: str | None = None) -> Path:
    """Download to `root / download.destination`, write its manifest, and return the path.

    If there is a manifest already, its revision is downloaded, and the files must be those of the manifest. Nothing
    is downloaded if they all exist.

    Args:
        revision: a commit, branch or tag; default: that of the manifest, else the newest.

    Raises:
        UserError: without network, if the repository, revision or file does not exist, or if a file differs from the
            manifest.
    """
    target = root / download.destination
    refuse_device(target)
    manifest = read_manifest(target)
    if manifest is not None and manifest.repo != download.repo:
        raise UserError(f"{manifest_path(target)} is of {manifest.repo}, not {download.repo}; delete it and {target}")
    if manifest is None and target.is_file():
        if revision is not None:
            raise UserError(f"{target} exists without a manifest, so its revision is unknown; delete it first")
        return target  # downloaded by hand
    complete = manifest is not None and all(file.is_file() for file in manifest.paths(target))
    if complete and revision in (None, manifest.revision if manifest else None):
        check_download(target)
        return target
    with _hub_errors(download.page, revision):
        # Request the revision first: without network, snapshot_download would return an incomplete folder.
        wanted = revision or (manifest.revision if manifest else None)
        repo = HfApi().repo_info(download.repo, revision=wanted, repo_type=download.repo_type, files_metadata=True)
        assert isinstance(repo, (ModelInfo, DatasetInfo))
        if manifest is not None and repo.sha != manifest.revision:
            raise UserError(
                f"{manifest_path(target)} pins revision {manifest.revision}, but {wanted} is {repo.sha}; to change it, "
                f"delete the manifest and {target}"
            )
        return _download(download, target, repo, manifest)


def _download(
    download: Download, target: Path, repo: ModelInfo | DatasetInfo, manifest: DownloadManifest | None
) -> Path:
    """Download one revision and compare its files with the hub's hashes and the manifest, or write the manifest."""
    hashes = {file.rfilename: file.lfs.sha256 if file.lfs else None for file in repo.siblings or ()}
    patterns = list(download.patterns) or MODEL_FILES if download.file is None else [download.file]
    names = [name for name in hashes if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
    if not names:
        raise UserError(f"{download.page} has no file {', '.join(patterns)}; look for its new name on that page")
    if download.file is None:
        folder = writable_folder(target)
        snapshot_download(
            download.repo, revision=repo.sha, repo_type=download.repo_type, local_dir=target, allow_patterns=patterns
        )
    else:
        # hf_hub_download keeps the path inside the repository, so a single file is moved afterwards.
        folder, names = target.parent / f".{target.name}.download", names[:1]
        if folder.is_symlink():
            raise UserError(f"{folder} is a symbolic link, and would overwrite other files; delete the link")
        hf_hub_download(download.repo, names[0], revision=repo.sha, local_dir=writable_folder(folder))
    found = DownloadManifest(download.repo, str(repo.sha), hash_files(folder, names))
    expected = {name: sha256 for name, sha256 in hashes.items() if sha256}
    expected |= {name: listed.sha256 for name, listed in (manifest.files if manifest else {}).items()}
    for name, file in found.files.items():
        if file.sha256 != expected.get(name, file.sha256):
            raise UserError(
                f"{folder / name} has sha256 {file.sha256}, not {expected[name]}; delete it and download it again"
            )
    if manifest is None:
        write_manifest(target, found)
    if download.file is not None:
        os.replace(folder / names[0], target)
        shutil.rmtree(folder)
    return target


@contextlib.contextmanager
def _hub_errors(page: str, revision: str | None) -> Iterator[None]:
    """Turn the hub's errors into one line."""
    try:
        yield
    except RevisionNotFoundError:
        raise UserError(f"{page} has no revision {revision}; give a commit, branch or tag of its page") from None
    except HFValidationError as error:
        raise UserError(f"cannot download {page}: {str(error).splitlines()[0]}") from None
    except RepositoryNotFoundError:
        raise UserError(f"{page} does not exist, or you have no access; to log in: hf auth login") from None
    except (httpx.HTTPError, ConnectionError, TimeoutError, LocalEntryNotFoundError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(
            f"cannot download {page} ({reason}); check the network and run the same command again"
        ) from None


def downloads_table() -> str:
    """Return an aligned table of all downloads: name, repository, destination, licence."""
    rows = [("name", "repository", "destination", "licence")]
    rows += [(name, item.repo, item.destination, item.license) for name, item in DOWNLOADS.items()]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
