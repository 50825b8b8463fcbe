"""Score folders of videos with VBench, side by side: its dimensions for any videos, its own prompts, and VBench-Long.

python scripts/evaluate_vbench.py block_first=outputs/a timestep_first=outputs/b --python .venv-vbench/bin/python
python scripts/evaluate_vbench.py outputs/a outputs/b --long --long_configs VBench/vbench2_beta_long/configs
python scripts/evaluate_vbench.py --write_prompts vbench_prompts.txt      # VBench's own prompts, to make videos of
python scripts/evaluate_vbench.py outputs/suite --suite

A folder holds X.mp4 with X.json beside it, as inference.py writes them. Prints a table and writes <mode>.json (scores,
and every video's with its seed) and <mode>.csv to --output. Each dimension is kept as soon as it is scored: the same
command again goes on where it stopped. Needs requirements-vbench.txt, in an environment of its own: docs/vbench.md.
"""

import argparse
import csv
import io
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tqdm import tqdm

from evaluation.vbench import CUSTOM, DIMENSIONS, USUAL, Installation, Method, Protocol, find_method
from evaluation.videos import parse_labelled_path, require_distinct_labels
from utils.errors import UserError, command
from utils.files import only_user, writable_folder, write_json, write_text
from utils.tables import markdown_table


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", metavar="[name=]folder")
    parser.add_argument("--output", default="outputs/vbench", help="folder of the results")
    parser.add_argument("--suite", action="store_true", help="the videos are of VBench's own prompts")
    parser.add_argument("--long", action="store_true", help="VBench-Long: for videos of five seconds or more")
    parser.add_argument(
        "--dimensions",
        nargs="+",
        default=[],
        metavar="dimension",
        help=f"default: {', '.join(USUAL)}, or with --suite all that there are videos of; without --suite there are "
        f"also {', '.join(name for name in CUSTOM if name not in USUAL)}",
    )
    parser.add_argument(
        "--python", default=sys.executable, help="interpreter of VBench's environment; default: this one"
    )
    parser.add_argument("--device", default="", help="default: CUDA if there is some, else the CPU")
    parser.add_argument("--local_weights", action="store_true", help="VBench's `local`: weights from its cache folder")
    parser.add_argument("--long_configs", default="", help="folder of VBench-Long's tables, of a checkout of VBench")
    parser.add_argument("--write_prompts", metavar="file", help="write VBench's prompts, one per line, and end")
    args = parser.parse_args()
    protocol = Protocol(args.suite, args.long)
    protocol.check(args.dimensions)
    if args.write_prompts:
        write_prompts(args.write_prompts, Installation.find(args.python))
        return
    labelled = [parse_labelled_path(word) for word in args.folders]
    if not labelled:
        raise UserError("give at least one folder of videos: [name=]folder")
    require_distinct_labels(labelled)
    for label, _ in labelled:
        if Path(label).name != label:
            raise UserError(f"the name {label!r} cannot be a folder's; choose another: name=folder")

    installed = Installation.find(args.python)
    options = installed.long_options(args.long_configs) if protocol.long else {}
    suite = installed.suite() if protocol.suite else None
    output = writable_folder(args.output)
    methods = [find_method(label, source, output / protocol.mode / label, suite) for label, source in labelled]
    dimensions = args.dimensions or list(USUAL)
    if suite is not None:
        dimensions = covered(methods, args.dimensions, suite)
    print_notes(methods, suite)

    failures: list[str] = []
    for method in methods:
        writable_folder(method.folder)
    with only_user(output, "evaluating in"), tqdm(total=len(methods) * len(dimensions), unit="score") as bar:
        for method in methods:
            for dimension in dimensions:
                bar.set_description(f"{method.label} {dimension}")
                if method.result(dimension, installed.version) is None:
                    try:
                        method.score(dimension, protocol, installed, options, args.device, args.local_weights)
                    except UserError as error:  # the others may work
                        bar.write(str(error), file=sys.stderr)
                        failures.append(f"{dimension} of {method.label}")
                bar.update()
        results = {m.label: {d: m.result(d, installed.version) for d in dimensions} for m in methods}
        write_results(output, protocol, installed, methods, dimensions, results)
    rows = table(methods, dimensions, results)
    print(markdown_table(rows))
    print(f"\nwrote {output}/{protocol.mode}.json and {protocol.mode}.csv")
    if failures:
        raise UserError(f"VBench failed for {', '.join(failures)} (see above); run the same command again to go on")


