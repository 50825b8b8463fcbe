"""Flags that inference.py and scripts/pipeline_parallel_inference.py share.

This module imports no torch, so wrong arguments are reported without delay.
"""

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pipeline.prompt_track import first_prompt, read_track, track_entries
from utils.config import Config
from utils.config_checks import MAX_FRAMES, MAX_VIDEOS
from utils.config_loading import config_flags, load_config
from utils.errors import UserError
from utils.image_prompts import read_image_prompts
from utils.prompts import Prompt, read_prompts, unique_stems

# Flags with the names of the original code, and the configuration keys that they set.
FLAGS: dict[str, tuple[str, type]] = {
    "checkpoint_path": ("model.generator", str),
    "num_output_frames": ("video.num_output_frames", int),
    "height": ("video.height", int),
    "width": ("video.width", int),
    "fps": ("video.fps", int),
    "seed": ("runtime.seed", int),
    "device": ("runtime.device", str),
    "order": ("rollout.order", str),
    "window": ("rollout.window", int),
    "sink": ("rollout.sink", int),
    "num_rollout": ("rollout.num_rollouts", int),
    "num_overlap_frames": ("rollout.overlap_frames", int),
    "num_frame_first_blocks": ("rollout.leading_blocks", int),
    "strength": ("rollout.strength", float),
    "source": ("video.source", str),  # --video with --strength
}
METHODS = {  # names of the original code: schedule, leading blocks
    "timestep_first": ("timestep_first", 0),
    "frame_first": ("block_first", 0),
    "hybrid_block0": ("timestep_first", 1),
}


def shared_arguments() -> argparse.ArgumentParser:
    """Return the shared flags, as a parent parser."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--config_path", required=True, help="YAML under configs/, or the JSON file beside a video")
    parser.add_argument("--checkpoint_path", help="weights of the generator; default: the config's model.generator")
    parser.add_argument("--prompt", metavar="TEXT", help="one prompt")
    parser.add_argument(
        "--checkpoint_folder",
        metavar="FOLDER",
        help="folder with model.pt, as CausVid writes: weights of the generator",
    )
    parser.add_argument("--data_path", "--prompt_file_path", metavar="FILE", help="file of prompts, one per line")
    parser.add_argument(
        "--extended_prompt_path", metavar="FILE", help="file with an extended text per line of --data_path"
    )
    parser.add_argument(
        "--prompt_track", metavar="FILE", help="prompts of later blocks: lines `block: prompt` or `12.5s: prompt`"
    )
    parser.add_argument(
        "--extended_prompt", metavar="TEXT", help="text to encode instead of --prompt, which names files"
    )
    parser.add_argument("--num_output_frames", help="latent frames, prefix included; F make 4(F-1)+1 pixel frames")
    parser.add_argument("--use_ema", action="store_true", help="use the checkpoint's generator_ema")
    parser.add_argument("--seed", help="seed of the noise; each sample number gives other noise")
    parser.add_argument("--num_samples", type=int, help="videos per prompt; default: 1")
    parser.add_argument("--save_with_index", action="store_true", help="name files by prompt number, not prompt text")
    parser.add_argument(
        "--inference_method", choices=METHODS, help="HiAR's name of the schedule; default: the config's"
    )
    parser.add_argument("--num_frame_first_blocks", help="number of leading blocks of hybrid_block0")
    parser.add_argument("--window", help="latent frames that attention spans, current block included; 0: all")
    parser.add_argument("--sink", help="latent frames at the start that stay in the window")
    parser.add_argument("--num_rollout", help="rollouts of --num_output_frames frames per video; default: 1")
    parser.add_argument("--num_overlap_frames", help="latent frames that two rollouts share; default: 3")
    parser.add_argument("--image", metavar="FILE", help="first frame of every video")
    parser.add_argument("--video", metavar="FILE", help="clip or saved latents that every video continues")
    parser.add_argument(
        "--strength",
        metavar="S",
        help="change --video instead of continuing it: factor on the noise levels, above 0 (keeps the clip) and at "
        "most 1 (follows the prompt)",
    )
    parser.add_argument(
        "--i2v",
        nargs="?",
        const="",
        metavar="PATH",
        help="folder or JSON with an image per prompt, see docs/migrate.md; default: --data_path",
    )
    parser.add_argument("--height", help="height in pixels")
    parser.add_argument("--width", help="width in pixels")
    parser.add_argument("--fps", help="pixel frames per second of the mp4 file")
    parser.add_argument("--save_latents", action="store_true", help="write X.safetensors beside X.mp4")
    parser.add_argument("--overwrite", action="store_true", help="replace existing videos")
    parser.add_argument("--device", help="cuda, cuda:1, mps or cpu; default: the config's runtime.device")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the resolved configuration and exit; inference.py also prints the GPU memory",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="changes to the configuration; keys: docs/config.md"
    )
    return parser


def apply_config_flags(args: argparse.Namespace) -> None:
    """Set the flags that are not on the command line from a configuration file of the public code, such as HiAR's."""
    flags = config_flags(args.config_path)
    if args.prompt is not None:
        flags.pop("data_path", None)
    if "output_folder" in flags and not hasattr(args, "output_folder"):  # it is --output_path of the pipeline script
        flags["output_path"] = flags["output_folder"]
    for flag, value in flags.items():
        if getattr(args, flag, 0) in (None, False):
            setattr(args, flag, value)
    if args.num_samples is None:
        args.num_samples = 1


