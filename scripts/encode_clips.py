"""Encode clips of the miniature world to latents, so that training the DiT need not.

python scripts/encode_clips.py --base data/shapes-wan --output runs/shapes/clips --num_clips 2048 --num_frames 21

Several processes share the work under torchrun. Shards that hold these clips already, encoded by this VAE, are kept, so
the same command goes on where it stopped.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from tqdm import tqdm

from model.vae import channels_last_, encode_clip, normalise
from model.weights import VAE_FILES, ModelDirectory
from shapes import world
from trainer.datasets.clips import holds_clips, shard_files, write_shard
from utils.device import pick_device
from utils.distributed import rank, world_size
from utils.errors import UserError, command
from utils.files import fingerprint, writable_folder

SHARD = 64  # clips in a file
BATCH = 8  # clips encoded at once


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="data/shapes-wan", help="model directory with the VAE")
    parser.add_argument("--output", required=True, help="folder of the shards")
    parser.add_argument("--num_clips", type=int, default=2048)
    parser.add_argument("--num_frames", type=int, default=21, help="latent frames of a clip")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    if args.num_clips <= 0 or args.num_frames <= 0:
        raise UserError("--num_clips and --num_frames must be positive")
    if args.seed < 0:
        raise UserError(f"--seed must not be negative, not {args.seed}")
    folder = writable_folder(args.output)
    names = {start: f"{start:06d}.safetensors" for start in range(0, args.num_clips, SHARD)}
    if others := [file.name for file in shard_files(folder) if file.name not in names.values()]:
        raise UserError(
            f"{folder} holds more than {args.num_clips} clips, and training would read them too: delete "
            f"{', '.join(others[:3])}{' ...' if len(others) > 3 else ''}, or choose another --output"
        )
    device = pick_device(args.device)
    directory = ModelDirectory.open(args.base)
    vae = directory.load_vae(torch.float32).to(device)
    encoded_by = fingerprint(directory.path, VAE_FILES)
    channels_last_(vae)
    for start in tqdm(list(names)[rank() :: world_size()], unit="shard", disable=rank() > 0):
        file = folder / names[start]
        clips = [world.sample_clip(args.seed, i) for i in range(start, min(start + SHARD, args.num_clips))]
        captions = [clip.scene.caption for clip in clips]
        if holds_clips(file, args.num_frames, captions, encoded_by):
            continue
        latents = []
        for i in range(0, len(clips), BATCH):
            rendered = [world.render(clip, 4 * (args.num_frames - 1) + 1) for clip in clips[i : i + BATCH]]
            pixels = torch.stack([world.to_pixels(frames) for frames in rendered])
            pixels = pixels.to(device, memory_format=torch.channels_last_3d)
            with torch.no_grad():
                latents.append(normalise(vae, encode_clip(vae, pixels)[0]).transpose(1, 2).cpu())
        write_shard(file, torch.cat(latents), captions, encoded_by)


if __name__ == "__main__":
    main()
