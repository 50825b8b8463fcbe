"""The order of the training data, and the random numbers of each clip: functions of the seed only."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from utils.config import Config, TrainConfig
from utils.config_checks import num_micro_batches
from utils.distributed import world_size
from utils.rng import keyed_generator


class DataOrder:
    """An endless order of a data set: every epoch is a new permutation, a function of (key, epoch).

    A run's position in it follows from its iteration, so a checkpoint stores no data state.
    """

    def __init__(self, size: int, *key: int | str):
        """
        Args:
            size: number of items.
            key: seed and names that distinguish this order from others.
        """
        self.size = size
        self.key = key
        self._epoch = -1
        self._order = torch.empty(0)

    def at(self, positions: Iterable[int]) -> Tensor:
        """Return the items at these positions of the endless order, as indices [B]."""
        return torch.tensor([int(self._permutation(p // self.size)[p % self.size]) for p in positions])

    def _permutation(self, epoch: int) -> Tensor:
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = torch.randperm(self.size, generator=keyed_generator("epoch", *self.key, epoch))
        return self._order


def batch_positions(train: TrainConfig, batch: int, micro_batch: int) -> range:
    """Return the positions in a `DataOrder` that one micro-batch of batch number `batch` covers."""
    start = (batch * num_micro_batches(train, world_size()) + micro_batch) * train.batch_size
    return range(start, start + train.batch_size)


def draw_clip_length(config: Config, iteration: int) -> tuple[int, int]:
    """Draw the clip length of an iteration from `train.clip_frames`.

    All micro-batches share the length, so ranks take equally long. Longer clips come in smaller micro-batches, so the
    number of pixels stays about the same.

    Returns:
        The number of clips in a micro-batch, and the number of pixel frames in a clip.
    """
    train = config.train
    rng = np.random.default_rng([config.runtime.seed, iteration])
    num_frames = int(rng.choice(train.clip_frames))
    return max(1, train.batch_size * min(train.clip_frames) // num_frames), num_frames


class ClipRandom:
    """The random numbers of one micro-batch, keyed by clip, so the micro-batch size changes none of them."""

    def __init__(self, config: Config, purpose: str, iteration: int, micro_batch: int, count: int = 0):
        """
        Args:
            purpose: name that distinguishes these numbers from others of the same iteration.
            count: clips in the micro-batch; 0 means `train.batch_size`.
        """
        count = count or config.train.batch_size
        self._clips = range(micro_batch * count, (micro_batch + 1) * count)  # indices in the batch
        self._batch_size = num_micro_batches(config.train, world_size()) * count
        self._key = (purpose, config.runtime.seed, iteration)
        self._generators = [keyed_generator(*self._key, clip) for clip in self._clips]

    def normal(self, shape: Sequence[int]) -> Tensor:
        """Return standard normal noise [B, *shape]."""
        return torch.stack([torch.randn(tuple(shape), generator=generator) for generator in self._generators])

    def integers(self, below: int, count: int) -> Tensor:
        """Return uniform integers from 0 to `below` - 1, [B, count]."""
        return torch.stack([torch.randint(below, (count,), generator=generator) for generator in self._generators])

    def uniform(self) -> Tensor:
        """Return uniform numbers in [0, 1), [B]."""
        return torch.stack([torch.rand((), generator=generator) for generator in self._generators])

    def stratified(self, count: int = 1) -> Tensor:
        """Return numbers in [0, 1), [B, count], that cover the range evenly over the whole batch.

        [0, 1) is divided into as many equal intervals as the batch has numbers. A random permutation assigns one
        interval to each number, which is uniform within it.
        """
        intervals = torch.randperm(self._batch_size * count, generator=keyed_generator("pieces", *self._key))
        own = intervals.view(self._batch_size, count)[self._clips.start : self._clips.stop]
        inside = torch.stack([torch.rand(count, generator=generator) for generator in self._generators])
        return (own + inside) / (self._batch_size * count)
