"""Measure speed, memory and operations of rollouts, decoding, text encoding and training; see docs/benchmarks.md.

python scripts/benchmark.py                                # the shipped miniature on a CPU, a minute or two
python scripts/benchmark.py --preset h100 --attention native _native_cudnn --compile on off
python scripts/benchmark.py --what kernels --preset h100 --compile on off                   # no GPU needed
python scripts/benchmark.py --what training --iterations 100 --block_backward on off
python scripts/benchmark.py --output new.json --against old.json

Each combination of the options becomes a row of a Markdown table. The JSON file holds the same results.
"""

import argparse
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tqdm import tqdm

from benchmark.cases import DEFAULT_KINDS, KERNEL_ROWS, KINDS, OPTIONS, PRESETS, Preset, make_cases
from benchmark.measure import CLOCKS, Repeats, matmul_peak
from benchmark.networks import BenchmarkNetworks
from benchmark.report import add_speedups, comparison_table, describe_machine, markdown_report, read_rows, to_json
from benchmark.run import check_cases, run_case
from utils.device import DTYPES
from utils.errors import UserError, command
from utils.files import output_file, write_json


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="shapes", help="model and video size")
    parser.add_argument("--config_path", help="YAML file to measure instead of a preset")
    parser.add_argument(
        "--what", nargs="+", choices=KINDS, default=DEFAULT_KINDS, help="default: all but pass, training and kernels"
    )
    for name, option in OPTIONS.items():
        metavar = None if option.choices else "X"
        parser.add_argument(f"--{name}", nargs="+", choices=option.choices, metavar=metavar, help=option.key)
    parser.add_argument("--passes", nargs="+", choices=KERNEL_ROWS, help="for --what pass and kernels; default: all")
    parser.add_argument(
        "--plain",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compare passes and rollouts with a plain loop; doubles their time",
    )
    parser.add_argument("--warmup", type=int, default=1, help="runs of each row before timing starts")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each row")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: CPU seconds of passes and rollouts")
    parser.add_argument("--iterations", type=int, default=10, help="timed iterations, for --what training")
    parser.add_argument("--device", help="default: the device of the configuration")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmark.json"), help="JSON file of the results")
    parser.add_argument("--against", type=Path, help="JSON file of an earlier run; prints the ratios")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the configuration")
    # An option with several values would read the overrides as its own values.
    overrides = [word for word in sys.argv[1:] if re.match(r"\w+\.\w+=", word)]
    args = parser.parse_intermixed_args([word for word in sys.argv[1:] if word not in overrides])
    args.overrides += overrides
    if args.device:
        args.overrides.insert(0, f"runtime.device={args.device}")
    if args.repeats < 1 or args.warmup < 0:
        raise UserError("--repeats must be at least 1, and --warmup not negative")
    return args


@command
def main() -> None:
    args = parse_arguments()
    preset = Preset(args.config_path, args.config_path, []) if args.config_path else PRESETS[args.preset]
    earlier = read_rows(args.against) if args.against else None
    cases = list(make_cases(preset, args.what, vars(args), args.overrides, args.iterations))
    device, attention = check_cases(cases, preset.random)
    output_file(args.output)

    peak = cache(lambda dtype: matmul_peak(device, DTYPES[dtype]))
    peaks: dict[str, float] = {}
    rows: list[dict[str, Any]] = []
    document = {"machine": describe_machine(device), "attention": attention, "matmul_peak": peaks, "results": rows}
    for case in tqdm(cases, desc="rows", unit="row", mininterval=0.5 if sys.stderr.isatty() else 15):
        if case.kind != "kernels":
            peaks[case.dtype] = peak(case.dtype)
        networks = BenchmarkNetworks(case.config, device, preset.random)
        repeats = Repeats(args.warmup, args.repeats, CLOCKS[args.clock])
        results = run_case(case, networks, repeats, peaks.get(case.dtype, 0), args.passes, args.iterations, args.plain)
        rows.append({"what": case.kind, "settings": case.settings, "figures": to_json(results)})
        add_speedups(rows)
        write_json(args.output, document, indent=1)
    print(markdown_report(document))
    if earlier is not None:
        print(comparison_table(rows, earlier, str(args.against)))
    print(f"\nwrote {args.output}")


if __name__ == "__main__":
    main()
