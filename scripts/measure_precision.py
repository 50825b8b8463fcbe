"""Measure the error of 8-bit caches and weights. Prints the table of docs/benchmarks.md.

python scripts/measure_precision.py [--num_videos 8] [--row rollout.cache_dtype=int8 --row ...] [section.key=value ...]

Each row is a change of the configuration. Its videos are compared with those of the unchanged configuration. Rows with
model.quantization need torchao (requirements-quantization.txt); --row selects other rows.
"""

import argparse
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmark.precision import CHOICES, precision_rows
from utils.arguments import require_range
from utils.config_loading import load_config
from utils.errors import command
from utils.prompts import read_prompts
from utils.tables import markdown_table


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config_path", default="configs/shapes.yaml")
    parser.add_argument("--data_path", default="data/shapes_eval_prompts.txt", help="file of prompts, one per line")
    parser.add_argument("--num_videos", type=int, default=8, help="number of prompts, from the start of the file")
    parser.add_argument("--row", action="append", metavar="'section.key=value ...'", help="a row; may be repeated")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the configuration")
    args = parser.parse_intermixed_args()
    require_range(args, 1, math.inf, "num_videos")
    return args


@command
def main() -> None:
    args = parse_arguments()
    config = load_config(args.config_path, args.overrides)
    prompts = [prompt.text for prompt in read_prompts(args.data_path)[: args.num_videos]]
    table = [("change", "latent RMSE", "PSNR, dB")]
    for change, error in precision_rows(config, prompts, args.row or CHOICES):
        table.append((f"`{change}`", f"{error.latent_rmse:.3f}", f"{error.psnr:.1f}"))
    print(markdown_table(table))


if __name__ == "__main__":
    main()
