"""Measure folders of videos: metrics of pixels and flow, and in a synthetic world of the ground truth."""

import itertools
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from evaluation.measurements import FrameMeasurements, World, cached_measurements
from evaluation.methods import MeasuredVideo, Method
from evaluation.metrics import Metric, video_sums
from evaluation.video_metrics import PIXEL_METRICS, pixel_curves
from evaluation.videos import VideoFile, VideoFolder, VideoKey
from utils.errors import UserError

_POOL_FROM = 16  # videos: a process takes seconds to start


@dataclass(frozen=True)
class EvaluationOptions:
    """How videos are measured.

    Attributes:
        world: the synthetic world of the videos, with their ground truth; None measures pixels and flow only.
        block_frames: latent frames per block.
        max_frames: measure only the first pixel frames; None for all.
        cache_folder: folder that stores the measurements.
    """

    world: World | None
    block_frames: int
    max_frames: int | None
    cache_folder: Path


def all_metrics(world: World | None) -> tuple[Metric, ...]:
    """Return the metrics of a world, followed by those of pixels and flow; only the latter for None."""
    return (*(world.metrics if world else ()), *PIXEL_METRICS)


def select_metrics(metrics: Sequence[Metric], names: Sequence[str] | None) -> list[Metric]:
    """Return the metrics of these names, in this order; all for None.

    Raises:
        UserError: if a name is unknown.
    """
    by_name = {metric.name: metric for metric in metrics}
    for name in names or ():
        if name not in by_name:
            raise UserError(f"these videos have no metric {name!r}; choose from {', '.join(by_name)}")
    return [by_name[name] for name in names or by_name]


def all_captions(world: World, keys: Sequence[VideoKey]) -> bool:
    """Return whether every prompt is a caption of a world; print a note if only some are."""
    captions = [world.is_caption(key.prompt) for key in keys]
    if any(captions) and not all(captions):
        print(f"{captions.count(False)} of {len(keys)} prompts are not captions of this world: measuring pixels only")
    return all(captions)


def measure_folders(folders: Sequence[VideoFolder], options: EvaluationOptions, processes: int = 0) -> list[Method]:
    """Measure every video of every folder, with a progress bar.

    Args:
        processes: number of worker processes; 0 for one per core. Few videos are measured without extra processes.

    Raises:
        UserError: if a video cannot be read, or its frames do not fit the world.
    """
    few = sum(len(folder.videos) for folder in folders) < _POOL_FROM
    workers = 1 if few else processes or os.cpu_count() or 1
    spawn = multiprocessing.get_context("spawn")
    methods = []
    with ProcessPoolExecutor(workers, spawn) if workers > 1 else ThreadPoolExecutor(1) as pool:
        for folder in folders:
            measured = pool.map(measure_video, folder.videos, itertools.repeat(options))
            videos = list(tqdm(measured, desc=folder.label, unit="video", total=len(folder.videos)))
            methods.append(Method(folder.label, videos, folder.path))
    return methods


def measure_video(video: VideoFile, options: EvaluationOptions) -> MeasuredVideo:
    """Measure one video; arguments and errors as in `measure_folders`."""
    try:
        measurements = cached_measurements(video.path, options.world, options.max_frames, options.cache_folder)
    except ValueError as error:
        raise UserError(f"cannot measure {video.path}: {error}") from None
    return compute_metrics(measurements, video.key, video.path.name, options.world, options.block_frames)


def compute_metrics(
    measurements: FrameMeasurements, key: VideoKey, file: str, world: World | None, block_frames: int
) -> MeasuredVideo:
    """Compute a video's metrics from its measurements; `block_frames` are latent frames per block."""
    curves = pixel_curves(measurements.pixels, block_frames)
    if world is not None and measurements.detections is not None:
        curves |= world.curves(measurements.detections, key.prompt, block_frames)
    return MeasuredVideo(key, file, video_sums(all_metrics(world), curves), curves, measurements.fps)
