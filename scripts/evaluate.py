"""Measure folders of videos, and compare them: looks, motion, drift and seams, without any model.

python scripts/evaluate.py outputs/demo
python scripts/evaluate.py block_first=outputs/a timestep_first=outputs/b --output outputs/evaluation
python scripts/evaluate.py ours=outputs/a theirs=elsewhere/videos --data_path data/prompts.txt

A folder holds X.mp4 with X.json beside it, as inference.py and scripts/sample_teacher.py write them, or any mp4 that
is named by a line of --data_path; `name=folder` says what to call it. Every video is measured from its pixels and
optical flow (evaluation/video_metrics.py). Those of the miniature's world are also measured against what their
prompts say
(shapes/metrics.py), with noise floors beside every figure: the same prompts rendered exactly, and those
renderings through the VAE, both through the video encoder as well.

Writes to --output: report.html, one page that holds everything; evaluation.json; videos.csv, a line per video and
figure; curves.png. Prints two tables: every folder by itself, and what it differs by from the first one on the same
prompts and seeds, with 95% intervals; `--figures` chooses their rows. docs/evaluation.md says what the figures mean.

What is seen in a video is kept in --cache (OUTPUT/observed): a rerun, other folders beside it or another --max_frames
do not look again.
"""

import argparse
import csv
import itertools
import multiprocessing
import os
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from tqdm import tqdm

from evaluation import video_metrics as video_measures
from evaluation.figures import Figure, take_figures
from evaluation.measurements import Observed, look, observe
from evaluation.methods import (
    Found,
    Key,
    Measured,
    Method,
    compare,
    find_videos,
    pair_table,
    require_distinct,
    table,
)
from evaluation.plots import save_lines, split_label
from evaluation.report import Example, Table, strip, write_report
from evaluation.side_by_side import write_side_by_side
from shapes import metrics as shapes_measures
from shapes import world as shapes
from utils.contact_sheet import ContactSheetSampler
from utils.errors import UserError, command
from utils.files import atomic_path, writable_folder, write_json
from utils.prompts import read_prompts
from utils.tables import markdown_table
from utils.video import VideoReader, VideoWriter

MAX_POINTS = 100  # of a curve
STRIP_FRAMES = 6
OverTime = Mapping[str, tuple[np.ndarray, np.ndarray]]  # by curve: seconds and values


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", metavar="[name=]folder")
    parser.add_argument("--output", default="outputs/evaluation", help="folder of the results")
    parser.add_argument("--data_path", help="prompt file of videos that have no record beside them")
    parser.add_argument("--world", choices=["auto", "shapes", "any"], default="auto", help="auto: by the prompts")
    parser.add_argument("--max_frames", type=int, help="pixel frames: measure only so many, from the start")
    parser.add_argument("--block_frames", type=int, default=3, help="latent frames per block, for the seams")
    parser.add_argument("--base", default="data/shapes-wan", help="model directory with the VAE, for its noise floor")
    parser.add_argument("--floor_videos", type=int, default=24, help="rendered clips per noise floor; 0: no floors")
    parser.add_argument("--figures", nargs="+", metavar="NAME", help="rows of the tables; default: all")
    parser.add_argument("--cache", help="folder for what is seen in the videos; default: OUTPUT/observed")
    parser.add_argument("--examples", type=int, default=8, help="prompts whose videos the report shows")
    parser.add_argument("--processes", type=int, default=0, help="that measure videos; default: one per core")
    args = parser.parse_args()
    if min(args.floor_videos, args.processes, args.examples) < 0 or args.block_frames < 1:
        raise UserError("--floor_videos, --processes and --examples must not be negative, --block_frames at least 1")
    if args.max_frames is not None and args.max_frames < 2:
        raise UserError("--max_frames must be at least 2: one frame does not move")
    labelled = [split_label(word) for word in args.folders]
    require_distinct(labelled)
    prompts = read_prompts(args.data_path) if args.data_path else ()
    found = [(label, folder, find_videos(folder, prompts)) for label, folder in labelled]
    in_shapes_world = is_shapes_world(args.world, [key for *_, videos in found for _, key, _ in videos])
    figures = (*(shapes_measures.FIGURES if in_shapes_world else ()), *video_measures.FIGURES)
    rows = chosen_figures(figures, args.figures)
    output = writable_folder(args.output)
    kept = writable_folder(args.cache or output / "observed")

    few = sum(len(videos) for _, _, videos in found) < 16  # a process takes seconds to start
    workers = 1 if few else args.processes or os.cpu_count() or 1
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context) if workers > 1 else ThreadPoolExecutor(1) as pool:
        options = Options(in_shapes_world, args.block_frames, args.max_frames, kept)
        methods = [measure_folder(label, folder, videos, options, pool) for label, folder, videos in found]
    floors = []
    if in_shapes_world and args.floor_videos:
        floors = noise_floors(methods[0], args.floor_videos, args.base, args.block_frames)

    tables = [Table("Means over videos, with 95% intervals.", table([*methods, *floors], rows))]
    if len(methods) > 1:
        title = "Differences on the same prompts, seeds and samples, with 95% intervals; * marks what excludes zero."
        tables.append(Table(title, pair_table(methods, rows)))
    for shown in tables:
        print(f"{shown.title}\n\n{markdown_table(shown.rows)}\n")
    curves = {method.label: curves_over_time(method) for method in [*methods, *floors]}
    lines = [(m.label, curves[m.label], ":" if m in floors else "-") for m in [*methods, *floors]]
    names = dict.fromkeys((*(shapes_measures.CURVES if in_shapes_world else ()), *video_measures.CURVES))
    save_lines(output / "curves.png", list(names), lines, "seconds")
    write_json(output / "evaluation.json", as_json(methods, floors, figures, curves), indent=1)
    with atomic_path(output / "videos.csv") as path:
        write_csv(path, methods, figures)
    write_report(
        output / "report.html",
        "Evaluation of " + ", ".join(m.label for m in methods),
        [m.label for m in methods],
        commands(found),
        tables,
        [(f"{f.name} [{f.unit}]", f.meaning) for f in figures],
        output / "curves.png",
        examples(found, args.examples, args.max_frames),
    )
    print(f"wrote report.html, evaluation.json, videos.csv and curves.png to {output}")


