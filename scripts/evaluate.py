"""Measure videos of the miniature world against what their prompts say, and compare folders of them.

python scripts/evaluate.py outputs/demo
python scripts/evaluate.py block_first=outputs/a timestep_first=outputs/b --output outputs/evaluation

A folder holds X.mp4 with X.json beside it, as inference.py and scripts/sample_teacher.py write them; `name=folder` says
what to call it. Beside every figure stand its noise floors: the same prompts rendered exactly, and those renderings
through the VAE, both through the video encoder as well. Writes evaluation.json (everything, video by video) and
curves.png (over time) to --output, and prints two tables: every folder by itself, and what it differs by from the first
one on the same prompts and seeds, with 95% intervals. How it is measured: docs/miniature.md, utils/shapes_measures.py.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import sys
import tempfile
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from tqdm import tqdm

from utils import shapes
from utils.errors import UserError, command
from utils.evaluation import FIGURES, Key, Measured, Method, common_keys, find_videos, pair_table, sum_up, table
from utils.files import atomic_path, writable_folder
from utils.plots import save_lines, split_label
from utils.shapes_measures import judge
from utils.statistics import difference
from utils.video import VideoWriter, read_video

CURVES = (
    *("presence", "shape", "color", "background", "grading", "direction", "speed_ratio", "motion"),
    *("overlap", "color_error", "background_error"),
)


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", metavar="[name=]folder")
    parser.add_argument("--output", default="outputs/evaluation", help="folder of the results")
    parser.add_argument("--base", default="data/shapes-wan", help="model directory with the VAE, for its noise floor")
    parser.add_argument("--floor_videos", type=int, default=24, help="rendered clips per noise floor; 0: no floors")
    parser.add_argument("--processes", type=int, default=0, help="that measure videos; default: one per core")
    parser.add_argument("--block_frames", type=int, default=3, help="latent frames per block, for the seams")
    args = parser.parse_args()
    if min(args.floor_videos, args.processes) < 0 or args.block_frames < 1:
        raise UserError("--floor_videos and --processes must not be negative, --block_frames must be at least 1")
    labelled = [split_label(word) for word in args.folders]
    if len({label for label, _ in labelled}) < len(labelled):
        raise UserError("two folders have the same name; call them apart: name=folder")
    found = [(label, folder, find_videos(folder)) for label, folder in labelled]
    output = writable_folder(args.output)

    few = sum(len(videos) for _, _, videos in found) < 16  # a process takes seconds to start
    workers = 1 if few else args.processes or os.cpu_count() or 1
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context) if workers > 1 else ThreadPoolExecutor(1) as pool:
        methods = [measure(label, folder, videos, args.block_frames, pool) for label, folder, videos in found]
    floors = noise_floors(methods[0], args.floor_videos, args.base, args.block_frames) if args.floor_videos else []
    print(table([*methods, *floors]))
    if len(methods) > 1:
        print("\n" + pair_table(methods))
    with atomic_path(output / "evaluation.json") as path:
        path.write_text(json.dumps(report(methods, floors), indent=1) + "\n", encoding="utf-8")
    lines = [(m.label, curves_over_time(m), ":" if m in floors else "-") for m in [*methods, *floors]]
    save_lines(output / "curves.png", CURVES, lines, "seconds")
    print(f"\nwrote {output}/evaluation.json and {output}/curves.png")


def measure(label: str, folder: str, videos: list[tuple[Path, Key, dict]], block_frames: int, pool: Executor) -> Method:
    """Measure every video of a folder."""
    paths, keys = [path for path, _, _ in videos], [key for _, key, _ in videos]
    measured = pool.map(measure_video, paths, keys, itertools.repeat(block_frames))
    return Method(label, list(tqdm(measured, desc=label, unit="video", total=len(videos))), folder)


def measure_video(path: Path, key: Key, block_frames: int) -> Measured:
    """The figures of one video.

    Raises:
        UserError: if it cannot be read, or is not of the miniature's world.
    """
    try:
        scene = shapes.parse_caption(key.prompt)
        frames, _ = read_video(path)
        curves = judge(frames, scene, block_frames)
    except ValueError as error:
        raise UserError(f"cannot measure {path}: {error}") from None
    return Measured(key, path.name, sum_up(curves), curves)


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
            scene = shapes.parse_caption(key.prompt)
            truth = shapes.render(shapes.Clip(scene, *start), num_frames)
            pixels = shapes.to_pixels(truth).transpose(0, 1)[None]
            for floor, frames in zip(floors, (truth, vae.decode(vae.encode(pixels))[0]), strict=True):
                path = Path(folder) / "clip.mp4"
                with VideoWriter(path, fps=shapes.FPS) as video:
                    video.write(frames)
                curves = judge(read_video(path)[0], scene, block_frames)
                floor.videos.append(Measured(key, "", sum_up(curves), curves))
    return list(floors)


def curves_over_time(method: Method) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Every curve of a method, in seconds."""
    curves = {name: method.curve(name) for name in CURVES}
    return {name: (np.arange(len(values)) * 4 / shapes.FPS, values) for name, values in curves.items()}


def report(methods: list[Method], floors: list[Method]) -> dict:
    """Everything that was measured, for reading by programs."""
    return {
        "figures": {f.name: {"meaning": f.meaning, "unit": f.unit, "scale": f.scale} for f in FIGURES},
        "methods": [
            {
                "label": method.label,
                "folder": method.folder,
                "estimates": {f.name: asdict(method.estimate(f.name)) for f in FIGURES},
                "curves": {name: rounded(method.curve(name)) for name in CURVES},
                "videos": [
                    asdict(video.key) | {"file": video.file, "figures": {k: list(v) for k, v in video.parts.items()}}
                    for video in method.videos
                ],
            }
            for method in [*methods, *floors]
        ],
        "differences": [
            {
                "minuend": method.label,
                "subtrahend": methods[0].label,
                "estimates": {
                    f.name: asdict(difference(method.parts(f.name, keys), methods[0].parts(f.name, keys)))
                    for f in FIGURES
                },
            }
            for method in methods[1:]
            if (keys := common_keys(method, methods[0]))
        ],
    }


def rounded(values: np.ndarray) -> list[float | None]:
    """A curve as JSON numbers; null where nothing counted."""
    return [None if np.isnan(value) else round(float(value), 5) for value in values]


if __name__ == "__main__":
    main()
