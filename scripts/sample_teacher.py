"""Sample the bidirectional teacher: whole clips in many steps, with guidance. What the generator learns from.

python scripts/sample_teacher.py --config_path configs/shapes.yaml --data_path data/shapes_prompts.txt \\
    --output_folder outputs/teacher [--solver unipc] [--seed 7] [teacher.guidance_scale=4 data.num_frames=21 ...]

Videos that exist are kept; under torchrun the ranks share them out. Each gets a record X.json beside it.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tqdm import tqdm

from model.flow import solver_sigmas
from model.vae import WanVAE
from model.weights import ModelDirectory
from pipeline.output import VideoFiles, VideoOutput, video_metadata
from pipeline.teacher import Teacher, sample_euler, sample_unipc
from utils.config import load_config
from utils.device import DTYPES, pick_device
from utils.distributed import rank, world_size
from utils.errors import UserError, command
from utils.files import writable_folder, write_json
from utils.prompts import read_prompts, unique_stems


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config_path", required=True, help="YAML under configs/")
    parser.add_argument("--data_path", required=True, help="prompts, one per line")
    parser.add_argument("--output_folder", required=True)
    parser.add_argument("--solver", choices=["euler", "unipc"], default="unipc")
    parser.add_argument("--seed", type=int, help="default: the config's runtime.seed")
    parser.add_argument("--num_samples", type=int, default=1, help="videos per prompt")
    parser.add_argument("--batch_size", type=int, default=1, help="videos at a time")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the configuration")
    args = parser.parse_intermixed_args()
    if args.num_samples < 1 or args.batch_size < 1:
        raise UserError("--num_samples and --batch_size must be at least 1")
    words = [] if args.seed is None else [f"runtime.seed={args.seed}"]
    config = load_config(args.config_path, [*args.overrides, *words])
    prompts = read_prompts(args.data_path)
    stems = unique_stems(prompts, args.num_samples)
    folder = writable_folder(args.output_folder)
    wanted = [
        (prompt, sample, VideoFiles(folder, stems[prompt.index][sample]))
        for prompt in prompts
        for sample in range(args.num_samples)
    ][rank() :: world_size()]
    todo = [item for item in wanted if not item[2].video.exists()]
    device = pick_device(config.runtime.device)
    teacher = Teacher.load(config, device)
    vae = WanVAE(ModelDirectory.open(config.model.base).load_vae(DTYPES[config.model.dtype]).to(device))
    steps, shift = config.teacher.num_inference_steps, config.teacher.timestep_shift
    batches = [todo[i : i + args.batch_size] for i in range(0, len(todo), args.batch_size)]
    for batch in tqdm(batches, unit="batch", disable=rank() > 0):
        flow = teacher.flow([prompt.text for prompt, _, _ in batch])
        # The noise of a video is that of its sample, whatever the batch, and for each prompt the same.
        noise = teacher.noise(config.runtime.seed, [sample for _, sample, _ in batch])
        if args.solver == "unipc":
            latents = sample_unipc(flow, noise, steps, shift)
        else:
            latents = sample_euler(flow, noise, solver_sigmas(steps, shift))[-1]
        for clip, (prompt, sample, files) in zip(latents, batch, strict=True):
            with VideoOutput(vae, [files], config.video.fps, len(clip)) as output:
                for frame in clip[None].split(1, dim=1):
                    output.emit(frame)
                write_json(files.metadata, video_metadata(config, prompt, sample, "") | {"solver": args.solver})


if __name__ == "__main__":
    main()
