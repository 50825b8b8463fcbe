"""The results of an evaluation: tables, curves, JSON, CSV and the HTML report."""

import csv
import itertools
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from tqdm import tqdm

from evaluation.methods import Method, compare_methods
from evaluation.metrics import Metric
from evaluation.plots import save_line_plot
from evaluation.report import ReportExample, ReportGroup, ReportTable, frame_strip, write_report
from evaluation.side_by_side import write_side_by_side
from evaluation.tables import difference_table, mean_table
from evaluation.video_metrics import STRIDE
from evaluation.videos import VideoFolder
from utils.clips import VideoReader
from utils.contact_sheet import ContactSheetSampler
from utils.files import atomic_path, write_json

MAX_POINTS = 100  # per plotted curve
STRIP_FRAMES = 6  # per example in the report
MEANS = "Means over videos, with 95% intervals."
DIFFERENCES = "Differences on the same prompts, seeds and samples, with 95% intervals. * marks intervals without zero."

# The report opens with the first six of these metrics that the videos have.
HEADLINE = (
    *("presence", "moving", "direction", "color_error", "identity_4x", "color_drift", "tone_distance"),
    *("motion", "flow", "static", "saturation_drift", "palette_drift", "pixel_seam"),
)
NUM_HEADLINES = 6
MAX_DIFFERENCES = 4  # configuration keys in the summary of the report

TimeCurve = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # seconds, means, and limits of the 95% interval


