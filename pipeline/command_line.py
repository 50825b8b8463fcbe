"""The flags that inference.py and the pipeline script share, and what they mean. Mistakes come before torch."""

import argparse
import json
from typing import Any

from utils.config import Config, load_config
from utils.errors import UserError
from utils.prompts import Prompt, read_prompts, unique_stems

# The flags that people of the original use, and the configuration keys that they set.
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
    "num_frame_first_blocks": ("rollout.leading_blocks", int),
}
METHODS = {  # the original's names: schedule, leading blocks
    "timestep_first": ("timestep_first", 0),
    "frame_first": ("block_first", 0),
    "hybrid_block0": ("timestep_first", 1),
}


def shared_arguments() -> argparse.ArgumentParser:
    """The flags of every script that makes videos, as a parent for its parser."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--config_path", required=True, help="YAML under configs/, or the JSON beside a video")
    parser.add_argument("--checkpoint_path", help="weights of the generator; default: the config's model.generator")
    parser.add_argument("--data_path", help="prompts, one per line")
    parser.add_argument("--extended_prompt_path", help="longer prompts, line by line, that replace the text only")
    parser.add_argument("--num_output_frames", help="latent frames, given ones included; F make 4(F-1)+1 pixel frames")
    parser.add_argument("--use_ema", action="store_true", help="take the checkpoint's generator_ema")
    parser.add_argument("--seed", help="all noise is a function of it and the sample's number")
    parser.add_argument("--num_samples", type=int, default=1, help="videos per prompt")
    parser.add_argument("--save_with_index", action="store_true", help="name videos by the prompt's number")
    parser.add_argument("--inference_method", choices=METHODS, help="default: the config's rollout.schedule")
    parser.add_argument("--num_frame_first_blocks", help="leading blocks of hybrid_block0")
    parser.add_argument("--window", help="latent frames attended, current block included; 0: all")
    parser.add_argument("--sink", help="latent frames at the start that stay in the window")
    parser.add_argument("--image", help="first frame of every video")
    parser.add_argument("--video", help="clip that every video continues (a video file, or saved latents)")
    parser.add_argument("--height", help="pixels")
    parser.add_argument("--width", help="pixels")
    parser.add_argument("--fps", help="frames per second of the file")
    parser.add_argument("--save_latents", action="store_true", help="write X.safetensors beside X.mp4")
    parser.add_argument("--overwrite", action="store_true", help="make videos that exist once more")
    parser.add_argument("--device", help="cuda, cuda:1, mps, cpu; default: the config's")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved configuration and exit")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the configuration")
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse flags that do not go together.

    Raises:
        UserError: naming them.
    """
    if args.image and args.video:
        raise UserError("give --image or --video, not both")
    if args.num_frame_first_blocks is not None and args.inference_method not in (None, "hybrid_block0"):
        raise UserError("--num_frame_first_blocks belongs to --inference_method hybrid_block0")
    for flag in ("num_samples", "batch_size"):
        if getattr(args, flag, 1) < 1:
            raise UserError(f"--{flag} must be at least 1, not {getattr(args, flag)}")


def resolve_config(args: argparse.Namespace) -> Config:
    """The configuration file with the flags and overrides applied; overrides win."""
    words = []
    if args.inference_method:
        schedule, leading = METHODS[args.inference_method]
        words += [f"rollout.schedule={schedule}", f"rollout.leading_blocks={leading}"]
    for flag, (key, kind) in FLAGS.items():
        value = getattr(args, flag, None)
        if value is None:
            continue
        try:
            words.append(f"{key}={kind(value) if kind is not str else json.dumps(value, ensure_ascii=False)}")
        except ValueError:
            raise UserError(f"--{flag} takes a whole number, not {value!r}") from None
    if args.use_ema:
        words.append("model.use_ema=true")
    return load_config(args.config_path, [*words, *args.overrides])


def work_items(args: argparse.Namespace, record: dict[str, Any] | None) -> list[tuple[Prompt, int, str]]:
    """All (prompt, sample, file stem) of the run, the same list on every rank; `record` is a video's to make again."""
    if args.data_path:
        prompts = read_prompts(args.data_path, args.extended_prompt_path)
        stems = unique_stems(prompts, args.num_samples, args.save_with_index)
        return [(p, sample, stems[p.index][sample]) for p in prompts for sample in range(args.num_samples)]
    if record is None:
        raise UserError("say what to generate: --data_path FILE with one prompt per line")
    prompt = Prompt(0, record["prompt"], record["name"])
    sample = record["sample"]
    return [(prompt, sample, unique_stems([prompt], sample + 1, args.save_with_index)[0][sample])]
