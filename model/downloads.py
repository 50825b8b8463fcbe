"""Downloads of public weights and prompts from the Hugging Face Hub."""

import fnmatch
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import httpx
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

from utils.errors import UserError
from utils.files import writable_folder


@dataclass(frozen=True)
class Download:
    """A model folder (`file` is None) or one file of a repository, and its destination."""

    repo: str
    destination: str
    license: str
    file: str | None = None


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
    # Public guides give different subfolders for the prompts, so the file is searched by its name.
    "prompts": Download(
        "gdhe17/Self-Forcing", "prompts/vidprom_filtered_extended.txt", _SELF_FORCING, "*vidprom_filtered_extended.txt"
    ),
}
MODEL_FILES = ["*.json", "*.safetensors", "*.pth", "*.model", "*.txt", "LICENSE*"]


def fetch_weights(download: Download, root: Path) -> Path:
    """Download to `root / download.destination` and return this path. An existing file is not downloaded again.

    Raises:
        UserError: if the network fails, or the repository or the file does not exist.
    """
    page, target = f"https://huggingface.co/{download.repo}", root / download.destination
    if download.file is not None and target.exists():
        return target
    try:
        # Request the revision first: without network, snapshot_download would return an incomplete folder.
        repo = HfApi().model_info(download.repo)
        if download.file is None:
            writable_folder(target)
            snapshot_download(download.repo, revision=repo.sha, local_dir=target, allow_patterns=MODEL_FILES)
            return target
        names = fnmatch.filter((file.rfilename for file in repo.siblings or ()), download.file)
        if not names:
            raise UserError(f"{page} has no file {download.file}; look for its new name on that page")
        # hf_hub_download keeps the path inside the repository, so a single file is moved afterwards.
        staging = writable_folder(target.parent / f".{target.name}.download")
        os.replace(hf_hub_download(download.repo, names[0], revision=repo.sha, local_dir=staging), target)
        shutil.rmtree(staging)
        return target
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
