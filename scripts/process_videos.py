"""Turn a folder of videos of any size, frame rate, length and codec into clips of one size for training.

    python scripts/process_videos.py --input_dir videos --output_dir clips --num_workers 8
    python scripts/process_videos.py --input_dir videos --output_dir clips --num_shards 4 --shard 0

Each video gives its first 81 frames at 16 fps, or all such segments with --all_segments. Shorter videos and videos of
another aspect ratio are skipped. Broken videos are listed at the end. Captions are copied to captions.json. Finished
clips are kept, so the same command resumes. Several processes may share a folder; under torchrun the ranks share it.
"""

import argparse
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trainer.datasets.process_videos import ClipFormat, any_clip, process_videos, summary
from utils.arguments import require_range
from utils.distributed import rank, world_size
from utils.errors import UserError, command
from utils.files import writable_folder


def parse_arguments() -> argparse.Namespace:
    """Parse and check the command line."""
    form = ClipFormat()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input_dir", type=Path, required=True, help="folder of videos; subfolders are searched too")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for the clips")
    parser.add_argument("--num_frames", "--frames", type=int, default=form.num_frames, help="frames per clip, 4n+1")
    parser.add_argument("--height", type=int, default=form.height, help="pixels, a multiple of 16")
    parser.add_argument("--width", type=int, default=form.width, help="pixels, a multiple of 16")
    parser.add_argument("--fps", type=float, default=form.fps, help="frames per second")
    parser.add_argument(
        "--aspect_tolerance",
        type=float,
        default=form.aspect_tolerance,
        help="skip videos with an aspect ratio that differs from WIDTH/HEIGHT by more than this part; inf keeps all",
    )
    parser.add_argument("--all_segments", action="store_true", help="cut each video into consecutive clips")
    parser.add_argument("--crf", type=int, default=form.crf, help="quality of x264, from 0 (lossless) to 51")
    parser.add_argument("--captions", type=Path, help="JSON or CSV; default: captions.json or a .txt beside each video")
    parser.add_argument("--num_workers", type=int, default=1, help="processes")
    parser.add_argument("--num_shards", type=int, help="split the videos into this many parts; default: the ranks")
    parser.add_argument("--shard", type=int, help="number of the part to process, from 0; default: the rank")
    args = parser.parse_args()
    require_range(args, 1, 100_000, "num_frames")
    require_range(args, 16, 16384, "height", "width")
    require_range(args, 0.1, 999, "fps")
    require_range(args, 0, math.inf, "aspect_tolerance")
    require_range(args, 0, 51, "crf")
    require_range(args, 1, 1024, "num_workers")
    require_range(args, 1, 1_000_000, "num_shards")
    if args.num_frames % 4 != 1:
        raise UserError(f"--num_frames must be 4n+1 for the VAE, such as 81, not {args.num_frames}")
    if args.height % 16 or args.width % 16:
        raise UserError(f"--height and --width must be multiples of 16, not {args.height}x{args.width}")
    if (args.num_shards is None) != (args.shard is None):
        raise UserError("--num_shards and --shard belong together")
    require_range(args, 0, (args.num_shards or 1) - 1, "shard")
    return args


@command
def main() -> None:
    args = parse_arguments()
    settings = (args.num_frames, args.height, args.width, args.fps, args.aspect_tolerance, args.all_segments, args.crf)
    outcomes = process_videos(
        args.input_dir,
        writable_folder(args.output_dir),
        ClipFormat(*settings),
        captions=args.captions,
        shard=rank() if args.shard is None else args.shard,
        num_shards=args.num_shards or world_size(),
        workers=args.num_workers,
    )
    print(summary(outcomes))
    if outcomes and not any_clip(outcomes) and world_size() == 1:
        raise UserError(f"none of the {len(outcomes)} videos in {args.input_dir} gave a clip; the reasons are above")


if __name__ == "__main__":
    main()
