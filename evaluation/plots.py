"""Pictures of curves."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("agg")  # no window, whatever the machine has
import matplotlib.pyplot as plt
import numpy as np

from utils.files import atomic_path

Curve = tuple[np.ndarray, np.ndarray]  # x and y; a NaN leaves a gap


def split_label(word: str) -> tuple[str, str]:
    """`name=folder`, or a folder that is called by its own name."""
    label, separator, folder = word.partition("=")
    return (label, folder) if separator else (Path(word).name or word, word)


def save_lines(
    path: Path, panels: Sequence[str], lines: Sequence[tuple[str, Mapping[str, Curve], str]], x_label: str
) -> None:
    """Write a PNG with a panel per name and a line per method; atomic.

    Args:
        panels: names of the curves, as titles.
        lines: label, curves by name and matplotlib line style of every method.
    """
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(6 * columns, 2.6 * rows), squeeze=False, layout="constrained")
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, name in zip(axes.flat, panels, strict=False):
        for number, (label, curves, style) in enumerate(lines):
            x, y = curves.get(name, ((), ()))  # without one too it has its place in the legend
            axis.plot(x, y, style, color=f"C{number % 10}", label=label, linewidth=1.4)
        axis.set_title(name, fontsize=10)
        axis.set_xlabel(x_label, fontsize=8)
        axis.grid(alpha=0.3)
        axis.margins(x=0)
        low, high = axis.get_ylim()
        low = min(0, low)
        axis.set_ylim(low, high + 0.05 * (high - low))  # a line at the very top would hide in the frame
    axes.flat[0].legend(fontsize=8)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=100, format="png")
    plt.close(figure)


def save_timeline(path: Path, rows: Sequence[tuple[str, Sequence[tuple[str, float, float]]]]) -> None:
    """Write a PNG with a row per rank and a bar per op; atomic.

    Args:
        rows: label, and the ops as (name, start, end) in seconds.
    """
    names = list(dict.fromkeys(name for _, ops in rows for name, _, _ in ops))
    figure, axis = plt.subplots(figsize=(14, 0.7 * len(rows) + 1.5), layout="constrained")
    for number, name in enumerate(names):
        color = "0.85" if "wait" in name else f"C{number % 10}"
        for row, (_, ops) in enumerate(rows):
            bars = [(start, end - start) for op, start, end in ops if op == name]
            axis.broken_barh(bars, (row - 0.4, 0.8), color=color, edgecolor="white", linewidth=0.2)
        axis.plot([], [], color=color, linewidth=6, label=name)
    axis.set_yticks(range(len(rows)), [label for label, _ in rows])
    axis.invert_yaxis()
    axis.set_xlabel("seconds")
    axis.legend(ncols=len(names), fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 1.18), frameon=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=100, format="png")
    plt.close(figure)
