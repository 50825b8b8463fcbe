"""Score folders of videos with VBench side by side: any videos, videos of VBench's own prompts, and VBench-Long.

python scripts/evaluate_vbench.py block_first=outputs/a timestep_first=outputs/b --python .venv-vbench/bin/python
python scripts/evaluate_vbench.py outputs/a outputs/b --long --long_configs VBench/vbench2_beta_long/configs
python scripts/evaluate_vbench.py --write_prompts vbench_prompts.txt      # VBench's own prompts, for inference.py
python scripts/evaluate_vbench.py outputs/suite --suite

A folder holds X.mp4 with the metadata X.json, as inference.py writes them. Prints a table and writes <mode>.json (all
scores with seeds) and <mode>.csv to --output. Every score is stored at once, so the same command resumes an interrupted
run. VBench needs its own environment with requirements-vbench.txt, see docs/vbench.md.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evaluation.vbench.folder import open_vbench_folder
from evaluation.vbench.installation import CUSTOM_DIMENSIONS, DEFAULT_DIMENSIONS, VBenchInstallation, VBenchMode
from evaluation.vbench.results import (
    covered_dimensions,
    print_comparability_notes,
    score_folders,
    score_table,
    write_scores,
    write_suite_prompts,
)
from evaluation.videos import parse_labelled_path, require_distinct_labels
from utils.errors import UserError, command
from utils.files import writable_folder
from utils.locks import lock_folder
from utils.tables import markdown_table


@command
def main() -> None:
    args = parse_arguments()
    mode = VBenchMode(args.suite, args.long)
    mode.check_dimensions(args.dimensions)
    if args.write_prompts:
        write_suite_prompts(args.write_prompts, VBenchInstallation.find(args.python))
        return
    paths = [parse_labelled_path(word) for word in args.folders]
    if not paths:
        raise UserError("give at least one folder of videos: [name=]folder")
    require_distinct_labels(paths)
    for label, _ in paths:
        if Path(label).name != label:
            raise UserError(f"the label {label!r} is not a valid folder name; choose another with name=folder")

    installation = VBenchInstallation.find(args.python)
    options = installation.long_options(args.long_configs) if mode.long else {}
    suite = installation.read_suite() if mode.suite else None
    output = writable_folder(args.output)
    folders = [open_vbench_folder(label, path, output / mode.name / label, suite) for label, path in paths]
    dimensions = args.dimensions or list(DEFAULT_DIMENSIONS)
    if suite is not None:
        dimensions = covered_dimensions(folders, args.dimensions, suite)
    print_comparability_notes(folders, suite)

    with lock_folder(output, "evaluating in"):
        scores = score_folders(folders, dimensions, mode, installation, options, args.device, args.local_weights)
        write_scores(output, mode, installation, folders, dimensions, scores)
    print(markdown_table(score_table(folders, dimensions, scores)))
    print(f"\nwrote {output}/{mode.name}.json and {mode.name}.csv")
    if failed := [
        f"{name} of {label}" for label, row in scores.items() for name, score in row.items() if score is None
    ]:
        raise UserError(f"VBench failed for {', '.join(failed)} (see above); run the same command again to resume")


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", metavar="[name=]folder", help="folders of videos")
    parser.add_argument("--output", default="outputs/vbench", help="folder for the results")
    parser.add_argument("--suite", action="store_true", help="for videos of VBench's own prompts")
    parser.add_argument("--long", action="store_true", help="use VBench-Long, for videos of five seconds or more")
    more = ", ".join(name for name in CUSTOM_DIMENSIONS if name not in DEFAULT_DIMENSIONS)
    parser.add_argument(
        "--dimensions",
        nargs="+",
        default=[],
        metavar="dimension",
        help=f"default: {', '.join(DEFAULT_DIMENSIONS)}; with --suite, all that the videos cover. "
        f"Without --suite, {more} are also available",
    )
    parser.add_argument(
        "--python", default=sys.executable, help="interpreter of VBench's environment; default: this one"
    )
    parser.add_argument("--device", default="", help="torch device; default: CUDA if available, else the CPU")
    parser.add_argument("--local_weights", action="store_true", help="load weights from VBench's cache folder only")
    parser.add_argument("--long_configs", default="", help="folder of VBench-Long's tables, from a checkout of VBench")
    parser.add_argument("--write_prompts", metavar="file", help="only write VBench's prompts to a file, one per line")
    return parser.parse_args()


if __name__ == "__main__":
    main()