def whole_numbers(flag: str, words: Sequence[str] | None) -> list[int]:
    """Return the numbers of a flag, separated by spaces or commas."""
    try:
        return [int(number) for word in words or () for number in word.split(",") if number]
    except ValueError:
        raise UserError(f"--{flag} takes whole numbers, not {' '.join(words or ())}") from None


def check_arguments(args: argparse.Namespace) -> None:
    """Complete the flags from the configuration file; check values and flags that exclude each other.

    Raises:
        UserError: for the first such flag.
    """
    apply_config_flags(args)
    args.source = None
    if args.checkpoint_folder:
        if args.checkpoint_path:
            raise UserError("give --checkpoint_path or --checkpoint_folder, not both")
        args.checkpoint_path = os.path.join(args.checkpoint_folder, "model.pt")
        if not os.path.isfile(args.checkpoint_path):
            raise UserError(
                f"--checkpoint_folder {args.checkpoint_folder} holds no model.pt; use --checkpoint_path FILE"
            )
    if args.prompt is not None and (args.data_path or not args.prompt.strip()):
        raise UserError("give --prompt TEXT or --data_path FILE")
    if args.extended_prompt_path and not args.data_path:
        raise UserError("--extended_prompt_path needs --data_path")
    if args.extended_prompt is not None and (args.prompt is None or not args.extended_prompt.strip()):
        raise UserError("--extended_prompt TEXT needs --prompt; --extended_prompt_path FILE belongs to --data_path")
    if args.image and args.video:
        raise UserError("give --image or --video, not both")
    if args.strength is not None:
        check_strength(args)
    if args.num_frame_first_blocks is not None and args.inference_method not in (None, "hybrid_block0"):
        raise UserError("--num_frame_first_blocks belongs to --inference_method hybrid_block0")
    for flag in ("num_samples", "batch_size"):
        if getattr(args, flag, 1) < 1:
            raise UserError(f"--{flag} must be at least 1, not {getattr(args, flag)}")
    if args.num_samples > MAX_VIDEOS:
        raise UserError(f"--num_samples must be at most {MAX_VIDEOS:,}, not {args.num_samples}")


def check_strength(args: argparse.Namespace) -> None:
    """Check --strength, and make --video the source of video-to-video instead of a prefix.

    Raises:
        UserError: for a strength outside (0, 1], or a missing clip.
    """
    try:
        valid = 0 < float(args.strength) <= 1  # NaN excluded
    except ValueError:
        valid = False
    if not valid:
        raise UserError(f"--strength must be above 0 and at most 1, not {args.strength}")
    if args.video:
        if not os.path.isfile(args.video):
            raise UserError(f"cannot read {args.video}: there is no such file")
        args.source, args.video = args.video, None


