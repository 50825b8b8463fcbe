"""The exponential moving average (EMA) of a network's weights."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from trainer.sharding import reshard


class EMA:
    """Average of a network's state dict, kept on each rank's shards: ema = decay ema + (1 - decay) weights."""

    def __init__(self, net: nn.Module, decay: float, start: int = 0):
        """
        Args:
            decay: weight of the old average in an update, from 0 to below 1.
            start: up to this iteration, counted from 0, the EMA equals the weights. With 0 the decay rises as
                (1 + iteration) / (10 + iteration) up to `decay`, because early weights are random.
        """
        self.decay = decay
        self.start = start
        self.weights = {name: value.detach().clone() for name, value in net.state_dict().items()}

    @torch.no_grad()
    def update(self, net: nn.Module, iteration: int) -> None:
        """Move the average towards the weights. Integer buffers are copied."""
        if self.start:
            decay = self.decay if iteration > self.start else 0.0
        else:
            decay = min(self.decay, (1 + iteration) / (10 + iteration))
        for name, value in net.state_dict().items():
            if value.is_floating_point():
                self.weights[name].lerp_(value, 1 - decay)
            else:
                self.weights[name].copy_(value)

    @contextlib.contextmanager
    def applied_to(self, net: nn.Module) -> Iterator[None]:
        """Give the network the average as its weights inside the `with` block."""
        with torch.no_grad():
            trained = {name: value.clone() for name, value in net.state_dict().items()}
            _overwrite(net, self.weights)
            try:
                yield
            finally:
                reshard(net)
                _overwrite(net, trained)


def _overwrite(net: nn.Module, values: dict[str, torch.Tensor]) -> None:
    for name, value in net.state_dict().items():
        value.copy_(values[name])
