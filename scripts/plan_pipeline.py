"""Predict the speed of a pipeline on 1 to 8 ranks from measured op times.

python scripts/plan_pipeline.py --config_path configs/hiar.yaml --profile profile_rank*.json --num_output_frames 81
python scripts/plan_pipeline.py --config_path configs/hiar.yaml --denoise 0.2 --context 0.18 --decode 0.1

Op times come from a profile (pipeline_parallel_inference.py --profile, on any number of ranks), or from the command
line in seconds. The simulation runs each rank's ops in their real order. The transfer of a block takes --latency plus
its bytes divided by --bandwidth.
"""

import argparse
import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.build import build_schedule, latent_size
from pipeline.parallel.profile import RankProfile
from pipeline.parallel.runner import check_pipeline_keys
from pipeline.parallel.simulation import OpTimes, median_times, prediction_table, simulate
from pipeline.parallel.work import decode_passes
from utils.arguments import MAX_COUNT, require_range
from utils.config_loading import load_config
from utils.errors import UserError, command


def parse_arguments() -> argparse.Namespace:
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config_path", required=True, help="YAML under configs/")
    parser.add_argument("--profile", type=Path, nargs="+", help="profile files of all ranks")
    parser.add_argument("--denoise", type=float, help="seconds of a denoising pass, if there is no profile")
    parser.add_argument("--context", type=float, help="seconds of a context write, if there is no profile")
    parser.add_argument("--decode", type=float, help="seconds to decode a block, if there is no profile")
    parser.add_argument("--num_output_frames", type=int, help="latent frames; default: from the configuration")
    parser.add_argument("--ranks", type=int, default=8, help="largest number of ranks (default: %(default)s)")
    parser.add_argument("--bandwidth", type=float, default=10.0, help="between ranks, in GB/s (default: %(default)s)")
    parser.add_argument("--latency", type=float, default=5e-5, help="between ranks, in seconds (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the configuration")
    args = parser.parse_intermixed_args()
    require_range(args, 1, 1000, "ranks")
    require_range(args, 1, MAX_COUNT, "num_output_frames")
    require_range(args, 1e-9, MAX_COUNT, "bandwidth")
    require_range(args, 0, MAX_COUNT, "latency", "denoise", "context", "decode")
    return args


def op_times(args: argparse.Namespace) -> OpTimes:
    """Return the seconds per op, from a profile or from the command line."""
    if args.profile:
        times = median_times(span for path in args.profile for span in RankProfile.load(path).spans)
        if not times.denoise and not times.context_and_denoise:
            raise UserError(f"no denoise passes in {', '.join(map(str, args.profile))}; give the profiles of all ranks")
        return times
    if None in (args.denoise, args.context, args.decode):
        raise UserError("give --profile FILES, or --denoise, --context and --decode in seconds")
    return OpTimes({0: args.denoise}, {0: args.context}, {0: args.decode})


@command
def main() -> None:
    args = parse_arguments()
    config = load_config(args.config_path, args.overrides)
    check_pipeline_keys(config)
    times = op_times(args)
    frames = args.num_output_frames or config.video.num_output_frames
    schedule = build_schedule(config.rollout, frames)
    height, width = latent_size(config.video)
    block_bytes = 16 * 4 * config.rollout.block_frames * height * width  # 16 channels, float32
    transfer_seconds = args.latency + block_bytes / (args.bandwidth * 1e9)
    options = dict(transfer_seconds=transfer_seconds, decode_passes=decode_passes(config))
    predict = functools.partial(simulate, schedule, times=times, **options)
    print(prediction_table(predict, args.ranks, pixel_frames=4 * (frames - 1) + 1))


if __name__ == "__main__":
    main()