def resolve_config(args: argparse.Namespace) -> Config:
    """Load the configuration and apply the flags, then the overrides."""
    changes = []
    if args.source:  # the whole clip, in constant memory, unless a flag or an override differs
        changes = [f"video.num_output_frames={MAX_FRAMES}", "rollout.order=diagonal"]
    if args.inference_method:
        schedule, leading = METHODS[args.inference_method]
        changes += [f"rollout.schedule={schedule}", f"rollout.leading_blocks={leading}"]
    for flag, (key, value_type) in FLAGS.items():
        value = getattr(args, flag, None)
        if value is None:
            continue
        try:
            changes.append(f"{key}={json.dumps(value, ensure_ascii=False) if value_type is str else value_type(value)}")
        except ValueError:
            raise UserError(f"--{flag} must be a whole number, not {value!r}") from None
    if args.use_ema:
        changes.append("model.use_ema=true")
    config = load_config(args.config_path, [*changes, *args.overrides])
    if args.strength is not None and not config.video.source:
        raise UserError("--strength needs a clip to start from: --video CLIP")
    return config


def requested_prefix(args: argparse.Namespace, metadata: dict[str, Any] | None) -> str:
    """Return the path of the prefix of every video; empty for none. `metadata`: see `requested_videos`."""
    return "" if args.source else args.image or args.video or (metadata or {}).get("prefix") or ""


def requested_videos(args: argparse.Namespace, metadata: dict[str, Any] | None) -> list[tuple[Prompt, int, str]]:
    """Return (prompt, sample, file stem) of every video of the run. All ranks return the same list.

    Args:
        metadata: of the video to reproduce, if the configuration is a JSON file.

    Raises:
        UserError: if there is no prompt.
    """
    images = args.i2v
    track = read_track(args.prompt_track) if args.prompt_track else ()
    if first := first_prompt(track):
        if images is not None or args.data_path or args.prompt not in (None, first):
            raise UserError("--prompt_track has a prompt for block 0: leave out --prompt, --data_path and --i2v")
        args.prompt = first
    if images is None and args.prompt is None and not args.data_path and metadata is not None:
        if not args.prompt_track and metadata.get("prompt_track"):
            track = track_entries(metadata["prompt_track"], f"prompt_track in {args.config_path}")
        prompt, sample = Prompt(0, metadata["prompt"], metadata["name"], track=track), metadata["sample"]
        return [(prompt, sample, unique_stems([prompt], sample + 1, args.save_with_index)[0][sample])]
    if images is not None:
        if args.prompt is not None or args.image or args.video or args.source or args.extended_prompt_path:
            raise UserError("--i2v reads prompts and images itself; leave out --prompt, --image and --video")
        prompts = read_image_prompts(images or args.data_path or "")
    elif args.prompt is not None:
        prompts = [Prompt(0, (args.extended_prompt or args.prompt).strip(), args.prompt.strip())]
    elif args.data_path:
        prompts = read_prompts(args.data_path, args.extended_prompt_path)
    else:
        raise UserError("no prompt: add --prompt TEXT, or --data_path FILE with one prompt per line")
    prompts = [replace(prompt, track=track) for prompt in prompts]
    stems = unique_stems(prompts, args.num_samples, args.save_with_index)
    return [(p, sample, stems[p.index][sample]) for p in prompts for sample in range(args.num_samples)]


def output_files(path: str, videos: list[tuple[Prompt, int, str]]) -> tuple[str, list[tuple[Prompt, int, str]]]:
    """Return the folder and the videos of --output_path: a folder, or FILE.mp4 for a single video.

    Args:
        videos: see `requested_videos`. The file's name replaces the stem.

    Raises:
        UserError: for a file and several videos.
    """
    folder, name = os.path.split(path)
    stem, suffix = os.path.splitext(name)
    if suffix != ".mp4":
        return path, videos
    if len(videos) > 1:
        raise UserError(f"--output_path {path} is one file, but there are {len(videos)} videos; name a folder")
    [(prompt, sample, _)] = videos
    return folder or ".", [(prompt, sample, stem)]
