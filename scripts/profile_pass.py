"""Profile one pass of the DiT with a full window: print its kernels by time, and write a trace for a browser.

python scripts/profile_pass.py --preset h100 --pass denoise model.compile=true
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmark.cases import PRESETS, make_cases
from benchmark.networks import BenchmarkNetworks
from benchmark.passes import PASSES
from benchmark.profile_pass import profile_pass
from benchmark.run import check_cases
from utils.errors import command
from utils.files import output_file


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="shapes", help="model and video size")
    parser.add_argument("--pass", dest="name", choices=PASSES, default="denoise")
    parser.add_argument("--device", help="default: the device of the configuration")
    parser.add_argument("--output", type=Path, default=Path("outputs/profile.json"), help="trace for ui.perfetto.dev")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the configuration")
    args = parser.parse_intermixed_args()
    if args.device:
        args.overrides.insert(0, f"runtime.device={args.device}")
    return args


@command
def main() -> None:
    args = parse_arguments()
    preset = PRESETS[args.preset]
    [case] = make_cases(preset, ["pass"], {}, args.overrides, iterations=0)
    device, attention = check_cases([case], preset.random)
    output_file(args.output)
    networks = BenchmarkNetworks(case.config, device, preset.random)
    table = profile_pass(networks, args.name, args.output)
    print(*attention, "", table, "", f"wrote {args.output}", sep="\n")


if __name__ == "__main__":
    main()
