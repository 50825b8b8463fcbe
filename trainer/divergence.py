"""Detects losses and gradients that would ruin a run, before the optimizer applies them."""

import math
import statistics
from collections import deque
from collections.abc import Mapping

from utils.config import TrainConfig

WATCHED_LOSSES = ("loss", "critic", "forward_kl")
"""Metrics that stop a run if they grow suddenly."""
_HISTORY = 100  # latest values of a loss that enter the median
_MIN_HISTORY = 20


class DivergenceCheck:
    """Compare losses with their recent median and gradient norms with `train.stop_grad_norm`."""

    def __init__(self, config: TrainConfig):
        self.config = config
        self._recent: dict[str, deque[float]] = {name: deque(maxlen=_HISTORY) for name in WATCHED_LOSSES}

    def problems(self, metrics: Mapping[str, float], name: str, grad_norm: float) -> list[str]:
        """Return one phrase per value that is not finite or far too large; empty if training can go on.

        Args:
            metrics: losses and other values of this update.
            name: network that the metrics and the gradient belong to.
            grad_norm: norm before clipping.
        """
        losses = {key: metrics[key] for key in WATCHED_LOSSES if key in metrics}
        found = [f"{key} is {value:.4g}" for key, value in metrics.items() if not math.isfinite(value)]
        for key, value in losses.items():
            median = self._median(key)
            if value > self.config.stop_loss_growth * median:
                found.append(f"{key} is {value:.4g}, and its recent median is {median:.4g}")
        if not math.isfinite(grad_norm) or grad_norm > self.config.stop_grad_norm:
            shares = [f"{key} {value:.4g}" for key, value in metrics.items() if key.endswith("_output_gradient")]
            terms = f" ({', '.join(shares)})" if shares else ""
            found.append(f"the gradient norm of the {name} is {grad_norm:.4g}{terms}")
        if not found:
            for key, value in losses.items():
                self._recent[key].append(value)
        return found

    def _median(self, loss: str) -> float:
        """Return the median of a loss's latest values; infinity if they are too few, or all zero."""
        recent = self._recent[loss]
        return statistics.median(recent) or math.inf if len(recent) >= _MIN_HISTORY else math.inf
