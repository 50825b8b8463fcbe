"""Generate ODE pairs: the teacher's deterministic trajectories from noise to clip, at a few saved points.

python scripts/generate_ode_pairs.py --config_path configs/shapes.yaml --caption_path captions.txt \\
    --output_folder runs/shapes/ode_pairs --num_prompts 400 --num_inference_steps 48 --save_indices 0 12 24 36 -1

A pair is a function of (seed, prompt index) alone. Files that exist are kept, so the same command goes on where it
stopped; under torchrun the prompts are shared out among the ranks.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.text_to_video import VAE_STRIDE, rollout_sigmas
from utils.config import Config, load_config
from utils.distributed import rank, world_size
from utils.errors import UserError, command
from utils.files import writable_folder
from utils.ode_pairs import pair_file, write_ode_pair, write_sigmas
from utils.prompts import read_prompts


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config_path", required=True, help="YAML that names the teacher and the video size")
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
    parser.add_argument("--seed", type=int, default=0)
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
    mine = prompts[rank() :: world_size()]
    todo = [p for p in mine if not pair_file(folder, p.index).exists()]
    if len(todo) < len(mine):
        print(f"{len(mine) - len(todo)} pairs exist already and are kept")
    if not todo:
        return

    teacher = Teacher.load(config, pick_device(config.runtime.device))
    channels = teacher.net.config.in_channels
    if args.latent_shape and args.latent_shape[0] != channels:
        raise UserError(f"--latent_shape {args.latent_shape}: the teacher's latents have {channels} channels")
    write_sigmas(folder, [sigmas[index] for index in saved])
    dtype = getattr(torch, args.dtype)
    batches = [todo[i : i + args.batch_size] for i in range(0, len(todo), args.batch_size)]
    with tqdm(total=len(todo) * len(sigmas[1:]), unit="step", disable=rank() != 0) as bar:
        for batch in batches:
            flow = teacher.flow([prompt.text for prompt in batch])
            noise = teacher.noise(args.seed, [prompt.index for prompt in batch])
            count = len(batch)
            points = sample_euler(flow, noise, sigmas, on_step=lambda _, count=count: bar.update(count))
            trajectories = torch.stack([points[index] for index in saved], dim=1)
            for prompt, trajectory in zip(batch, trajectories, strict=True):
                write_ode_pair(pair_file(folder, prompt.index), prompt.text, trajectory.to(dtype))


def levels_read(config: Config) -> list[float]:
    """The noise levels that the configured loss reads: of the forward KL only the first steps', otherwise all."""
    levels = rollout_sigmas(config.rollout)
    return levels[: config.distill.forward_kl_steps + 1] if config.train.objective == "score_distillation" else levels


def matching_indices(sigmas: list[float], wanted: list[float]) -> list[int]:
    """For every wanted noise level the teacher's point that is nearest to it."""
    return [min(range(len(sigmas)), key=lambda i: abs(sigmas[i] - sigma)) for sigma in wanted]


if __name__ == "__main__":
    main()