@dataclass(frozen=True)
class Options:
    """How videos are measured."""

    in_shapes_world: bool
    block_frames: int
    max_frames: int | None
    kept: Path


def chosen_figures(figures: Sequence[Figure], names: Sequence[str] | None) -> list[Figure]:
    """The figures of these names, in that order; all for None.

    Raises:
        UserError: if there is none of a name.
    """
    by_name = {figure.name: figure for figure in figures}
    for name in names or ():
        if name not in by_name:
            raise UserError(f"no figure {name!r} of these videos; --figures takes {', '.join(by_name)}")
    return [by_name[name] for name in names or by_name]


def is_shapes_world(choice: str, keys: Sequence[Key]) -> bool:
    """Whether every prompt is a caption of the miniature's world; says so if only some are."""
    if choice != "auto":
        return choice == "shapes"
    captions = [shapes.is_caption(key.prompt) for key in keys]
    if any(captions) and not all(captions):
        print(
            f"{captions.count(False)} of {len(keys)} prompts are not of the miniature's world; measuring pixels alone"
        )
    return all(captions)


def measure_folder(label: str, folder: str, videos: Sequence[Found], options: Options, pool: Executor) -> Method:
    """Measure every video of a folder."""
    measured = pool.map(measure_video, videos, itertools.repeat(options))
    return Method(label, list(tqdm(measured, desc=label, unit="video", total=len(videos))), folder)


def measure_video(video: Found, options: Options) -> Measured:
    """The figures of one video.

    Raises:
        UserError: if it cannot be read, or is not of the miniature's world though it should be.
    """
    path, key, _ = video
    try:
        seen = observe(path, options.in_shapes_world, options.max_frames, options.kept)
    except ValueError as error:
        raise UserError(f"cannot measure {path}: {error}") from None
    return judge(seen, key, path.name, options.block_frames)


def judge(seen: Observed, key: Key, file: str, block_frames: int) -> Measured:
    """The figures of what was seen in a video."""
    curves = video_measures.measure(seen.pixels, block_frames)
    figures = video_measures.FIGURES
    if seen.found:
        curves |= shapes_measures.judge(seen.found, shapes.parse_caption(key.prompt), block_frames)
        figures = (*shapes_measures.FIGURES, *figures)
    return Measured(key, file, take_figures(figures, curves), curves, seen.fps)


def noise_floors(method: Method, num_videos: int, base: str, block_frames: int) -> list[Method]:
    """The first prompts of a method as rendered truth, and that through the VAE, at the length of its longest video."""
    import torch

    from model.vae import WanVAE
    from model.weights import ModelDirectory

    vae = WanVAE(ModelDirectory.open(base).load_vae(torch.float32))
    num_frames = max(len(video.curves["presence"].value) for video in method.videos)
    num_frames = (num_frames - 1) // vae.temporal_stride * vae.temporal_stride + 1
    # Spread over the prompts, which are sorted.
    chosen = np.linspace(0, len(method.videos) - 1, min(num_videos, len(method.videos))).round().astype(int)
    floors = Method("truth"), Method("truth through VAE")
    with tempfile.TemporaryDirectory() as folder:
        for number in tqdm(chosen, desc="noise floors", unit="video"):
            key = method.videos[number].key
            start = np.random.default_rng([key.seed, key.sample, int(number)]).uniform(0, shapes.SIZE, 2)
            truth = shapes.render(shapes.Clip(shapes.parse_caption(key.prompt), *start), num_frames)
            pixels = shapes.to_pixels(truth).transpose(0, 1)[None]
            for floor, frames in zip(floors, (truth, vae.decode(vae.encode(pixels))[0]), strict=True):
                path = Path(folder) / f"{floor.label} {number}.mp4"
                with VideoWriter(path, fps=shapes.FPS) as video:
                    video.write(frames)
                floor.videos.append(judge(look(path, in_shapes_world=True), key, path.name, block_frames))
    return list(floors)


