"""Generate videos for a file of prompts.

python inference.py --config_path configs/hiar.yaml --checkpoint_path ckpts/hiar.pt --data_path data/prompts.txt \\
    --output_folder outputs/ --num_output_frames 81 --use_ema

Videos that exist are skipped, so the same command goes on where it stopped. Under torchrun the prompts are shared out
among the ranks. A video's JSON makes it again: python inference.py --config_path X.json --output_folder again/
"""

import argparse

from pipeline.command_line import check_arguments, resolve_config, shared_arguments, work_items
from utils.config import read_metadata
from utils.distributed import rank, world_size
from utils.errors import UserError, command


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[shared_arguments()]
    )
    parser.add_argument("--output_folder", help="where videos go")
    parser.add_argument("--batch_size", type=int, default=1, help="videos at a time; changes them by rounding only")
    parser.add_argument("--order", choices=["step_major", "diagonal"], help="same video; diagonal streams it")
    args = parser.parse_intermixed_args()
    check_arguments(args)
    return args


@command
def main() -> None:
    args = parse_arguments()
    config = resolve_config(args)
    if args.dry_run:
        print(config.to_yaml(), end="")
        return
    if not args.output_folder:
        raise UserError("say where videos go: --output_folder DIR")
    record = read_metadata(args.config_path)
    items = work_items(args, record)

    # Heavy imports wait until the arguments are known to be good.
    from pipeline.generate import generate_videos

    condition = args.image or args.video or (record or {}).get("condition") or ""
    if not config.model.generator and rank() == 0:
        print("no generator weights given (--checkpoint_path): taking the base's own transformer")
    generate_videos(
        config,
        items[rank() :: world_size()],
        folder=args.output_folder,
        condition=condition,
        save_latents=args.save_latents,
        overwrite=args.overwrite,
        batch_size=args.batch_size,
    )


if __name__ == "__main__":
    main()
