"""Plot the curves of training runs from their metrics files, one panel per metric, one line per run.

python scripts/plot_metrics.py runs/shapes/teacher [name=other_run ...] --output curves.png [--only loss motion]
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from evaluation.plots import save_line_plot
from evaluation.videos import parse_labelled_path
from utils.errors import UserError, command
from utils.files import writable_folder


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="[name=]logdir")
    parser.add_argument("--output", type=Path, required=True, help="PNG file")
    parser.add_argument("--only", nargs="+", help="these metrics; default: all")
    parser.add_argument("--smooth", type=int, default=1, help="logged lines that a point is the mean of")
    args = parser.parse_intermixed_args()
    if args.smooth < 1:
        raise UserError(f"--smooth must be at least 1, not {args.smooth}")
    if args.output.suffix.lower() != ".png" or args.output.is_dir():
        raise UserError(f"--output {args.output} must be a file that ends in .png")
    writable_folder(args.output.parent)
    runs = [read_run(word, args.smooth) for word in args.runs]
    names = args.only or list(dict.fromkeys(name for _, curves in runs for name in curves))
    if not names:
        raise UserError("nothing is logged yet in what was given; wait for train.log_every iterations")
    missing = [name for name in names if not any(name in curves for _, curves in runs)]
    if missing:
        raise UserError(f"no run has logged {', '.join(missing)}")
    save_line_plot(args.output, names, [(label, curves, "-") for label, curves in runs], "iteration")
    print(f"wrote {args.output}")


def read_run(word: str, smooth: int) -> tuple[str, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Label and curves (iterations, values) of a run."""
    label, folder = parse_labelled_path(word)
    file = Path(folder) / "metrics.jsonl"
    try:
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        if not all(isinstance(line, dict) and "iteration" in line for line in lines):
            raise ValueError("a line has no iteration")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {file}: {error}") from None
    points: dict[str, list[tuple[float, float]]] = {}
    for line in lines:
        for name, value in line.items():
            if name != "iteration":
                points.setdefault(name, []).append((line["iteration"], value))
    curves = {}
    for name, pairs in points.items():
        x, y = np.array(pairs).T
        count = max(1, len(x) // smooth) if smooth > 1 else len(x)
        chunks = np.array_split(np.arange(len(x)), count)
        curves[name] = (np.array([x[c].mean() for c in chunks]), np.array([y[c].mean() for c in chunks]))
    return label, curves


if __name__ == "__main__":
    main()
