"""Predict a pipeline's speed on 1 to 8 ranks from measured op times.

python scripts/plan_pipeline.py --config_path configs/hiar.yaml --profile profile_rank*.json --num_output_frames 81
python scripts/plan_pipeline.py --config_path configs/hiar.yaml --denoise 0.2 --context 0.18 --decode 0.1

Op times come from a profile (scripts/pipeline_parallel_inference.py --profile, of any number of ranks), or as seconds.
A rank's ops are simulated in the executor's order; a block is there --latency after it was sent, and its bytes over
--bandwidth.
"""

import argparse
import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.build import VAE_STRIDE, build_schedule
from pipeline.parallel.profile import read_profile
from pipeline.parallel.simulate import Times, simulate, table, times_of
from utils.config import load_config
from utils.errors import UserError, command


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config_path", required=True, help="YAML under configs/")
    parser.add_argument("--profile", type=Path, nargs="+", help="files of a profile, all of its ranks")
    for name in ("denoise", "context", "decode"):
        parser.add_argument(f"--{name}", type=float, help="seconds per block, instead of a profile")
    parser.add_argument("--num_output_frames", type=int, help="latent frames; default: the config's")
    parser.add_argument("--ranks", type=int, default=8, help="most ranks")
    parser.add_argument("--bandwidth", type=float, default=10.0, help="GB/s between ranks")
    parser.add_argument("--latency", type=float, default=5e-5, help="seconds between ranks")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the configuration")
    args = parser.parse_intermixed_args()
    config = load_config(args.config_path, args.overrides)
    if args.ranks < 1 or args.bandwidth <= 0 or args.latency < 0:
        raise UserError("--ranks and --bandwidth must be positive, --latency not negative")
    if args.profile:
        times = times_of(span for path in args.profile for span in read(path))
        if not times.denoise and not times.joined:
            raise UserError(f"no denoise passes in {', '.join(map(str, args.profile))}")
    elif None in (args.denoise, args.context, args.decode):
        raise UserError("give --profile FILES, or --denoise, --context and --decode in seconds")
    else:
        times = Times({0: args.denoise}, {0: args.context}, {0: args.decode})
    frames = args.num_output_frames or config.video.num_output_frames
    schedule = build_schedule(config.rollout, frames)
    block_bytes = (
        64 * config.rollout.block_frames * (config.video.height // VAE_STRIDE) * (config.video.width // VAE_STRIDE)
    )  # 16 channels of float32
    hop = args.latency + block_bytes / (args.bandwidth * 1e9)
    predict = functools.partial(simulate, schedule, times=times, hop=hop)
    print(table(lambda count, **options: predict(num_ranks=count, **options), args.ranks, 4 * (frames - 1) + 1))


def read(path: Path) -> list[tuple[str, int, float]]:
    """(name, block, seconds) of a profile's ops."""
    try:
        return [(span.name, span.block, span.end - span.start) for span in read_profile(path)[2]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no profile of scripts/pipeline_parallel_inference.py ({error})") from None


if __name__ == "__main__":
    main()
