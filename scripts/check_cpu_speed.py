"""Measure the speed on a CPU against the plain loop, and against an older version; print the ratios and their goals.

OMP_NUM_THREADS=1 python scripts/check_cpu_speed.py
python scripts/check_cpu_speed.py --what videos --old ../older-checkout

Each cell is the median of interleaved pairs of runs, with the smallest and the largest ratio; see docs/benchmarks.md.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmark.checkouts import check_old
from benchmark.goals import Ratio, pass_ratios, ratio_table, rollout_ratios, video_ratios
from benchmark.measure import CLOCKS, Repeats
from benchmark.report import describe_machine
from utils.errors import UserError, command
from utils.files import output_file, write_json

PARTS = ("passes", "rollouts", "videos")


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", nargs="+", choices=PARTS, help="default: passes rollouts; with --old also videos")
    parser.add_argument("--old", type=Path, help="older checkout, or its result file of scripts/benchmark.py")
    parser.add_argument("--repeats", type=int, default=31, help="interleaved pairs of passes")
    parser.add_argument("--turns", type=int, default=5, help="interleaved pairs of rollouts, and of benchmark runs")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: CPU seconds of passes and rollouts")
    parser.add_argument("--output", type=Path, help="JSON file of the ratios")
    args = parser.parse_args()
    args.what = args.what or (PARTS if args.old else PARTS[:2])
    if args.repeats < 1 or args.turns < 1:
        raise UserError("--repeats and --turns must be at least 1")
    if "videos" in args.what and args.old is None:
        raise UserError("--what videos requires --old")
    if args.old:
        check_old(args.old)
    return args


@command
def main() -> None:
    args = parse_arguments()
    if args.output:
        output_file(args.output)
    clock, rows = CLOCKS[args.clock], list[Ratio]()
    if "passes" in args.what:
        rows += pass_ratios(Repeats(2, args.repeats, clock))
    if "rollouts" in args.what:
        rows += rollout_ratios(Repeats(1, args.turns, clock))
    if "videos" in args.what:
        rows += video_ratios(args.old, args.turns)
    machine = describe_machine(torch.device("cpu"))
    print(f"{machine['device']}, torch {machine['torch']}, {machine['date']}, {args.clock} time.\n")
    print(ratio_table(rows))
    if args.output:
        results = [row._asdict() | {"measured": dataclasses.asdict(row.measured)} for row in rows]
        write_json(args.output, {"machine": machine, "ratios": results}, indent=1)
        print(f"\nwrote {args.output}")


if __name__ == "__main__":
    main()
