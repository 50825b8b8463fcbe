"""Measure folders of videos and compare them: appearance, motion, drift and seams, without a neural network.

python scripts/evaluate.py outputs/demo
python scripts/evaluate.py block_first=outputs/a timestep_first=outputs/b --output outputs/evaluation
python scripts/evaluate.py ours=outputs/a theirs=elsewhere/videos --data_path data/prompts.txt

A folder holds X.mp4 with the metadata X.json, as inference.py and scripts/sample_teacher.py write them. Videos without
metadata must be named after the lines of --data_path. `name=folder` sets the label of a folder. Videos of the miniature
world are also compared with the ground truth of their captions. Their tables include noise floors: renderings of the
same captions, and these renderings after the VAE.

Prints the mean of every metric. Also prints the difference of every folder from the first, on the same prompts and
seeds. Both have 95% intervals. Writes report.html (one self-contained page), evaluation.json, videos.csv and curves.png
to --output. docs/evaluation.md explains the metrics.
"""

import argparse
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evaluation.evaluate import EvaluationOptions, all_metrics, measure_folders, select_metrics
from evaluation.features import FEATURE_CURVES, FEATURE_METRICS, FeatureModel, add_features, without_features
from evaluation.results import EvaluationResults, report_examples
from evaluation.video_metrics import PLOTTED_PIXEL_CURVES
from evaluation.videos import open_folders
from shapes.unnamed import select_world
from utils.arguments import MAX_COUNT, require_range
from utils.device import pick_device
from utils.errors import UserError, command
from utils.files import writable_folder
from utils.locks import lock_output
from utils.prompts import read_prompts
from utils.tables import markdown_table


@command
def main() -> None:
    args = parse_arguments()
    folders = open_folders(args.folders, read_prompts(args.data_path) if args.data_path else ())
    world = select_world(args.world, folders)
    metrics = [*all_metrics(world), *(FEATURE_METRICS if args.features else ())]
    table_metrics = select_metrics(metrics, args.metrics)
    model = FeatureModel(args.features, pick_device(args.device)) if args.features else None
    output = writable_folder(args.output)
    cache_folder = writable_folder(args.cache or output / "observed")

    with lock_output(output, "evaluating in"):
        options = EvaluationOptions(world, args.block_frames, args.max_frames, cache_folder)
        methods = measure_folders(folders, options, args.processes)
        plotted_curves = [*(world.plotted_curves if world else ()), *PLOTTED_PIXEL_CURVES]
        if model:
            add_features(folders, methods, model, cache_folder)
            plotted_curves += FEATURE_CURVES
        results = EvaluationResults(methods, metrics, table_metrics, plotted_curves)
        if world and args.floor_videos:
            from shapes.noise_floors import measure_noise_floors  # imports diffusers, which takes seconds

            floor = args.floor_videos, args.base, args.block_frames
            results.noise_floors = measure_noise_floors(methods[0], world, *floor)
            without_features(results.noise_floors)
        for table in results.tables:
            print(f"{table.title}\n\n{markdown_table(table.rows)}\n")
        examples = report_examples(folders, args.examples, args.max_frames)
        results.write(output, folders, examples, shlex.join(["python", *sys.argv]))
        print(f"wrote report.html, evaluation.json, videos.csv and curves.png to {output}")


def parse_arguments() -> argparse.Namespace:
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", metavar="[name=]folder", help="the first is the baseline")
    parser.add_argument("--output", default="outputs/evaluation", help="folder for the results")
    parser.add_argument("--data_path", help="prompt file of videos without metadata")
    parser.add_argument(
        "--world", choices=["auto", "shapes", "any"], default="auto", help="auto: by the prompts; any: no world"
    )
    parser.add_argument("--max_frames", type=int, help="measure only the first pixel frames; default: all")
    parser.add_argument("--block_frames", type=int, default=3, help="latent frames per block, for the seam metrics")
    parser.add_argument("--base", default="data/shapes-wan", help="model directory with the VAE of the noise floor")
    parser.add_argument("--floor_videos", type=int, default=24, help="renderings per noise floor; 0: no noise floors")
    parser.add_argument("--metrics", "--figures", nargs="+", metavar="NAME", help="printed metrics; default: all")
    parser.add_argument("--cache", help="folder for measurements, reused by later runs; default: OUTPUT/observed")
    parser.add_argument("--features", metavar="MODEL", help="image model, such as facebook/dinov2-base; default: none")
    parser.add_argument("--device", default="auto", help="of --features: auto, cuda, cuda:1, mps or cpu")
    parser.add_argument("--examples", type=int, default=8, help="number of prompts with videos in the report")
    parser.add_argument("--processes", type=int, default=0, help="processes that measure videos; default: one per core")
    args = parser.parse_args()
    require_range(args, 0, MAX_COUNT, "floor_videos", "examples")
    require_range(args, 0, 1000, "processes")
    require_range(args, 1, MAX_COUNT, "block_frames")
    if args.max_frames is not None and args.max_frames < 2:
        raise UserError("--max_frames must be at least 2: motion is measured between frames")
    return args


if __name__ == "__main__":
    main()
