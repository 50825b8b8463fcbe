"""Plots: curves over time, and timelines of processes."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("agg")  # draws without a display
import matplotlib.pyplot as plt
import numpy as np

from utils.files import atomic_path

XYCurve = tuple[np.ndarray, ...]  # x and y, and optionally the lower and upper limit of a band; a NaN leaves a gap
_NUM_COLORS = 10  # colours in matplotlib's cycle


def save_line_plot(
    path: Path, panels: Sequence[str], lines: Sequence[tuple[str, Mapping[str, XYCurve], str]], x_label: str
) -> None:
    """Write a PNG with one panel per curve name and one line per method, atomically.

    Args:
        panels: names of the curves, used as titles.
        lines: (label, curves by name, matplotlib line style) of every method.
    """
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(6 * columns, 2.6 * rows), squeeze=False, layout="constrained")
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, name in zip(axes.flat, panels, strict=False):
        for number, (label, curves, style) in enumerate(lines):
            color = f"C{number % _NUM_COLORS}"
            x, y, *band = curves.get(name, ((), ()))  # a method without this curve still appears in the legend
            axis.plot(x, y, style, color=color, label=label, linewidth=1.4)
            if band:
                axis.fill_between(x, *band, color=color, alpha=0.15, linewidth=0)
        axis.set_title(name, fontsize=10)
        axis.set_xlabel(x_label, fontsize=8)
        axis.grid(alpha=0.3)
        axis.margins(x=0)
        low, high = axis.get_ylim()
        low = min(0, low)
        axis.set_ylim(low, high + 0.05 * (high - low))  # leaves space above the highest line
    axes.flat[0].legend(fontsize=8)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=100, format="png")
    plt.close(figure)


def save_timeline_plot(path: Path, rows: Sequence[tuple[str, Sequence[tuple[str, float, float]]]]) -> None:
    """Write a PNG with one row per rank and one bar per span, atomically.

    Args:
        rows: label and spans of every rank; a span is (name, start, end) in seconds.
    """
    names = list(dict.fromkeys(name for _, spans in rows for name, _, _ in spans))
    figure, axis = plt.subplots(figsize=(14, 0.7 * len(rows) + 1.5), layout="constrained")
    for number, name in enumerate(names):
        color = "0.85" if "wait" in name else f"C{number % _NUM_COLORS}"
        for row, (_, spans) in enumerate(rows):
            bars = [(start, end - start) for span, start, end in spans if span == name]
            axis.broken_barh(bars, (row - 0.4, 0.8), color=color, edgecolor="white", linewidth=0.2)
        axis.plot([], [], color=color, linewidth=6, label=name)
    axis.set_yticks(range(len(rows)), [label for label, _ in rows])
    axis.invert_yaxis()
    axis.set_xlabel("seconds")
    axis.legend(ncols=len(names), fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 1.18), frameon=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=100, format="png")
    plt.close(figure)
