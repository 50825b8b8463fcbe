"""Draw a contact sheet of a folder of videos: one row of frames per video.

python scripts/contact_sheet.py outputs/demo [--output outputs/demo/contact_sheet.png] [--columns 8] [--videos 10]
"""

import argparse
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.arguments import require_range
from utils.contact_sheet import read_strip, save_contact_sheet
from utils.errors import UserError, command
from utils.files import output_file


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="folder of mp4 files")
    parser.add_argument("--output", help="PNG file; default: contact_sheet.png in the folder")
    parser.add_argument("--columns", type=int, default=8, help="frames per video")
    parser.add_argument("--videos", type=int, help="number of videos, spread evenly over the names; default: all")
    args = parser.parse_args()
    folder = Path(args.folder)
    videos = sorted(path for path in folder.glob("*.mp4") if not path.name.startswith("."))
    if not videos:
        raise UserError(f"no mp4 files in {folder}; generate some with inference.py")
    require_range(args, 2, 100, "columns")
    require_range(args, 1, math.inf, "videos")
    output = output_file(args.output or folder / "contact_sheet.png")
    if args.videos is not None and args.videos < len(videos):
        videos = [videos[(2 * i + 1) * len(videos) // (2 * args.videos)] for i in range(args.videos)]
    save_contact_sheet(output, [read_strip(video, args.columns) for video in videos], columns=args.columns)
    print(f"wrote {output}: {len(videos)} videos")


if __name__ == "__main__":
    main()
