"""Download public weights and prompts from the Hugging Face Hub to the paths in the configs.

    python scripts/download_weights.py --list
    python scripts/download_weights.py wan-1.3b hiar

Run the same command again to resume an interrupted download.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from model.downloads import DOWNLOADS, downloads_table, fetch_weights
from utils.errors import UserError, command


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="downloads, see --list")
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
    for name in args.names:
        print(f"{name}: {fetch_weights(DOWNLOADS[name], args.root)} (licence: {DOWNLOADS[name].license})")


if __name__ == "__main__":
    main()
