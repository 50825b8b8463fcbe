"""Show videos of several methods side by side, with labels above and the prompt below.

python scripts/compare_videos.py block_first=outputs/a timestep_first=outputs/b --output outputs/side_by_side
python scripts/compare_videos.py before=old.mp4 after=new.mp4 --output before_after.mp4

Folders hold X.mp4 with the metadata X.json, as inference.py writes them. Their videos are paired by prompt, seed and
sample. Each common video gives one output file, named as in the first folder. Single files give one output file. All
panels have the height of the tallest video. A video that has ended shows its last frame, darkened. Existing results are
kept.
"""

import argparse
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evaluation.comparisons import plan_comparisons, write_comparisons
from evaluation.videos import parse_labelled_path
from utils.arguments import require_range
from utils.errors import command


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="+", metavar="[name=]folder", help="folders, or files: [name=]file.mp4")
    parser.add_argument("--output", default="outputs/side_by_side", help="folder; for files also an mp4 file")
    parser.add_argument("--columns", type=int, default=0, help="panels per row; default: one row of up to four")
    parser.add_argument(
        "--scale", type=int, default=0, help="enlargement; default: smallest factor with legible labels"
    )
    parser.add_argument("--fps", type=float, default=0, help="frames per second; default: highest rate of the videos")
    parser.add_argument("--limit", type=int, default=0, help="write only the first videos; default: all")
    parser.add_argument("--timestamp", action="store_true", help="show the time at the lower right")
    parser.add_argument("--overwrite", action="store_true", help="replace existing results")
    args = parser.parse_args()
    require_range(args, 0, math.inf, "columns", "limit")
    require_range(args, 0, 64, "scale")
    require_range(args, 0, 999, "fps")
    comparisons = plan_comparisons([parse_labelled_path(word) for word in args.methods], args.output)
    write_comparisons(
        comparisons[: args.limit or None],
        args.overwrite,
        columns=args.columns or None,
        scale=args.scale or None,
        fps=args.fps or None,
        timestamp=args.timestamp,
    )


if __name__ == "__main__":
    main()
