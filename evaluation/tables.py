"""Tables of estimates: rows of text; the first row is the header."""

from collections.abc import Sequence

import numpy as np

from evaluation.methods import Method, common_keys, compare_methods
from evaluation.metrics import Metric
from evaluation.statistics import Estimate


def mean_table(methods: Sequence[Method], metrics: Sequence[Metric]) -> list[list[str]]:
    """Return a row per metric and a column per method: means with 95% intervals."""
    rows = [["", *(f"{m.label} ({len(m.videos)} videos)" for m in methods)]]
    rows += [[m.title, *(format_estimate(method.estimate(m.name), m) for method in methods)] for m in metrics]
    return rows


def difference_table(methods: Sequence[Method], metrics: Sequence[Metric]) -> list[list[str]]:
    """Return the difference of every later method from the first over their common videos.

    A star marks intervals that exclude zero.
    """
    first, rest = methods[0], methods[1:]
    results = [compare_methods(m, first, metrics) for m in rest]
    rows = [[f"minus {first.label}", *(f"{m.label} ({len(common_keys(m, first))} pairs)" for m in rest)]]
    for metric in metrics:
        cells = [format_difference(result[metric.name], metric) if result else "no pairs" for result in results]
        rows.append([metric.title, *cells])
    return rows


def format_estimate(result: Estimate, metric: Metric) -> str:
    """Format an estimate as `mean [low, high]` in the metric's unit."""
    if np.isnan(result.mean):
        return "-"
    # Adding zero turns -0.0 into 0.0.
    mean, low, high = (
        f"{round(metric.scale * x, metric.digits) + 0.0:.{metric.digits}f}"
        for x in (result.mean, result.low, result.high)
    )
    return f"{mean} [{low}, {high}]"


def format_difference(result: Estimate, metric: Metric) -> str:
    """Format an estimate, with a star if its interval excludes zero."""
    return format_estimate(result, metric) + (" *" if result.excludes_zero else "")
