"""Figures of a video: what is measured frame by frame, and how that becomes one number."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Sum = tuple[float, float]  # of values, and how many they are


@dataclass(frozen=True)
class Curve:
    """Something over time: a value per frame, and whether the frame counts."""

    value: np.ndarray  # [T] float
    counts: np.ndarray  # [T] bool

    def over(self, start: float, end: float) -> Sum:
        """Sum of the values and number of the frames that count between two fractions of the video."""
        part = slice(round(start * len(self.value)), round(end * len(self.value)))
        counts = self.counts[part]
        return float(self.value[part][counts].sum()), float(counts.sum())


def over_frames(curves: Sequence[Curve]) -> Sum:
    """Every frame that counts weighs the same, in whichever video it is."""
    [curve] = curves
    return curve.over(0, 1)


def change(curves: Sequence[Curve]) -> Sum:
    """Mean of the last quarter minus mean of the first, if something counts in both."""
    [curve] = curves
    (early, early_count), (late, late_count) = curve.over(0, 0.25), curve.over(0.75, 1)
    return (late / late_count - early / early_count, 1.0) if early_count and late_count else (0.0, 0.0)


def distance(curves: Sequence[Curve]) -> Sum:
    """Mean over the curves of how far each changes, whichever way."""
    changes = [change([curve]) for curve in curves]
    known = all(count for _, count in changes)
    return (float(np.mean([abs(value) for value, _ in changes])), 1.0) if known else (0.0, 0.0)


@dataclass(frozen=True)
class Figure:
    """One row of the tables.

    Attributes:
        of: names of the curves that it is taken from; default: the one of its own name.
        take: how one video's curves become a sum and a count; videos are then pooled.
    """

    name: str
    meaning: str
    unit: str = "%"
    scale: float = 100.0
    digits: int = 1
    of: tuple[str, ...] = ()
    take: Callable[[Sequence[Curve]], Sum] = over_frames

    @property
    def curves(self) -> tuple[str, ...]:
        """Names of the curves that it is taken from."""
        return self.of or (self.name,)


def take_figures(figures: Sequence[Figure], curves: Mapping[str, Curve]) -> dict[str, Sum]:
    """What a video contributes to every figure."""
    return {figure.name: figure.take([curves[name] for name in figure.curves]) for figure in figures}
