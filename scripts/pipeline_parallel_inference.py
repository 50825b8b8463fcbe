"""Generate videos with a pipeline of ranks, which run different denoising steps at the same time.

torchrun --nproc_per_node=4 scripts/pipeline_parallel_inference.py --config_path configs/hiar.yaml \\
    --checkpoint_path ckpts/hiar.pt --prompt "a cat on a skateboard" --output_path outputs/ --num_output_frames 81

The videos do not depend on the number of ranks. --plan prints the role of each rank. Existing videos are skipped, so
the same command resumes an interrupted run. docs/pipeline.md explains the method.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.command_line import (
    check_arguments,
    output_files,
    requested_prefix,
    requested_videos,
    resolve_config,
    shared_arguments,
)
from utils.config import Config
from utils.config_files import read_metadata
from utils.distributed import rank
from utils.errors import UserError, command


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[shared_arguments()]
    )
    parser.add_argument("--output_path", help="folder for videos, or FILE.mp4 for a single video")
    parser.add_argument("--noise_seed", help="another name of --seed")
    dac = parser.add_mutually_exclusive_group()
    dac.add_argument("--dac_optimize", action="store_true", help="the default; --no_dac turns it off")
    dac.add_argument("--no_dac", action="store_true", help="send each block only after its context write (slower)")
    parser.add_argument("--profile", action="store_true", help="time every op on every rank")
    parser.add_argument("--profile_output", default="profile", metavar="PREFIX", help="path prefix of profile files")
    parser.add_argument(
        "--vae_decode_chunk_size", metavar="N", help="has no effect: each block is decoded as it finishes"
    )
    parser.add_argument("--plan", action="store_true", help="print the role of each rank and exit")
    args = parser.parse_intermixed_args()
    check_arguments(args)
    args.seed = args.noise_seed or args.seed
    return args


def generate(args: argparse.Namespace, config: Config) -> None:
    """Run the pipeline, or print its plan."""
    # Import heavy modules after the arguments are checked, so that errors appear at once.
    from pipeline.parallel.profile import profile_table
    from pipeline.parallel.runner import PipelineRequest, describe_plan, run_pipelines

    metadata = read_metadata(args.config_path)
    prefix_path = requested_prefix(args, metadata)
    if args.plan:
        plan = describe_plan(config, bool(prefix_path) or args.i2v is not None)
        print(plan + "\n" if rank() == 0 else "", end="")
        return
    prefix = args.profile_output if args.profile else ""
    options = prefix_path, args.save_latents, args.overwrite, args.no_dac, prefix
    videos = requested_videos(args, metadata)
    if not args.output_path:
        raise UserError("no output: add --output_path FOLDER, or FILE.mp4 for a single video")
    request = PipelineRequest(config, *output_files(args.output_path, videos), *options)
    summary, profiles = run_pipelines(request)
    if rank() == 0:
        print(summary)
    if profiles:
        from evaluation.plots import save_timeline_plot

        print(profile_table(profiles))
        save_timeline_plot(Path(f"{prefix}.png"), [p.timeline_row() for p in profiles])
        print(f"wrote {prefix}.png and {prefix}_rank*.json")


@command
def main() -> None:
    try:
        args = parse_arguments()
        config = resolve_config(args)
        if not args.dry_run:
            generate(args, config)
        elif rank() == 0:
            print(config.to_yaml(), end="")
    except UserError:
        if rank() == 0:  # all ranks raise the same error, so only one prints it
            raise
        sys.exit(2)


if __name__ == "__main__":
    main()
