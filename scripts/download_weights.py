"""Download public weights and prompts from the Hugging Face Hub to the paths in the configs.

    python scripts/download_weights.py --list
    python scripts/download_weights.py wan-1.3b hiar

Run the same command again to resume an interrupted download.

A manifest beside each download, such as ckpts/hiar.pt.manifest.json, holds the revision and the sha256 of every file.
Keep it under version control: with it, the same command downloads the same files anywhere, or fails. Loading compares
sizes, and the sha256 of files that are small or changed later; --check compares the sha256 of all files.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from model.downloads import DOWNLOADS, downloads_table, fetch_weights
from utils.download_manifest import check_download
from utils.errors import UserError, command


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="downloads, see --list")
    parser.add_argument("--revision", help="commit, branch or tag to download; default: the manifest's, or the newest")
    parser.add_argument("--check", action="store_true", help="download nothing; compare all files with the manifest")
    parser.add_argument("--list", action="store_true", help="list all downloads and exit")
    parser.add_argument("--root", type=Path, default=Path(), help="folder for all downloads (default: current folder)")
    args = parser.parse_args()
    if args.list:
        print(downloads_table())
        return
    unknown = [name for name in args.names if name not in DOWNLOADS]
    if unknown or not args.names:
        problem = f"unknown name {unknown[0]}" if unknown else "no name given"
        raise UserError(f"{problem}; choose from {', '.join(DOWNLOADS)}")
    if args.revision and (len(args.names) > 1 or args.check):
        raise UserError("--revision needs exactly one NAME and no --check: each repository has its own revisions")
    for name in args.names:
        if args.check:
            check_download(args.root / DOWNLOADS[name].destination)
            print(f"{name}: all files are those of the manifest")
        else:
            path = fetch_weights(DOWNLOADS[name], args.root, args.revision)
            print(f"{name}: {path} (licence: {DOWNLOADS[name].license})")


if __name__ == "__main__":
    main()