def curves_over_time(method: Method) -> OverTime:
    """Every curve of a method, in seconds: a point for each latent frame, or for several in a long video."""
    longest = max(len(next(iter(video.curves.values())).value) for video in method.videos)
    window = video_measures.STRIDE * -(-longest // (video_measures.STRIDE * MAX_POINTS))
    curves = {name: method.curve(name, window) for name in method.videos[0].curves}
    return {name: (np.arange(len(values)) * window / method.fps, values) for name, values in curves.items()}


# ---- What is written ----


def as_json(
    methods: Sequence[Method], floors: Sequence[Method], figures: Sequence[Figure], curves: Mapping[str, OverTime]
) -> dict:
    """Everything that was measured, for reading by programs."""
    return {
        "figures": {f.name: {"meaning": f.meaning, "unit": f.unit, "scale": f.scale} for f in figures},
        "methods": [
            {
                "label": method.label,
                "folder": method.folder,
                "estimates": {f.name: asdict(method.estimate(f.name)) for f in figures},
                "curves": {
                    name: {"seconds": rounded(seconds), "values": rounded(values)}
                    for name, (seconds, values) in curves[method.label].items()
                },
                "videos": [
                    asdict(video.key) | {"file": video.file, "figures": {k: list(v) for k, v in video.parts.items()}}
                    for video in method.videos
                ],
            }
            for method in [*methods, *floors]
        ],
        "differences": [
            {
                "minuend": minuend.label,
                "subtrahend": subtrahend.label,
                "estimates": {name: asdict(value) for name, value in compare(minuend, subtrahend, figures).items()},
            }
            for subtrahend, minuend in itertools.combinations(methods, 2)
        ],
    }


def rounded(values: np.ndarray) -> list[float | None]:
    """A curve as JSON numbers; null where nothing counted."""
    return [None if np.isnan(value) else round(float(value), 5) for value in values]


def write_csv(path: Path, methods: Sequence[Method], figures: Sequence[Figure]) -> None:
    """A line per video and figure, in the figure's unit; nothing where nothing counted."""
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["method", "file", "prompt", "seed", "sample", "figure", "unit", "value"])
        for method, figure in itertools.product(methods, figures):
            for video in method.videos:
                total, count = video.parts[figure.name]
                value = f"{figure.scale * total / count:.6g}" if count else ""
                key = video.key
                rows.writerow(
                    [method.label, video.file, key.prompt, key.seed, key.sample, figure.name, figure.unit, value]
                )


def commands(found: Sequence[tuple[str, str, Sequence[Found]]]) -> list[tuple[str, str]]:
    """This command, and those that made the videos as far as their records tell."""
    told = [("This page", shlex.join(["python", *sys.argv]))]
    for label, folder, videos in found:
        made = list(dict.fromkeys(record["command"] for _, _, record in videos if record.get("command")))
        if made:
            told.append((f"{label}: the videos of {folder}", "\n".join(made)))
        elif videos[0][2]:
            first = shlex.join([str(videos[0][0].with_suffix(".json"))])
            told.append(
                (f"{label}: each video again", f"python inference.py --config_path {first} --output_folder again")
            )
    return told


def examples(found: Sequence[tuple[str, str, Sequence[Found]]], count: int, max_frames: int | None) -> list[Example]:
    """Some of the prompts that every method has a video of, spread over them."""
    videos = [{key: path for path, key, _ in own} for _, _, own in found]
    common = [key for key in videos[0] if all(key in own for own in videos)]
    chosen = dict.fromkeys(np.linspace(0, len(common) - 1, min(count, len(common))).round().astype(int))
    labels = [label for label, _, _ in found]
    shown = []
    with tempfile.TemporaryDirectory() as folder:
        for number in tqdm(chosen, desc="report", unit="example"):
            key = common[number]
            paths = [own[key] for own in videos]
            strips = []
            for path in paths:
                sampler = ContactSheetSampler(columns=STRIP_FRAMES)
                with VideoReader(path, max_frames) as frames:
                    for frame in frames:
                        sampler.add(frame[None])
                strips.append(strip(sampler.strip("").frames))
            together = Path(folder) / f"{number}.mp4"
            write_side_by_side(together, list(zip(labels, paths, strict=True)), max_frames=max_frames, crf=23)
            shown.append(Example(f"{key.prompt} (seed {key.seed}, sample {key.sample})", strips, together.read_bytes()))
    return shown


if __name__ == "__main__":
    main()
