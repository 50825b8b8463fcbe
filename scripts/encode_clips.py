"""Encode clips of the miniature world to latents, so that training the DiT needs no VAE encoder.

python scripts/encode_clips.py --base data/shapes-wan --output runs/shapes/clips --num_clips 2048 --num_frames 21

Finished shards are kept, so the same command resumes. Under torchrun the ranks share the work.
"""

import argparse
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from model.weights import ModelDirectory
from shapes import world
from trainer.datasets.encode import encode_clips
from utils.arguments import MAX_COUNT, require_range
from utils.device import pick_device
from utils.errors import command
from utils.files import writable_folder
from utils.locks import lock_output


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="data/shapes-wan", help="model directory whose VAE encodes")
    parser.add_argument("--output", required=True, help="folder for the shards")
    parser.add_argument("--num_clips", type=int, default=2048, help="number of clips")
    parser.add_argument("--num_frames", type=int, default=21, help="latent frames per clip")
    parser.add_argument("--seed", type=int, default=0, help="seed of the clips")
    parser.add_argument("--device", default="auto", help="auto, cuda, cuda:1, mps or cpu")
    args = parser.parse_args()
    require_range(args, 1, MAX_COUNT, "num_clips")
    require_range(args, 1, 25_000, "num_frames")
    require_range(args, 0, math.inf, "seed")
    folder = writable_folder(args.output)
    clips = [world.sample_clip(args.seed, index) for index in range(args.num_clips)]
    with lock_output(folder, "encoding clips in"):
        encode_clips(
            [clip.scene.caption for clip in clips],
            lambda index: world.to_pixels(world.render(clips[index], 4 * (args.num_frames - 1) + 1)),
            args.num_frames,
            folder,
            ModelDirectory.open(args.base),
            pick_device(args.device),
        )


if __name__ == "__main__":
    main()
