"""Sample videos of the bidirectional teacher: whole clips in many steps, with classifier-free guidance.

python scripts/sample_teacher.py --config_path configs/shapes.yaml --data_path data/shapes_prompts.txt \\
    --output_folder outputs/teacher [--solver unipc] [--seed 7] [teacher.guidance_scale=4 data.num_frames=21 ...]

Each video X.mp4 gets its metadata X.json. Existing videos are kept. Under torchrun the ranks share the videos.
"""

import argparse
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.output import VideoFiles, VideoJob
from pipeline.teacher import write_teacher_videos
from utils.arguments import MAX_COUNT, require_range
from utils.config_loading import load_config
from utils.distributed import rank, world_size
from utils.errors import command
from utils.files import writable_folder
from utils.prompts import read_prompts, unique_stems


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config_path", required=True, help="YAML file under configs/")
    parser.add_argument("--data_path", required=True, help="prompts, one per line")
    parser.add_argument("--output_folder", required=True, help="folder for the videos")
    parser.add_argument("--solver", choices=["euler", "unipc"], default="unipc", help="ODE solver")
    parser.add_argument("--seed", type=int, help="default: runtime.seed")
    parser.add_argument("--num_samples", type=int, default=1, help="videos per prompt")
    parser.add_argument("--batch_size", type=int, default=1, help="videos at a time")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the configuration")
    args = parser.parse_intermixed_args()
    require_range(args, 1, MAX_COUNT, "num_samples")
    require_range(args, 1, math.inf, "batch_size")
    seed = [] if args.seed is None else [f"runtime.seed={args.seed}"]
    config = load_config(args.config_path, [*args.overrides, *seed])
    prompts = read_prompts(args.data_path)
    stems = unique_stems(prompts, args.num_samples)
    folder = writable_folder(args.output_folder)
    jobs = [
        VideoJob(prompt, sample, VideoFiles(folder, stems[prompt.index][sample]))
        for prompt in prompts
        for sample in range(args.num_samples)
    ]
    missing = [job for job in jobs[rank() :: world_size()] if not job.files.is_complete()]
    for job in missing:
        job.files.require_no_folders()
    write_teacher_videos(config, missing, args.solver, args.batch_size)


if __name__ == "__main__":
    main()
