"""Generate ODE pairs: the teacher's deterministic trajectories from noise to clip, at a few saved points.

python scripts/generate_ode_pairs.py --config_path configs/shapes.yaml --caption_path captions.txt \\
    --output_folder runs/shapes/ode_pairs --num_prompts 400 --num_inference_steps 48 --save_indices 0 12 24 36 -1

A pair is a function of (seed, prompt index) alone. Files that exist are kept, so the same command goes on where it
stopped; one that says another seed, teacher, solver, size or captions is refused. Under torchrun the prompts are shared
out among the ranks.
"""

import argparse
import glob
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from model.weights import TEXT_ENCODER_FILES, TRANSFORMER_FILES
from pipeline.build import VAE_STRIDE, rollout_sigmas
from trainer.datasets.ode_pairs import check_origin, load_pair, pair_file, write_ode_pair, write_origin
from utils.config import Config, load_config
from utils.distributed import rank, world_size
from utils.errors import UserError, command
from utils.files import fingerprint, writable_folder
from utils.prompts import Prompt, read_prompts


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config_path", default="configs/hiar.yaml", help="YAML that names the teacher and the size")
    parser.add_argument("--caption_path", required=True, help="prompts, one per line")
    parser.add_argument("--output_folder", required=True)
    parser.add_argument("--guidance_scale", type=float, help="default: the config's teacher.guidance_scale")
    parser.add_argument("--num_inference_steps", type=int, help="default: the config's teacher.num_inference_steps")
    parser.add_argument("--timestep_shift", type=float, help="default: the config's teacher.timestep_shift")
    parser.add_argument("--num_prompts", type=int, help="take the first so many prompts; default: all")
    parser.add_argument("--num_frames", type=int, help="latent frames; default: the config's data.num_frames")
    parser.add_argument("--save_indices", type=int, nargs="+", help="saved points; default: those that the loss reads")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32", help="of the files")
    parser.add_argument("--latent_shape", type=int, nargs=3, metavar=("C", "H", "W"), help="default: the config's size")
    parser.add_argument("--model_name", help="model directory of the teacher, as model.base")
    parser.add_argument("--resume", action="store_true", help="accepted: files that exist are always kept")
    parser.add_argument("--batch_size", type=int, default=1, help="trajectories at a time")
    parser.add_argument("--seed", type=int, help="default: the config's runtime.seed")
    parser.add_argument("--device", help="default: the config's")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the configuration")
    args = parser.parse_intermixed_args()
    for flag in ("num_inference_steps", "num_prompts", "num_frames", "batch_size"):
        value = getattr(args, flag)
        if value is not None and value < 1:
            raise UserError(f"--{flag} must be at least 1, not {value}")
    return args


@command
def main() -> None:
    args = parse_arguments()
    flags = {
        "teacher.guidance_scale": args.guidance_scale,
        "teacher.num_inference_steps": args.num_inference_steps,
        "teacher.timestep_shift": args.timestep_shift,
        "data.num_frames": args.num_frames,
        "runtime.device": args.device,
        "runtime.seed": args.seed,
        "model.base": args.model_name,
    }
    if args.latent_shape:
        _, height, width = args.latent_shape
        flags |= {"video.height": height * VAE_STRIDE, "video.width": width * VAE_STRIDE}
    words = [f"{key}={value}" for key, value in flags.items() if value is not None]
    config = load_config(args.config_path, [*words, *args.overrides])
    prompts = read_prompts(args.caption_path)[: args.num_prompts]

    import torch
    from tqdm import tqdm

    from model.flow import solver_sigmas
    from pipeline.teacher import Teacher, sample_euler
    from utils.device import pick_device

    sigmas = solver_sigmas(config.teacher.num_inference_steps, config.teacher.timestep_shift)
    num_points = len(sigmas)
    saved = args.save_indices or matching_indices(sigmas, levels_read(config))
    if any(not -num_points <= index < num_points for index in saved):
        raise UserError(f"--save_indices {saved} must be among the {num_points} points 0..{num_points - 1}, -1")
    folder = writable_folder(args.output_folder)
    origin = origin_of(config, [sigmas[index] for index in saved], args.dtype)
    check_origin(folder, origin)
    mine = prompts[rank() :: world_size()]
    done = {p.index: p for p in mine if pair_file(folder, p.index).exists()}
    todo = [p for p in mine if p.index not in done]
    if done:
        check_pairs(folder, list(done.values()), origin)
        print(f"{len(done)} pairs exist already and are kept")
    if not todo:
        write_origin(folder, origin)
        return

    teacher = Teacher.load(config, pick_device(config.runtime.device))
    channels = teacher.net.config.in_channels
    if args.latent_shape and args.latent_shape[0] != channels:
        raise UserError(f"--latent_shape {args.latent_shape}: the teacher's latents have {channels} channels")
    write_origin(folder, origin)
    dtype = getattr(torch, args.dtype)
    batches = [todo[i : i + args.batch_size] for i in range(0, len(todo), args.batch_size)]
    with tqdm(total=len(todo) * len(sigmas[1:]), unit="step", disable=rank() != 0) as bar:
        for batch in batches:
            flow = teacher.flow([prompt.text for prompt in batch])
            noise = teacher.noise(config.runtime.seed, [prompt.index for prompt in batch])
            count = len(batch)
            points = sample_euler(flow, noise, sigmas, on_step=lambda _, count=count: bar.update(count))
            trajectories = torch.stack([points[index] for index in saved], dim=1)
            for prompt, trajectory in zip(batch, trajectories, strict=True):
                write_ode_pair(pair_file(folder, prompt.index), prompt.text, trajectory.to(dtype))


