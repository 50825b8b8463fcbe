"""One picture of a folder of videos: a row of frames for each.

python scripts/contact_sheet.py outputs/demo [--output outputs/demo/contact_sheet.png] [--columns 8] [--videos 10]
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.contact_sheet import ContactSheetSampler, Strip, save_contact_sheet
from utils.errors import UserError, command
from utils.video import read_video


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="folder of mp4 files")
    parser.add_argument("--output", help="default: contact_sheet.png in the folder")
    parser.add_argument("--columns", type=int, default=8, help="frames per video")
    parser.add_argument("--videos", type=int, help="take so many of them, evenly spread by name; default: all")
    args = parser.parse_args()
    folder = Path(args.folder)
    videos = sorted(path for path in folder.glob("*.mp4") if not path.name.startswith("."))
    if not videos:
        raise UserError(f"no mp4 files in {folder}; make some with inference.py")
    if args.columns < 2:
        raise UserError(f"--columns must be at least 2, not {args.columns}")
    if args.videos is not None and args.videos < 1:
        raise UserError(f"--videos must be at least 1, not {args.videos}")
    if args.videos is not None and args.videos < len(videos):
        videos = [videos[(2 * i + 1) * len(videos) // (2 * args.videos)] for i in range(args.videos)]
    output = Path(args.output or folder / "contact_sheet.png")
    save_contact_sheet(output, [strip(video, args.columns) for video in videos], columns=args.columns)
    print(f"wrote {output}: {len(videos)} videos")


def strip(video: Path, columns: int) -> Strip:
    """A video's row, under its prompt if there is a record of it."""
    frames, fps = read_video(video)
    record = video.with_suffix(".json")
    caption = json.loads(record.read_text(encoding="utf-8"))["name"] if record.exists() else video.stem
    sampler = ContactSheetSampler(len(frames), columns, fps)
    sampler.add(frames)
    return sampler.strip(caption)


if __name__ == "__main__":
    main()