@dataclass
class EvaluationResults:
    """Measured methods, with the metrics and curves to show.

    Attributes:
        methods: one per folder; the first method is the baseline of the differences.
        noise_floors: reference methods, shown after the others.
        metrics: all metrics of these videos.
        table_metrics: the metrics in the tables.
        plotted_curves: names of the curves in the plot.
    """

    methods: list[Method]
    metrics: Sequence[Metric]
    table_metrics: Sequence[Metric]
    plotted_curves: Sequence[str]
    noise_floors: list[Method] = field(default_factory=list)

    @cached_property
    def tables(self) -> list[ReportTable]:
        """The table of means and, for several methods, the table of differences."""
        return self.tables_of(self.table_metrics)

    def tables_of(self, metrics: Sequence[Metric]) -> list[ReportTable]:
        """Return `tables` with these metrics only."""
        tables = [ReportTable(MEANS, mean_table([*self.methods, *self.noise_floors], metrics))]
        if len(self.methods) > 1:
            tables.append(ReportTable(DIFFERENCES, difference_table(self.methods, metrics)))
        return tables

    def headline_metrics(self) -> list[Metric]:
        """Return the most important metrics that the first method has."""
        by_name = {metric.name: metric for metric in self.table_metrics}
        has_values = [n for n in HEADLINE if n in by_name and self.methods[0].estimate(n).num_videos]
        return [by_name[name] for name in has_values[:NUM_HEADLINES]]

    def groups(self) -> list[ReportGroup]:
        """Return all tables by subject."""
        subjects: dict[str, list[Metric]] = {}
        for metric in self.table_metrics:
            subjects.setdefault(metric.subject, []).append(metric)
        return [
            ReportGroup(f"{subject.capitalize()}: {', '.join(m.name for m in metrics)}", self.tables_of(metrics))
            for subject, metrics in subjects.items()
        ]

    @cached_property
    def curves(self) -> dict[str, dict[str, TimeCurve]]:
        """Mean curves over time by method and name."""
        return {method.label: curves_over_time(method) for method in [*self.methods, *self.noise_floors]}

    def write(
        self, output: Path, folders: Sequence[VideoFolder], examples: Sequence[ReportExample], command: str
    ) -> None:
        """Write evaluation.json, videos.csv, curves.png and report.html to a folder.

        Args:
            folders: the evaluated folders.
            examples: videos to show in the report.
            command: the command line of this evaluation.
        """
        lines = [(m.label, self.curves[m.label], "-") for m in self.methods]
        lines += [(m.label, self.curves[m.label], ":") for m in self.noise_floors]
        save_line_plot(output / "curves.png", list(dict.fromkeys(self.plotted_curves)), lines, "seconds")
        write_json(output / "evaluation.json", self.as_json(), indent=1)
        with atomic_path(output / "videos.csv") as path:
            self.write_csv(path)
        labels = [method.label for method in self.methods]
        write_report(
            output / "report.html",
            title="Evaluation of " + ", ".join(labels),
            summary=summarise_differences(folders),
            labels=labels,
            commands=[("This page", command), *reproduction_commands(folders)],
            headline=self.tables_of(self.headline_metrics()),
            groups=self.groups(),
            meanings=[(metric.title, metric.meaning) for metric in self.metrics],
            curves=output / "curves.png",
            examples=examples,
        )

    def as_json(self) -> dict:
        """Return all results as JSON values, the content of evaluation.json."""
        return {
            "figures": {m.name: {"meaning": m.meaning, "unit": m.unit, "scale": m.scale} for m in self.metrics},
            "methods": [self._method_as_json(method) for method in [*self.methods, *self.noise_floors]],
            "differences": [
                {
                    "minuend": minuend.label,
                    "subtrahend": subtrahend.label,
                    "estimates": {
                        name: asdict(value)
                        for name, value in compare_methods(minuend, subtrahend, self.metrics).items()
                    },
                }
                for subtrahend, minuend in itertools.combinations(self.methods, 2)
            ],
        }

    def _method_as_json(self, method: Method) -> dict:
        return {
            "label": method.label,
            "folder": method.folder,
            "estimates": {m.name: asdict(method.estimate(m.name)) for m in self.metrics},
            "curves": {
                name: dict(zip(("seconds", "values", "low", "high"), map(_json_numbers, curve), strict=True))
                for name, curve in self.curves[method.label].items()
            },
            "videos": [
                asdict(video.key) | {"file": video.file, "figures": {k: list(v) for k, v in video.sums.items()}}
                for video in method.videos
            ],
        }

    def write_csv(self, path: Path) -> None:
        """Write one line per video and metric, in the metric's unit; the value is empty if no frame is valid."""
        with path.open("x", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            rows.writerow(["method", "file", "prompt", "seed", "sample", "figure", "unit", "value"])
            for method, metric in itertools.product(self.methods, self.metrics):
                for video in method.videos:
                    total, count = video.sums[metric.name]
                    value = f"{metric.scale * total / count:.6g}" if count else ""
                    key = video.key
                    rows.writerow(
                        [method.label, video.file, key.prompt, key.seed, key.sample, metric.name, metric.unit, value]
                    )


def curves_over_time(method: Method) -> dict[str, TimeCurve]:
    """Average every curve of a method over its videos, with 95% intervals over prompts.

    A point covers one latent frame, or several in videos of more than `MAX_POINTS` latent frames.
    """
    longest = max(len(next(iter(video.curves.values())).value) for video in method.videos)
    window = STRIDE * -(-longest // (STRIDE * MAX_POINTS))
    curves = {name: method.mean_curve(name, window) for name in method.videos[0].curves}
    return {name: (np.arange(len(curve.mean)) * window / method.fps, *curve) for name, curve in curves.items()}


def _json_numbers(values: np.ndarray) -> list[float | None]:
    """Return a curve as JSON numbers, with null for NaN."""
    return [None if np.isnan(value) else round(float(value), 5) for value in values]


def summarise_differences(folders: Sequence[VideoFolder]) -> str:
    """Return a sentence on the configuration keys that differ between the first videos of the folders."""
    if len(folders) == 1:
        return "One method, without a comparison."
    configs = [_flat_config(folder.videos[0].metadata.get("config") or {}) for folder in folders]
    if unknown := [folder.label for folder, config in zip(folders, configs, strict=True) if not config]:
        return f"The videos of {' and '.join(unknown)} have no stored configuration, so differences are not listed."
    keys = [key for key in dict.fromkeys(itertools.chain(*configs)) if len({str(c.get(key)) for c in configs}) > 1]
    if not keys:
        return "The configurations of the methods are equal."
    parts = []
    for key in keys[:MAX_DIFFERENCES]:
        values = (f"{config.get(key)} in {folder.label}" for folder, config in zip(folders, configs, strict=True))
        parts.append(f"{key} is {', '.join(values)}")
    more = f"; {len(keys) - MAX_DIFFERENCES} more keys differ" if len(keys) > MAX_DIFFERENCES else ""
    return f"What differs: {'; '.join(parts)}{more}."


def _flat_config(config: Mapping) -> dict[str, object]:
    """Return `section.key` and value of every key that changes the content of videos."""
    sections = {name: keys for name, keys in config.items() if isinstance(keys, Mapping) and name != "runtime"}
    return {f"{name}.{key}": value for name, keys in sections.items() for key, value in keys.items()}


def reproduction_commands(folders: Sequence[VideoFolder]) -> list[tuple[str, str]]:
    """Return a (title, command) pair for every folder of videos with metadata."""
    commands = []
    for folder in folders:
        stored = list(dict.fromkeys(v.metadata["command"] for v in folder.videos if v.metadata.get("command")))
        first = folder.videos[0]
        if stored:
            commands.append((f"{folder.label}: the videos of {folder.path}", "\n".join(stored)))
        elif first.metadata:
            path = shlex.quote(str(first.path.with_suffix(".json")))
            command = f"python inference.py --config_path {path} --output_folder again"
            commands.append((f"{folder.label}: each video again", command))
    return commands


def report_examples(folders: Sequence[VideoFolder], count: int, max_frames: int | None) -> list[ReportExample]:
    """Select up to `count` videos that all folders have, spread evenly, and prepare them for the report."""
    by_key = [{video.key: video.path for video in folder.videos} for folder in folders]
    common = [key for key in by_key[0] if all(key in paths for paths in by_key)]
    selected = dict.fromkeys(np.linspace(0, len(common) - 1, min(count, len(common))).round().astype(int))
    examples = []
    with tempfile.TemporaryDirectory() as scratch:
        for number in tqdm(selected, desc="report", unit="example"):
            key = common[number]
            videos = [(folder.label, paths[key]) for folder, paths in zip(folders, by_key, strict=True)]
            combined = Path(scratch) / f"{number}.mp4"
            write_side_by_side(combined, videos, max_frames=max_frames, crf=23)
            strips = [_video_strip(path, max_frames) for _, path in videos]
            title = f"{key.prompt} (seed {key.seed}, sample {key.sample})"
            examples.append(ReportExample(title, strips, combined.read_bytes()))
    return examples


def _video_strip(path: Path, max_frames: int | None) -> np.ndarray:
    """Return a few frames of a video side by side, uint8 [H, W, 3]."""
    sampler = ContactSheetSampler(columns=STRIP_FRAMES)
    with VideoReader(path, max_frames) as frames:
        for frame in frames:
            sampler.add(frame[None])
    return frame_strip(sampler.strip("").frames)