def covered(methods: Sequence[Method], asked: Sequence[str], suite: Sequence[dict]) -> list[str]:
    """The dimensions that every method has videos of.

    Raises:
        UserError: if there are none, or not those that are asked for.
    """
    having = []
    for method in methods:
        prompts = {video.prompt for video in method.videos}
        having.append({name for entry in suite if entry["prompt_en"] in prompts for name in entry["dimension"]})
        if missing := [name for name in asked if name not in having[-1]]:
            raise UserError(f"{method.source} has no videos of the prompts of {', '.join(missing)}")
    dimensions = [name for name in asked or DIMENSIONS if all(name in names for names in having)]
    if not dimensions:
        raise UserError("the folders have videos of no dimension in common")
    return dimensions


def print_notes(methods: Sequence[Method], suite: Sequence[dict] | None) -> None:
    """Say what makes scores less comparable than they look."""
    for method in methods:
        if extended := sum(video.extended for video in method.videos):
            print(
                f"{method.label}: {extended} of {len(method.videos)} videos were made from extended prompts; VBench "
                "compares them with the original ones"
            )
        if suite is not None:
            wanted = {entry["prompt_en"] for entry in suite}
            if len(wanted) > (number := len({video.prompt for video in method.videos})):
                print(f"{method.label}: {number} of VBench's {len(wanted)} prompts; published scores are of all")
    first = {(video.prompt, video.seed, video.sample) for video in methods[0].videos}
    for method in methods[1:]:
        keys = {(video.prompt, video.seed, video.sample) for video in method.videos}
        if keys != first:
            shared = len(keys & first)
            print(f"{method.label} and {methods[0].label} have {shared} prompts, seeds and samples in common")


def table(methods: Sequence[Method], dimensions: Sequence[str], results: dict) -> list[list[str]]:
    """Rows of text: a dimension each, a column per method, in percent as VBench's own tables."""
    rows = [["[%]", *(f"{method.label} ({len(method.videos)} videos)" for method in methods)]]
    for name in dimensions:
        found = [results[method.label][name] for method in methods]
        rows.append([name, *("failed" if result is None else f"{100 * result['score']:.2f}" for result in found)])
    return rows


def write_results(
    output: Path,
    protocol: Protocol,
    installed: Installation,
    methods: Sequence[Method],
    dimensions: Sequence[str],
    results: dict,
) -> None:
    """<mode>.json and <mode>.csv; a score is null, or empty, where VBench failed."""
    report = {
        "vbench": installed.version,
        "mode": protocol.mode,
        "prompts": "the original ones: `name` of a video's record, also where the model was fed an extended `prompt`",
        "methods": [
            {
                "label": method.label,
                "folder": method.source,
                "num_videos": len(method.videos),
                "num_extended": sum(video.extended for video in method.videos),
                "seeds": sorted({video.seed for video in method.videos}),
                "scores": {d: result and result["score"] for d, result in results[method.label].items()},
                "videos": {d: result and result["videos"] for d, result in results[method.label].items()},
            }
            for method in methods
        ],
    }
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(["dimension", *(method.label for method in methods)])
    for name in dimensions:
        found = [results[method.label][name] for method in methods]
        lines.writerow([name, *("" if result is None else result["score"] for result in found)])
    write_json(output / f"{protocol.mode}.json", report, indent=1)
    write_text(output / f"{protocol.mode}.csv", text.getvalue())


def write_prompts(path: str, installed: Installation) -> None:
    """VBench's prompts, each once: the file for inference.py --data_path."""
    prompts = list(dict.fromkeys(entry["prompt_en"] for entry in installed.suite()))
    writable_folder(Path(path).parent)
    write_text(path, "\n".join(prompts) + "\n")
    print(f"wrote {path}: {len(prompts)} prompts")


if __name__ == "__main__":
    main()
