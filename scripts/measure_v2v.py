"""Measure video-to-video, image-to-video and continued clips on the miniature. Prints the tables of docs/v2v.md.

python scripts/measure_v2v.py --output_folder outputs/v2v [--num_videos 64] [--strengths 0.25 0.5 0.75 1]

Each clip is rendered, and its prompt has another colour. Existing videos are replaced.
"""

import argparse
import math
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from PIL import Image
from tqdm import tqdm

from pipeline import TextToVideo
from pipeline.prefix import read_prefix
from shapes import world
from shapes.edits import measure_edit, measure_start, measurement_table, sample_edit
from utils.arguments import require_range
from utils.clips import read_video
from utils.contact_sheet import read_strip, save_contact_sheet
from utils.errors import command
from utils.files import writable_folder
from utils.video import VideoWriter, to_uint8

STARTS = {"none": (1, 9), "image": (1, 10), "clip": (21, 15)}  # pixel frames before the seam, latent frames


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config_path", default="configs/shapes.yaml")
    parser.add_argument(
        "--output_folder", required=True, help="folder for clips, videos and the contact sheet edits.png"
    )
    parser.add_argument("--num_videos", type=int, default=64, help="videos per row")
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.25, 0.5, 0.75, 1.0])
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the configuration")
    args = parser.parse_intermixed_args()
    require_range(args, 1, math.inf, "num_videos")
    return args


def measure_edits(pipe: TextToVideo, folder: Path, args: argparse.Namespace) -> str:
    rows: dict[str, list] = {f"{strength:g}": [] for strength in args.strengths}
    strips = []
    for index in tqdm(range(args.num_videos), unit="clip", desc="edits"):
        edit = sample_edit(5, index)
        clip, prompt = folder / f"{index}.mp4", edit.scene.caption
        with VideoWriter(clip, world.FPS, crf=5) as video:
            video.write(world.render(edit.clip, 33))  # 9 latent frames
        made = {"clip": clip}
        for name, strength in zip(rows, args.strengths, strict=True):
            edited = pipe.generate(prompt, video=clip, strength=strength, sample=index)
            made[f"strength {name}"] = path = edited.save(folder / f"{index}_{name}.mp4")
            rows[name].append(measure_edit(read_video(path)[0], edit))
        if index < 1:
            captions = {name: f"{name}: {prompt}" for name in made} | {"clip": f"clip: {edit.clip.scene.caption}"}
            strips += [replace(read_strip(path, 6), caption=captions[name]) for name, path in made.items()]
    save_contact_sheet(folder / "edits.png", strips, columns=6)
    return measurement_table("strength", rows, 100, 1)


def measure_starts(pipe: TextToVideo, folder: Path, args: argparse.Namespace) -> str:
    rows: dict[str, list] = {name: [] for name in STARTS}
    for index in tqdm(range(args.num_videos), unit="clip", desc="starts"):
        clip = world.sample_clip(6, index)
        for name, (first, num_frames) in STARTS.items():
            given, start = world.render(clip, first), folder / f"{index}_start"
            image = video = decoded = None
            if name == "image":
                image = start.with_suffix(".png")
                Image.fromarray(given[0]).save(image)
            elif name == "clip":
                video = start.with_suffix(".mp4")
                with VideoWriter(video, world.FPS, crf=5) as writer:
                    writer.write(given)
            made = pipe.generate(clip.scene.caption, num_frames=num_frames, sample=index, image=image, video=video)
            frames, _ = read_video(made.save(folder / f"{index}_from_{name}.mp4"))
            if path := image or video:
                decoded = to_uint8(pipe.vae.decode(read_prefix(str(path), pipe.config, pipe.vae))[0])
            rows[name].append(measure_start(frames, first, clip, given if path else None, decoded))
    return measurement_table("start", rows, 1, 2)


@command
def main() -> None:
    args = parse_arguments()
    folder = writable_folder(args.output_folder)
    pipe = TextToVideo.load(args.config_path, *args.overrides)
    with torch.inference_mode():
        print(measure_edits(pipe, folder, args), measure_starts(pipe, folder, args), sep="\n\n")


if __name__ == "__main__":
    main()
