"""Plot the metrics of training runs: one panel per metric, one line per run.

python scripts/plot_metrics.py runs/shapes/teacher [name=other_run ...] --output curves.png [--only loss motion]
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evaluation.plots import save_line_plot
from evaluation.videos import parse_labelled_path
from trainer.logging import read_curves
from utils.errors import UserError, command
from utils.files import output_file


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="[name=]logdir", help="folders of training runs")
    parser.add_argument("--output", type=Path, required=True, help="PNG file")
    parser.add_argument("--only", nargs="+", help="metrics to plot; default: all")
    parser.add_argument("--smooth", type=int, default=1, help="logged lines to average per point")
    args = parser.parse_intermixed_args()
    if args.smooth < 1:
        raise UserError(f"--smooth must be at least 1, not {args.smooth}")
    if args.output.suffix.lower() != ".png":
        raise UserError(f"--output {args.output} must be a file that ends in .png")
    output_file(args.output)
    labelled = [parse_labelled_path(word) for word in args.runs]
    runs = [(label, read_curves(Path(folder), args.smooth)) for label, folder in labelled]
    names = args.only or list(dict.fromkeys(name for _, curves in runs for name in curves))
    if not names:
        raise UserError("these runs have no logged metrics yet; wait for train.log_every iterations")
    missing = [name for name in names if not any(name in curves for _, curves in runs)]
    if missing:
        raise UserError(f"no run has logged {', '.join(missing)}; leave out --only to plot all metrics")
    save_line_plot(args.output, names, [(label, curves, "-") for label, curves in runs], "iteration")
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
