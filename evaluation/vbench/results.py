"""Score several folders with VBench, and print and write the results."""

import csv
import io
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from evaluation.vbench.folder import VBenchFolder
from evaluation.vbench.installation import DIMENSIONS, VBenchInstallation, VBenchMode
from utils.errors import UserError
from utils.files import writable_folder, write_json, write_text

Scores = dict[str, dict[str, dict | None]]  # by method and dimension; None where VBench failed


def covered_dimensions(folders: Sequence[VBenchFolder], requested: Sequence[str], suite: Sequence[dict]) -> list[str]:
    """Return the requested dimensions, or by default all for which every folder has videos of VBench's suite.

    Raises:
        UserError: if a folder has no videos for a requested dimension, or the folders have no dimension in common.
    """
    available = []
    for folder in folders:
        prompts = {video.prompt for video in folder.videos}
        names = {name for entry in suite if entry["prompt_en"] in prompts for name in entry["dimension"]}
        if missing := [name for name in requested if name not in names]:
            raise UserError(f"{folder.source} has no videos of the prompts of {', '.join(missing)}; leave these out")
        available.append(names)
    dimensions = [name for name in requested or DIMENSIONS if all(name in names for names in available)]
    if not dimensions:
        raise UserError("the folders have no dimension in common; score them separately")
    return dimensions


def print_comparability_notes(folders: Sequence[VBenchFolder], suite: Sequence[dict] | None) -> None:
    """Print why the scores may not be comparable: extended prompts, missing prompts, different videos."""
    for folder in folders:
        if extended := sum(video.extended for video in folder.videos):
            print(
                f"{folder.label}: {extended} of {len(folder.videos)} videos were generated from extended prompts; "
                "VBench compares them with the original prompts"
            )
        if suite is not None:
            total = len({entry["prompt_en"] for entry in suite})
            number = len({video.prompt for video in folder.videos})
            if total > number:
                print(f"{folder.label}: {number} of VBench's {total} prompts; published scores use all")
    first = {(video.prompt, video.seed, video.sample) for video in folders[0].videos}
    for folder in folders[1:]:
        keys = {(video.prompt, video.seed, video.sample) for video in folder.videos}
        if keys != first:
            common = len(keys & first)
            print(f"{folder.label} and {folders[0].label} have {common} prompts, seeds and samples in common")


def score_folders(
    folders: Sequence[VBenchFolder],
    dimensions: Sequence[str],
    mode: VBenchMode,
    installation: VBenchInstallation,
    options: dict,
    device: str,
    local: bool,
) -> Scores:
    """Compute all missing scores with a progress bar. If a dimension fails, its error is printed and the others go on.

    Arguments as in `VBenchFolder.score`.
    """
    with tqdm(total=len(folders) * len(dimensions), unit="score") as bar:
        for folder in folders:
            writable_folder(folder.folder)
            for dimension in dimensions:
                bar.set_description(f"{folder.label} {dimension}")
                if folder.load_score(dimension, installation.version) is None:
                    try:
                        folder.score(dimension, mode, installation, options, device, local)
                    except UserError as error:
                        bar.write(str(error), file=sys.stderr)
                bar.update()
    return {f.label: {d: f.load_score(d, installation.version) for d in dimensions} for f in folders}


def score_table(folders: Sequence[VBenchFolder], dimensions: Sequence[str], scores: Scores) -> list[list[str]]:
    """Return a row per dimension and a column per folder, in percent as in VBench's own tables."""
    rows = [["[%]", *(f"{folder.label} ({len(folder.videos)} videos)" for folder in folders)]]
    for name in dimensions:
        row = [scores[folder.label][name] for folder in folders]
        rows.append([name, *("failed" if score is None else f"{100 * score['score']:.2f}" for score in row)])
    return rows


def write_scores(
    output: Path,
    mode: VBenchMode,
    installation: VBenchInstallation,
    folders: Sequence[VBenchFolder],
    dimensions: Sequence[str],
    scores: Scores,
) -> None:
    """Write <mode>.json and <mode>.csv; a score is null, or empty, where VBench failed."""
    report = {
        "vbench": installation.version,
        "mode": mode.name,
        "prompts": "the original prompts (`name` in a video's metadata), even where an extended `prompt` was used",
        "methods": [
            {
                "label": folder.label,
                "folder": folder.source,
                "num_videos": len(folder.videos),
                "num_extended": sum(video.extended for video in folder.videos),
                "seeds": sorted({video.seed for video in folder.videos}),
                "scores": {d: score and score["score"] for d, score in scores[folder.label].items()},
                "videos": {d: score and score["videos"] for d, score in scores[folder.label].items()},
            }
            for folder in folders
        ],
    }
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(["dimension", *(folder.label for folder in folders)])
    for name in dimensions:
        row = [scores[folder.label][name] for folder in folders]
        lines.writerow([name, *("" if score is None else score["score"] for score in row)])
    write_json(output / f"{mode.name}.json", report, indent=1)
    write_text(output / f"{mode.name}.csv", text.getvalue())


def write_suite_prompts(path: str, installation: VBenchInstallation) -> None:
    """Write VBench's prompts, each once and one per line, as a prompt file for inference.py."""
    prompts = list(dict.fromkeys(entry["prompt_en"] for entry in installation.read_suite()))
    writable_folder(Path(path).parent)
    write_text(path, "\n".join(prompts) + "\n")
    print(f"wrote {path}: {len(prompts)} prompts")
