"""Drift in the features of an image model, such as DINOv2: the field's measures for videos without a ground truth.

The model is any of transformers' image models. Features are L2-normalised and come from `RATE` frames per second.
"""

import hashlib
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from evaluation.methods import MeasuredVideo, Method
from evaluation.metrics import NO_VALUES, Metric, MetricCurve, SumCount
from evaluation.videos import VideoFolder
from utils.clips import VideoReader
from utils.errors import UserError
from utils.files import atomic_path

RATE = 2  # frames per second
CLIP_SECONDS = 2  # of the clips that are compared with each other, as in VBench-Long
ENDS = 0.15  # of the frames at either end, as in `start_end_contrast`
_BATCH = 16

FEATURE_METRICS = (
    Metric("clip_similarity", f"feature similarity of successive clips of {CLIP_SECONDS} seconds", digits=2),
    Metric("feature_start_end", "1 minus the feature similarity of the first and the last 15%", digits=2),
)
FEATURE_CURVES = ("similarity_over_distance",)


class FeatureModel:
    """An image model of transformers with its preprocessing."""

    def __init__(self, name: str, device: torch.device):
        """
        Args:
            name: a folder, or the name of a model on the Hugging Face Hub.

        Raises:
            UserError: if there is no such model, or it has no image preprocessing.
        """
        from transformers import AutoImageProcessor, AutoModel  # takes seconds

        try:
            self._prepare: Any = AutoImageProcessor.from_pretrained(name)
            self._net: Any = AutoModel.from_pretrained(name, use_safetensors=True).to(device).eval()
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"--features {name} is not an image model of transformers: {reason}") from None
        self.name = name

    @torch.no_grad()
    def features(self, frames: Sequence[np.ndarray]) -> np.ndarray:
        """Return the normalised features, float32 [N, D], of frames uint8 [H, W, 3]: of the first (class) token."""
        rows = []
        for start in range(0, len(frames), _BATCH):
            inputs = self._prepare(list(frames[start : start + _BATCH]), return_tensors="pt")
            hidden = self._net(inputs["pixel_values"].to(self._net.device)).last_hidden_state[:, 0]
            rows.append(torch.nn.functional.normalize(hidden.float(), dim=1).cpu().numpy())
        return np.concatenate(rows)


def add_features(
    folders: Sequence[VideoFolder], methods: Sequence[Method], model: FeatureModel, cache_folder: Path
) -> None:
    """Add `FEATURE_METRICS` and `FEATURE_CURVES` to measured videos, with a progress bar.

    Args:
        folders: the folders of these methods.
        cache_folder: folder that stores the features.
    """
    for folder, method in zip(folders, methods, strict=True):
        pairs = zip(folder.videos, method.videos, strict=True)
        for file, video in tqdm(pairs, desc=f"{method.label} features", unit="video", total=len(folder.videos)):
            num_frames = len(next(iter(video.curves.values())).value)
            features = _cached_features(file.path, model, -(-num_frames * RATE // round(video.fps)), cache_folder)
            add_feature_metrics(video, features, num_frames)


def add_feature_metrics(video: MeasuredVideo, features: np.ndarray, num_frames: int) -> None:
    """Add the metrics and the curve of a video of `num_frames` pixel frames with features [N, D]."""
    clips = np.array_split(features, np.arange(RATE * CLIP_SECONDS, len(features), RATE * CLIP_SECONDS))
    means = [clip.mean(0) / np.linalg.norm(clip.mean(0)) for clip in clips]
    similarities = [float(one @ other) for one, other in itertools.pairwise(means)]
    video.sums["clip_similarity"] = SumCount(sum(similarities), len(similarities))
    size = max(1, round(ENDS * len(features)))
    start, end = features[:size].mean(0), features[-size:].mean(0)
    distance = 1 - float(start @ end / (np.linalg.norm(start) * np.linalg.norm(end)))
    video.sums["feature_start_end"] = SumCount(distance, 1.0)

    # The value at a pixel frame is the mean similarity of all pairs of frames that are this far apart.
    value, valid = np.zeros(num_frames), np.zeros(num_frames, dtype=bool)
    for lag in range(len(features)):
        frames = slice(*(round(step * video.fps / RATE) for step in (lag, lag + 1)))
        value[frames] = (features[: len(features) - lag] * features[lag:]).sum(1).mean()
        valid[frames] = True
    video.curves["similarity_over_distance"] = MetricCurve(value, valid)


def without_features(methods: Sequence[Method]) -> None:
    """Mark the features of these methods as not measured."""
    for method in methods:
        for video in method.videos:
            video.sums.update({metric.name: NO_VALUES for metric in FEATURE_METRICS})


def _cached_features(path: Path, model: FeatureModel, count: int, cache_folder: Path) -> np.ndarray:
    """Return the features of the first `count` sampled frames, from the cache if it has them."""
    status = path.stat()
    key = repr((path.resolve(), status.st_size, status.st_mtime_ns, model.name, count))
    file = cache_folder / f"features-{hashlib.sha256(key.encode()).hexdigest()[:32]}.npy"
    try:
        return np.load(file)
    except (OSError, ValueError, EOFError):
        pass
    with VideoReader(path, count, fps=RATE) as reader:
        features = model.features(list(reader))
    with atomic_path(file) as temporary, temporary.open("xb") as stream:
        np.save(stream, features)
    return features
