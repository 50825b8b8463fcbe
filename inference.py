"""Generate videos from one prompt, or from a file of prompts.

python inference.py --config_path configs/shapes.yaml --output_folder outputs/ --prompt "a red circle moving right fast"

python inference.py --config_path configs/hiar.yaml --checkpoint_path ckpts/hiar.pt --data_path data/prompts.txt \\
    --output_folder outputs/ --num_output_frames 81 --use_ema

Existing videos are skipped, so the same command resumes an interrupted run. Under torchrun the ranks share the videos.
The metadata of a video reproduces it: python inference.py --config_path X.json --output_folder again/
docs/config.md lists all configuration keys.
"""

import argparse
import math

from pipeline.command_line import (
    check_arguments,
    output_files,
    requested_prefix,
    requested_videos,
    resolve_config,
    shared_arguments,
)
from utils.config_files import read_metadata
from utils.distributed import rank, world_size
from utils.errors import UserError, command


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[shared_arguments()]
    )
    parser.add_argument("--output_folder", metavar="FOLDER", help="folder for the videos")
    parser.add_argument("--output_path", metavar="FILE.mp4", help="file of a single video, instead of --output_folder")
    parser.add_argument("--batch_size", type=int, default=1, help="videos generated at once; equal up to rounding")
    order = "same videos; diagonal writes blocks early; batched runs a diagonal in one pass"
    parser.add_argument("--order", choices=["step_major", "diagonal", "batched"], help=order)
    parser.add_argument(
        "--memory", type=float, metavar="GB", help="print the GPU memory and the nearest options that fit into GB; exit"
    )
    args = parser.parse_intermixed_args()
    if args.memory is not None and not 0 < args.memory < math.inf:  # NaN excluded
        raise UserError(f"--memory must be a positive number of gigabytes, not {args.memory}")
    if args.output_path and args.output_folder:
        raise UserError("give --output_folder or --output_path, not both")
    check_arguments(args)
    return args


@command(
    lowers_memory="--batch_size, --order diagonal, --window, --height and --width, model.dtype=bfloat16 or "
    "model.offload=all, or split the steps over GPUs with scripts/pipeline_parallel_inference.py"
)
def main() -> None:
    args = parse_arguments()
    config = resolve_config(args)
    if args.dry_run:
        print(config.to_yaml(), end="")
    if args.memory is not None or (args.dry_run and config.runtime.device != "cpu"):
        from pipeline.memory_options import memory_report

        print(memory_report(config, args.batch_size, args.memory))
    if args.dry_run or args.memory is not None:
        return
    if not args.output_folder and not args.output_path:
        raise UserError("no output folder: add --output_folder FOLDER")
    metadata = read_metadata(args.config_path)
    videos = requested_videos(args, metadata)
    folder = args.output_folder
    if args.output_path:
        folder, videos = output_files(args.output_path, videos)

    # Import heavy modules after the arguments are checked, so that errors appear at once.
    from pipeline.generate import generate_videos

    if not config.model.generator and rank() == 0:
        print("no generator weights given (--checkpoint_path): using the transformer of model.base")
    summary = generate_videos(
        config,
        videos[rank() :: world_size()],
        folder=folder,
        prefix_path=requested_prefix(args, metadata),
        save_latents=args.save_latents,
        overwrite=args.overwrite,
        batch_size=args.batch_size,
    )
    print(summary if world_size() == 1 else f"rank {rank()} {summary}")


if __name__ == "__main__":
    main()
