"""Sample the bidirectional teacher: whole clips in many steps, with guidance. What the generator learns from.

python scripts/sample_teacher.py --config_path configs/shapes.yaml --data_path data/shapes_prompts.txt \\
    --output_folder outputs/teacher [--solver unipc] [--seed 7] [teacher.guidance_scale=4 data.num_frames=21 ...]

Videos that exist are kept.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tqdm import tqdm

from model.flow import solver_sigmas
from model.vae import WanVAE
from model.weights import ModelDirectory
from pipeline.teacher import Teacher, sample_euler, sample_unipc
from pipeline.text_to_video import DTYPES
from utils.config import load_config
from utils.device import pick_device
from utils.errors import command
from utils.files import writable_folder
from utils.prompts import read_prompts, unique_stems
from utils.video import VideoWriter


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config_path", required=True, help="YAML under configs/")
    parser.add_argument("--data_path", required=True, help="prompts, one per line")
    parser.add_argument("--output_folder", required=True)
    parser.add_argument("--solver", choices=["euler", "unipc"], default="unipc")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the configuration")
    args = parser.parse_intermixed_args()
    config = load_config(args.config_path, args.overrides)
    prompts = read_prompts(args.data_path)
    stems = unique_stems(prompts, 1)
    folder = writable_folder(args.output_folder)
    device = pick_device(config.runtime.device)
    teacher = Teacher.load(config, device)
    vae = WanVAE(ModelDirectory.open(config.model.base).load_vae(DTYPES[config.model.dtype]).to(device))
    steps, shift = config.teacher.num_inference_steps, config.teacher.timestep_shift
    for prompt in tqdm(prompts, unit="video"):
        path = folder / f"{stems[prompt.index][0]}.mp4"
        if path.exists():
            continue
        flow, noise = teacher.flow([prompt.text]), teacher.noise(args.seed, [0])
        if args.solver == "unipc":
            latents = sample_unipc(flow, noise, steps, shift)
        else:
            latents = sample_euler(flow, noise, solver_sigmas(steps, shift))[-1]
        decoder = vae.stream()
        with VideoWriter(path, fps=config.video.fps) as video:
            for frame in latents.split(1, dim=1):
                video.write(decoder.push(frame)[0])


if __name__ == "__main__":
    main()
