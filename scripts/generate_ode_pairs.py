"""Generate ODE pairs: the teacher's deterministic trajectories from noise to a clip, saved at a few points.

python scripts/generate_ode_pairs.py --config_path configs/shapes.yaml --caption_path captions.txt \\
    --output_folder runs/shapes/ode_pairs --num_prompts 400 --num_inference_steps 48 --save_indices 0 12 24 36 -1

A pair depends only on the seed and the index of its prompt. Existing pairs are kept, so the same command resumes. The
script stops if the folder has pairs of another seed, teacher, solver, size or prompt file. Under torchrun the ranks
share the prompts.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.build import pixel_size
from pipeline.command_line import whole_numbers
from trainer.datasets.generate_pairs import generate_ode_pairs
from utils.config_loading import load_config
from utils.errors import UserError, command
from utils.files import writable_folder
from utils.foreign_keys import model_folder
from utils.locks import lock_output
from utils.prompts import read_prompts

# Flags that set a key of the configuration.
CONFIG_KEYS = {
    "guidance_scale": "teacher.guidance_scale",
    "num_inference_steps": "teacher.num_inference_steps",
    "timestep_shift": "teacher.timestep_shift",
    "num_frames": "data.num_frames",
    "device": "runtime.device",
    "seed": "runtime.seed",
    "model_name": "model.base",
}


def parse_arguments() -> argparse.Namespace:
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config_path", default="configs/hiar.yaml", help="YAML with the teacher and the video size")
    parser.add_argument("--caption_path", required=True, help="prompts, one per line")
    parser.add_argument("--output_folder", required=True, help="folder for the pairs")
    parser.add_argument("--guidance_scale", type=float, help="default: teacher.guidance_scale")
    parser.add_argument("--num_inference_steps", type=int, help="default: teacher.num_inference_steps")
    parser.add_argument("--timestep_shift", type=float, help="default: teacher.timestep_shift")
    parser.add_argument("--num_prompts", type=int, help="use only the first N prompts; default, and -1: all")
    parser.add_argument("--num_frames", type=int, help="latent frames; default: data.num_frames")
    parser.add_argument(
        "--save_indices", nargs="+", help="saved points, such as 0,12,24,36,-1; default: those that training reads"
    )
    parser.add_argument(
        "--dtype", choices=["float32", "float16", "bfloat16"], default="float32", help="of saved latents"
    )
    parser.add_argument("--latent_shape", nargs="+", help="C H W or 1,F,C,H,W; default: the video size and length")
    parser.add_argument("--model_name", help="teacher: a folder, or its name under wan_models/; default: model.base")
    parser.add_argument("--resume", action="store_true", help="has no effect: existing pairs are always kept")
    parser.add_argument("--batch_size", type=int, default=1, help="trajectories at a time")
    parser.add_argument("--seed", type=int, help="default: runtime.seed")
    parser.add_argument("--device", help="default: runtime.device")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the configuration")
    args = parser.parse_intermixed_args()
    args.num_prompts = None if args.num_prompts == -1 else args.num_prompts
    for flag in ("num_inference_steps", "num_prompts", "num_frames", "batch_size"):
        value = getattr(args, flag)
        if value is not None and value < 1:
            raise UserError(f"--{flag} must be at least 1, not {value}")
    for flag in ("save_indices", "latent_shape"):
        setattr(args, flag, whole_numbers(flag, getattr(args, flag)))
    if args.model_name:
        args.model_name = model_folder(args.model_name)
    return args


@command
def main() -> None:
    args = parse_arguments()
    values = {key: getattr(args, flag) for flag, key in CONFIG_KEYS.items()}
    channels = None
    if args.latent_shape:
        shape = args.latent_shape
        if len(shape) not in (3, 5) or (len(shape) == 5 and shape[0] != 1):
            raise UserError(f"--latent_shape must be C H W or 1,F,C,H,W, not {shape}")
        *frames, channels, height, width = shape
        if frames and args.num_frames not in (None, frames[1]):
            raise UserError(f"--num_frames {args.num_frames} and --latent_shape {shape} disagree")
        values["data.num_frames"] = frames[1] if frames else args.num_frames
        values |= dict(zip(("video.height", "video.width"), pixel_size(height, width), strict=True))
    overrides = [f"{key}={value}" for key, value in values.items() if value is not None]
    config = load_config(args.config_path, [*overrides, *args.overrides])
    prompts = read_prompts(args.caption_path)[: args.num_prompts]
    folder = writable_folder(args.output_folder)
    with lock_output(folder, "generating ODE pairs in"):
        generate_ode_pairs(config, prompts, folder, args.save_indices, args.dtype, args.batch_size, channels)


if __name__ == "__main__":
    main()