def origin_of(config: Config, sigmas: list[float], dtype: str) -> dict[str, Any]:
    """What a pair depends on beside its prompt, by the names that the configuration has for it."""
    teacher = config.teacher
    return {
        "runtime.seed": config.runtime.seed,
        "model.base": os.path.normpath(config.model.base),
        "teacher.path": teacher.path and os.path.normpath(teacher.path),
        "weights": weights_of(config),
        "teacher.guidance_scale": teacher.guidance_scale,
        "teacher.negative_prompt": teacher.negative_prompt,
        "teacher.num_inference_steps": teacher.num_inference_steps,
        "teacher.timestep_shift": teacher.timestep_shift,
        "sigmas": sigmas,  # of the saved points
        "data.num_frames": config.data.num_frames,
        "video.height": config.video.height,
        "video.width": config.video.width,
        "dtype": dtype,
    }


def weights_of(config: Config) -> str:
    """What tells the teacher's weights and the text encoder's from others."""
    base, own = Path(config.model.base), Path(config.teacher.path)
    if not config.teacher.path:
        teacher = fingerprint(base, TRANSFORMER_FILES)
    elif own.is_dir():
        teacher = fingerprint(own, ["*"])
    else:
        teacher = fingerprint(own.parent, [glob.escape(own.name)])
    return f"{teacher[:16]} {fingerprint(base, TEXT_ENCODER_FILES)[:16]}"


def check_pairs(folder: Path, prompts: Sequence[Prompt], origin: dict[str, Any]) -> None:
    """Make sure that the pairs of these prompts are theirs, and of the size and type that are asked for (old folders
    have no note that says so), by the first and the last: where lines were added, removed or changed their order, one
    of the two is almost certainly another's.

    Raises:
        UserError: if one is not, or broken.
    """
    size = [origin["data.num_frames"], *(origin[f"video.{side}"] // VAE_STRIDE for side in ("height", "width"))]
    asked = f"{[len(origin['sigmas']), *size]} in {origin['dtype']}"
    for prompt in (prompts[0], prompts[-1]):
        file = pair_file(folder, prompt.index)
        text, points = load_pair(file)
        saves, frames, _, height, width = points.shape
        found = f"{[saves, frames, height, width]} in {str(points.dtype).removeprefix('torch.')}"
        for old, new in ((repr(text), repr(prompt.text)), (found, asked)):
            if old != new:
                raise UserError(
                    f"{file} is a pair of {old}, not {new}: choose another --output_folder, or delete this one"
                )


def levels_read(config: Config) -> list[float]:
    """The teacher's noise levels that the configured loss reads: of the forward KL the first steps' only, else all.

    They are at the student's steps, as shares of the whole way, but by the teacher's own shift: what a student is shown
    beside the level that a point really has, and not the level that it will be asked at.
    """
    levels = rollout_sigmas(replace(config.rollout, timestep_shift=config.teacher.timestep_shift))
    return levels[: config.distill.forward_kl_steps + 1] if config.train.objective == "score_distillation" else levels


def matching_indices(sigmas: list[float], wanted: list[float]) -> list[int]:
    """For every wanted noise level the teacher's point that is nearest to it."""
    return [min(range(len(sigmas)), key=lambda i: abs(sigmas[i] - sigma)) for sigma in wanted]


if __name__ == "__main__":
    main()
