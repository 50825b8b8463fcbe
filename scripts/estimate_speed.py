"""Estimate the speed on a GPU from the counts of `scripts/benchmark.py --what kernels`. It is no measurement.

python scripts/benchmark.py --what kernels --preset h100 --compile off on --output outputs/kernels.json
python scripts/estimate_speed.py outputs/kernels.json
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmark.estimate import GPUS, estimate_report
from benchmark.report import read_rows
from utils.errors import UserError, command


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("counts", type=Path, help="JSON file of the counts")
    parser.add_argument("--gpu", choices=GPUS, default="H100")
    return parser.parse_args()


@command
def main() -> None:
    args = parse_arguments()
    rows = [row for row in read_rows(args.counts) if row["what"] == "kernels" and row["figures"]]
    if not rows:
        raise UserError(f"{args.counts} has no counts; make them with scripts/benchmark.py --what kernels")
    gpu = GPUS[args.gpu]
    print(f"ESTIMATE for {args.gpu}, not a measurement: operations / {gpu.flops / 1e12:.0f} TFLOP/s")
    print(f"+ elementwise bytes / {gpu.bandwidth / 1e12:.2f} TB/s + {1e6 * gpu.gap:.0f} us per kernel,")
    print(f"and at least {1e6 * gpu.launch:.0f} us of the host per kernel.\n")
    print(estimate_report(rows, gpu))


if __name__ == "__main__":
    main()
