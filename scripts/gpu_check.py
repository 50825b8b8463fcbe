"""Run everything that only a GPU can show, within ten minutes, and write a report in Markdown and JSON.

scripts/gpu_check.sh                                       # on a machine with a GPU
scripts/gpu_check.sh --dry-run                             # list the parts, their time limits and commands
scripts/gpu_check.sh --device cpu --small                  # try all commands on a CPU

Each part has its own time limit, ten times as long with --small. A part that fails does not stop the others; the
command then exits with code 1.
"""

import argparse
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmark.gpu_check import check_parts, is_available
from utils.errors import UserError, command
from utils.files import writable_folder


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="default: cuda")
    parser.add_argument("--small", action="store_true", help="the miniature instead of Wan2.1-1.3B, few repeats")
    parser.add_argument("--parts", nargs="+", metavar="NAME", help="parts whose names start so; default: all")
    parser.add_argument("--output", type=Path, default=Path("outputs/gpu_check"), help="folder of the report")
    parser.add_argument("--dry-run", action="store_true", help="list the parts and exit")
    return parser.parse_args()


@command
def main() -> None:
    args = parse_arguments()
    parts = check_parts(args.device, args.small, args.output.resolve())
    parts = [part for part in parts if not args.parts or part.name.startswith(tuple(args.parts))]
    if not parts:
        raise UserError(f"no part has a name that starts with {' or '.join(args.parts)}; --dry-run lists them")
    if args.dry_run:
        for part in parts:
            note = "" if is_available(part) else " (not available in this version)"
            print(f"{part.name}, at most {part.seconds} s{note}:\n    python {shlex.join(part.words)}")
        print(f"together at most {sum(part.seconds for part in parts)} s")
        return

    # Import heavy modules after the arguments are checked, so that errors appear at once.
    from benchmark.gpu_check import run_part, write_report
    from benchmark.report import describe_machine
    from utils.device import pick_device

    machine = describe_machine(pick_device(args.device))
    folder = writable_folder(str(args.output.resolve()))
    outcomes = []
    for part in parts:
        outcomes.append(run_part(part, 10 if args.small else 1))
        print(f"{part.name}: {outcomes[-1].status}, {outcomes[-1].seconds:.0f} s", flush=True)
        write_report(outcomes, machine, folder)
    print(f"wrote {folder}/report.md and {folder}/report.json")
    if any(outcome.status in ("failed", "timed out") for outcome in outcomes):
        sys.exit(1)


if __name__ == "__main__":
    main()
