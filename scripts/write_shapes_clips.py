"""Write clips of the miniature world as mp4 files, with their captions.

python scripts/write_shapes_clips.py --output outputs/shapes --num_clips 16 --num_frames 81
python scripts/write_shapes_clips.py --output runs/shapes --num_clips 400 --captions_only

Writes 00000.mp4, 00001.mp4, ..., their captions in captions.json, and captions.txt with line i for clip i. Training
renders clips on the fly and does not need these files; scripts/encode_clips.py --videos reads them.
"""

import argparse
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tqdm import tqdm

from shapes import world
from shapes.look import STYLES
from utils.arguments import MAX_COUNT, require_range
from utils.errors import command
from utils.files import writable_folder, write_json, write_text
from utils.video import VideoWriter


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("--num_clips", type=int, default=16, help="number of clips")
    parser.add_argument("--num_frames", type=int, default=81, help="pixel frames per clip")
    parser.add_argument("--size", type=int, choices=list(STYLES), default=64, help="height and width in pixels")
    parser.add_argument("--seed", type=int, default=0, help="seed of the clips")
    parser.add_argument("--held_out", action="store_true", help="write clips that are held out from training")
    parser.add_argument("--captions_only", action="store_true", help="write captions.txt only")
    args = parser.parse_args()
    require_range(args, 1, MAX_COUNT, "num_clips")
    require_range(args, 1, 100_000, "num_frames")
    require_range(args, 0, math.inf, "seed")
    folder = writable_folder(args.output)
    clips = [world.sample_clip(args.seed, index, args.held_out, args.size) for index in range(args.num_clips)]
    write_text(folder / "captions.txt", "".join(clip.caption + "\n" for clip in clips))
    if args.captions_only:
        return
    write_json(folder / "captions.json", {f"{index:05d}.mp4": clip.scene.caption for index, clip in enumerate(clips)})
    for index, clip in enumerate(tqdm(clips, unit="clip")):
        with VideoWriter(folder / f"{index:05d}.mp4", fps=world.FPS) as video:
            video.write(world.render(clip, args.num_frames))


if __name__ == "__main__":
    main()
