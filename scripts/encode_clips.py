"""Encode video clips, or clips of the miniature world, to latents, so that training the DiT needs no VAE encoder.

python scripts/encode_clips.py --base wan_models/Wan2.1-T2V-1.3B-Diffusers --videos clips --output latents
python scripts/encode_clips.py --base data/shapes-wan --num_clips 2048 --output runs/shapes/clips

Videos without a caption, and broken or short videos, are left out and listed at the end. Finished shards are kept, so
the same command resumes. Under torchrun the ranks share the work.
"""

import argparse
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from model.weights import ModelDirectory
from shapes import world
from shapes.look import STYLES
from trainer.datasets.clips import shard_files
from trainer.datasets.encode import encode_clips
from trainer.datasets.encode_videos import encode_videos
from utils.arguments import MAX_COUNT, require_range
from utils.device import pick_device
from utils.distributed import world_size
from utils.errors import UserError, command
from utils.files import writable_folder
from utils.locks import lock_output


def parse_arguments() -> argparse.Namespace:
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--base", help="model directory whose VAE encodes; required with --videos, otherwise data/shapes-wan"
    )
    parser.add_argument("--output", "--output_latent_folder", required=True, help="folder for the shards")
    parser.add_argument("--videos", "--input_video_folder", type=Path, help="folder of videos")
    parser.add_argument(
        "--captions", "--info_path", type=Path, help="JSON or CSV; default: captions.json or a .txt beside each video"
    )
    parser.add_argument("--fps", type=float, help="frames per second; default: 16. Other videos are resampled")
    parser.add_argument("--num_clips", type=int, help="number of clips of the miniature world; default: 2048")
    parser.add_argument("--num_frames", type=int, default=21, help="latent frames per clip")
    parser.add_argument("--size", type=int, choices=list(STYLES), help="frame size of these clips; default: 64")
    parser.add_argument("--seed", type=int, help="seed of the miniature world's clips; default: 0")
    parser.add_argument("--device", default="auto", help="auto, cuda, cuda:1, mps or cpu")
    args = parser.parse_args()
    require_range(args, 1, MAX_COUNT, "num_clips")
    require_range(args, 1, 25_000, "num_frames")
    require_range(args, 0, math.inf, "seed")
    require_range(args, 0.1, 999, "fps")
    unused = ("num_clips", "size", "seed") if args.videos else ("captions", "fps")
    if given := [name for name in unused if getattr(args, name) is not None]:
        raise UserError(f"--{given[0]} {'is for the miniature world, not for' if args.videos else 'needs'} --videos")
    if args.videos and not args.base:
        raise UserError("--videos needs --base, a model directory such as wan_models/Wan2.1-T2V-1.3B: its VAE encodes")
    args.base = args.base or "data/shapes-wan"
    return args


@command
def main() -> None:
    args = parse_arguments()
    folder = writable_folder(args.output)
    directory, device = ModelDirectory.open(args.base), pick_device(args.device)
    with lock_output(folder, "encoding clips in"):
        if not args.videos:
            size = args.size or 64
            clips = [world.sample_clip(args.seed or 0, i, size=size) for i in range(args.num_clips or 2048)]
            num_frames = 4 * (args.num_frames - 1) + 1
            encode_clips(
                [clip.caption for clip in clips],
                lambda index: world.to_pixels(world.render(clips[index], num_frames)),
                args.num_frames,
                folder,
                directory,
                device,
            )
            return
        fps = args.fps or 16
        total, left_out = encode_videos(args.videos, args.captions, args.num_frames, fps, folder, directory, device)
        for name, reason in left_out.items():
            print(f"left out: {name}: {reason}")
        if world_size() == 1 and not shard_files(folder):
            raise UserError(f"none of the {total} videos in {args.videos} is encoded; the reasons are above")
        print(f"{total} videos, {len(left_out)} left out; latents in {folder}")


if __name__ == "__main__":
    main()
