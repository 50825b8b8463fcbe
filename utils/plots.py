"""Pictures of figures over time."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("agg")  # no window, whatever the machine has
import matplotlib.pyplot as plt
import numpy as np

from utils.files import atomic_path


def save_curves(
    path: Path,
    panels: Sequence[str],
    lines: Sequence[tuple[str, dict[str, np.ndarray], str]],
    x_step: float,
    x_label: str,
) -> None:
    """One panel per figure with a line per method; atomic.

    Args:
        panels: the figures' names, as titles.
        lines: (label, values per figure, matplotlib line style) of every method; NaN leaves a gap.
        x_step: distance between two values, in `x_label`'s unit.
    """
    columns = 2 if len(panels) > 1 else 1
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(6 * columns, 2.6 * rows), squeeze=False, layout="constrained")
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, name in zip(axes.flat, panels, strict=False):
        for number, (label, values, style) in enumerate(lines):
            y = values[name]
            axis.plot(x_step * np.arange(len(y)), y, style, color=f"C{number % 10}", label=label, linewidth=1.4)
        axis.set_title(name, fontsize=10)
        axis.grid(alpha=0.3)
        axis.margins(x=0)
        axis.set_ylim(bottom=min(0, axis.get_ylim()[0]))
    for axis in axes[-1]:
        axis.set_xlabel(x_label)
    axes.flat[0].legend(fontsize=8)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=100, format="png")
    plt.close(figure)
