"""Fetch public weights and prompts from the Hugging Face Hub to where the configs look for them.

    python scripts/download_weights.py --list
    python scripts/download_weights.py wan-1.3b hiar

Interrupted downloads go on where they stopped when the same command is run again.
"""

import argparse
import fnmatch
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import httpx
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.errors import UserError, command
from utils.files import writable_folder


@dataclass(frozen=True)
class Download:
    """A model folder (`file` is None) or one file of a repository, and where it goes."""

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
    # Guides disagree on whether the prompts are in a subfolder, so the file is found by its name.
    "prompts": Download(
        "gdhe17/Self-Forcing", "prompts/vidprom_filtered_extended.txt", _SELF_FORCING, "*vidprom_filtered_extended.txt"
    ),
}
MODEL_FILES = ["*.json", "*.safetensors", "*.pth", "*.model", "*.txt", "LICENSE*"]


def fetch(download: Download, root: Path) -> Path:
    """Download to `root / download.destination` unless the file is there, and return that path.

    Raises:
        UserError: no network, no such repository, or no such file in it.
    """
    page, target = f"https://huggingface.co/{download.repo}", root / download.destination
    if download.file is not None and target.exists():
        return target
    try:
        # Asked first and pinned: without it an unreachable hub would pass a half-filled folder off as complete.
        repo = HfApi().model_info(download.repo)
        if download.file is None:
            writable_folder(target)
            snapshot_download(download.repo, revision=repo.sha, local_dir=target, allow_patterns=MODEL_FILES)
            return target
        names = fnmatch.filter((file.rfilename for file in repo.siblings or ()), download.file)
        if not names:
            raise UserError(f"{page} has no file {download.file}; look on its page")
        # A single file keeps its path in the repository, so it lands in a folder beside its destination first.
        staging = writable_folder(target.parent / f".{target.name}.download")
        os.replace(hf_hub_download(download.repo, names[0], revision=repo.sha, local_dir=staging), target)
        shutil.rmtree(staging)
        return target
    except RepositoryNotFoundError:
        raise UserError(f"{page} is not there or not open to you; to log in: hf auth login") from None
    except (httpx.HTTPError, ConnectionError, TimeoutError, LocalEntryNotFoundError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(
            f"cannot download {page} ({reason}); check the network and run the same command again"
        ) from None


def table() -> str:
    """The downloads as an aligned table: name, repository, destination, licence."""
    rows = [("name", "repository", "destination", "licence")]
    rows += [(name, item.repo, item.destination, item.license) for name, item in DOWNLOADS.items()]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="what to fetch; see --list")
    parser.add_argument("--list", action="store_true", help="show what can be fetched, and exit")
    parser.add_argument("--root", type=Path, default=Path(), help="folder under which to put it (default: here)")
    args = parser.parse_args()
    if args.list:
        print(table())
        return
    unknown = [name for name in args.names if name not in DOWNLOADS]
    if unknown or not args.names:
        raise UserError(
            f"{'unknown name ' + unknown[0] if unknown else 'nothing named'}; choose from {', '.join(DOWNLOADS)}"
        )
    for name in args.names:
        print(f"{name}: {fetch(DOWNLOADS[name], args.root)} (licence: {DOWNLOADS[name].license})")


if __name__ == "__main__":
    main()
