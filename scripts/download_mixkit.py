"""Download CausVid's public training videos (Mixkit, some 6000 clips) from the Hugging Face Hub, and unpack them.

    python scripts/download_mixkit.py --local_dir data/mixkit

Writes data/mixkit/videos. Run the same command again to resume. The manifest data/mixkit.manifest.json holds the
revision and the sha256 of every archive: with it, the same command downloads the same files anywhere, or fails.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trainer.datasets.mixkit import FOLDER, REPO, download_videos
from utils.errors import command


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--local_dir", type=Path, default=Path("data/mixkit"), help="folder for archives and videos")
    parser.add_argument("--repo_id", default=REPO, help="data set on the hub")
    parser.add_argument("--folder_name", default=FOLDER, help="folder of the archives in the data set")
    parser.add_argument("--revision", help="commit, branch or tag; default: the manifest's, or the newest")
    args = parser.parse_args()
    videos, count = download_videos(args.local_dir.absolute(), args.repo_id, args.folder_name, args.revision)
    print(f"{count} files in {videos} (licence: see https://huggingface.co/datasets/{args.repo_id})")


if __name__ == "__main__":
    main()
