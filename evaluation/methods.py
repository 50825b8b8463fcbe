"""Comparing folders of videos: what a folder holds, how its figures are summed up, and the tables.

A method is a folder of videos, each with its record (`X.json`) beside it, or named by a line of a prompt file. Videos
of two methods are paired by prompt, seed and sample.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from evaluation.figures import Curve, Figure, Sum
from evaluation.statistics import Estimate, Part, difference, estimate
from utils.errors import UserError
from utils.prompts import Prompt, file_stem

Found = tuple[Path, "Key", dict]  # a video, what it was asked to be, and its record


@dataclass(frozen=True)
class Key:
    """What a video was asked to be."""

    prompt: str
    seed: int
    sample: int


@dataclass(frozen=True)
class Measured:
    """A video's figures over time and as a whole."""

    key: Key
    file: str
    parts: dict[str, Sum]  # by figure
    curves: dict[str, Curve]
    fps: float = 16.0


@dataclass
class Method:
    """One column of the table."""

    label: str
    videos: list[Measured] = field(default_factory=list)
    folder: str = ""

    def parts(self, figure: str, keys: Sequence[Key] | None = None) -> list[Part]:
        """What each video contributes to a figure: all of them, or those of `keys`, in their order."""
        by_key = {video.key: video for video in self.videos}
        videos = self.videos if keys is None else [by_key[key] for key in keys]
        return [Part(video.key.prompt, *video.parts[figure]) for video in videos]

    def estimate(self, figure: str) -> Estimate:
        """A figure over all videos."""
        return estimate(self.parts(figure))

    @property
    def fps(self) -> float:
        """Pixel frames per second, of the first video for all."""
        return self.videos[0].fps

    def curve(self, name: str, window: int) -> np.ndarray:
        """A curve over time: mean over videos of each `window` pixel frames, NaN where nothing counts."""
        length = max(len(video.curves[name].value) for video in self.videos) // window
        totals, counts = np.zeros((2, length))
        for video in self.videos:
            curve = video.curves[name]
            windows = min(length, len(curve.value) // window)
            shape = (windows, window)
            cut = windows * window
            totals[:windows] += np.where(curve.counts, curve.value, 0)[:cut].reshape(shape).sum(1)
            counts[:windows] += curve.counts[:cut].reshape(shape).sum(1)
        return np.divide(totals, counts, out=np.full(length, np.nan), where=counts > 0)


# ---- Folders ----


def require_distinct(labelled: Sequence[tuple[str, str]]) -> None:
    """Raise `UserError` if two of (label, folder) have the same label."""
    if len({label for label, _ in labelled}) < len(labelled):
        raise UserError("two folders have the same name; call them apart: name=folder")


def find_videos(folder: str, prompts: Sequence[Prompt] = ()) -> list[Found]:
    """The videos of a folder with their keys and records, sorted by key.

    Args:
        prompts: of the file that videos without a record were made from; their records are empty.

    Raises:
        UserError: if there are none, one has neither record nor prompt, or two are of the same prompt, seed and sample.
    """
    if not Path(folder).is_dir():
        raise UserError(f"no folder {folder}")
    found: dict[Key, Found] = {}
    for video in sorted(
        path
        for path in Path(folder).glob("*.mp4")
        if not path.name.startswith(".") and not path.name.endswith(".unfinished.mp4")
    ):
        key, record = _read_record(video) or (_key_by_name(video, prompts), {})
        if key in found:
            raise UserError(f"{found[key][0]} and {video} are of the same prompt, seed and sample; remove one")
        found[key] = video, key, record
    if not found:
        raise UserError(f"no videos in {folder}; make some with inference.py")
    return [found[key] for key in sorted(found, key=lambda k: (k.prompt, k.seed, k.sample))]


def _read_record(video: Path) -> tuple[Key, dict] | None:
    """What the JSON beside a video says; None if it says nothing."""
    try:
        record = json.loads(video.with_suffix(".json").read_text(encoding="utf-8"))
        return Key(record["prompt"], int(record["config"]["runtime"]["seed"]), int(record["sample"])), record
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _key_by_name(video: Path, prompts: Sequence[Prompt]) -> Key:
    """The line of a prompt file that a video is named by.

    Its text or its number, from 0, then -SAMPLE, then perhaps _MODEL: as here, in Self-Forcing and in VBench.
    """
    if not prompts:
        raise UserError(
            f"{video} has no record {video.stem}.json that states its prompt, seed and sample, as inference.py and "
            "scripts/sample_teacher.py write one; for other videos say --data_path PROMPTS"
        )
    named = re.fullmatch(r"(.+)-(\d+)(_[a-zA-Z]\w*)?", video.stem)
    name, sample = (named[1], int(named[2])) if named else (video.stem, 0)
    for prompt in prompts:
        by_text, by_number = (file_stem(prompt, sample, number) for number in (False, True))
        if f"{name}-{sample}" in (by_text, by_number) or name == prompt.name[:100].rstrip():
            return Key(prompt.text, 0, sample)
    raise UserError(f"{video} is named by none of the {len(prompts)} prompts; name it by its text or its line's number")


def common_keys(one: Method, other: Method) -> list[Key]:
    """The keys that both methods have a video of."""
    keys = {video.key for video in other.videos}
    return [video.key for video in one.videos if video.key in keys]


def compare(minuend: Method, subtrahend: Method, figures: Sequence[Figure]) -> dict[str, Estimate]:
    """How much one method's figures exceed another's, over the videos that both have; nothing if there are none."""
    keys = common_keys(minuend, subtrahend)
    if not keys:
        return {}
    return {f.name: difference(minuend.parts(f.name, keys), subtrahend.parts(f.name, keys)) for f in figures}


# ---- Tables ----


def table(methods: Sequence[Method], figures: Sequence[Figure]) -> list[list[str]]:
    """A row per figure, a column per method, each a mean with its 95% interval; the first row is the head."""
    rows = [["", *(f"{m.label} ({len(m.videos)} videos)" for m in methods)]]
    for figure in figures:
        cells = [show(method.estimate(figure.name), figure) for method in methods]
        rows.append([f"{figure.name} [{figure.unit}]", *cells])
    return rows


def pair_table(methods: Sequence[Method], figures: Sequence[Figure]) -> list[list[str]]:
    """Every later method minus the first, over the videos that both have; * marks what excludes zero."""
    first, rest = methods[0], methods[1:]
    pairs = [f"{m.label} ({len(common_keys(m, first))} pairs)" for m in rest]
    results = [compare(m, first, figures) for m in rest]
    rows = [[f"minus {first.label}", *pairs]]
    for figure in figures:
        cells = [show_difference(result[figure.name], figure) if result else "no pairs" for result in results]
        rows.append([f"{figure.name} [{figure.unit}]", *cells])
    return rows


def show(result: Estimate, figure: Figure) -> str:
    """An estimate as text, in the figure's unit."""
    if np.isnan(result.mean):
        return "-"
    # Adding zero turns -0.0 into 0.0.
    mean, low, high = (
        f"{round(figure.scale * x, figure.digits) + 0.0:.{figure.digits}f}"
        for x in (result.mean, result.low, result.high)
    )
    return f"{mean} [{low}, {high}]"


def show_difference(result: Estimate, figure: Figure) -> str:
    """`show`, with a star where zero is out of the interval."""
    return show(result, figure) + (" *" if result.excludes_zero else "")
