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
            if name in curves:
                axis.plot(*curves[name], style, color=f"C{number % 10}", label=label, linewidth=1.4)
        axis.set_title(name, fontsize=10)
        axis.set_xlabel(x_label, fontsize=8)
        axis.grid(alpha=0.3)
        axis.margins(x=0)
        axis.set_ylim(bottom=min(0, axis.get_ylim()[0]))
    axes.flat[0].legend(fontsize=8)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=100, format="png")
    plt.close(figure)
