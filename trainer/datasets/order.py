"""The order in which training reads its data, and the random numbers of each clip."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from utils.config import Config, TrainConfig, num_micro_batches
from utils.distributed import world_size
from utils.rng import keyed_generator


class DataOrder:
    """The order in which a run goes through its data: every epoch a new permutation, a pure function of (seed, epoch).

    Where a run is in its data follows from its iteration, so there is nothing to save.
    """

    def __init__(self, size: int, *key: int | str):
        """
        Args:
            size: items of the data.
            key: what tells this order from others, the seed included.
        """
        self.size = size
        self.key = key
        self._epoch = -1
        self._order = torch.empty(0)

    def at(self, positions: Iterable[int]) -> Tensor:
        """The items at positions 0, 1, 2, ... of the endless order; [B] indices."""
        return torch.tensor([int(self._permutation(p // self.size)[p % self.size]) for p in positions])

    def _permutation(self, epoch: int) -> Tensor:
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = torch.randperm(self.size, generator=keyed_generator("epoch", *self.key, epoch))
        return self._order


def batch_positions(train: TrainConfig, number: int, micro_batch: int) -> range:
    """Where in the endless order of the data a part of the `number`th batch stands."""
    start = (number * num_micro_batches(train, world_size()) + micro_batch) * train.batch_size
    return range(start, start + train.batch_size)


class ClipRandom:
    """The randomness of a part of a batch, clip by clip: how a batch is split into parts changes none of it."""

    def __init__(self, config: Config, purpose: str, iteration: int, micro_batch: int, count: int = 0):
        """
        Args:
            count: clips in the part; default: `train.batch_size`.
        """
        count = count or config.train.batch_size
        self._clips = range(micro_batch * count, (micro_batch + 1) * count)  # of those of the batch
        self._batch = num_micro_batches(config.train, world_size()) * count
        self._key = (purpose, config.runtime.seed, iteration)
        self._generators = [keyed_generator(*self._key, clip) for clip in self._clips]

    def normal(self, shape: Sequence[int]) -> Tensor:
        """Standard normal noise [B, *shape]."""
        return torch.stack([torch.randn(tuple(shape), generator=generator) for generator in self._generators])

    def integers(self, below: int, count: int) -> Tensor:
        """[B, count] integers from 0 to `below`, exclusive."""
        return torch.stack([torch.randint(below, (count,), generator=generator) for generator in self._generators])

    def uniform(self) -> Tensor:
        """Numbers in [0, 1), [B]."""
        return torch.stack([torch.rand((), generator=generator) for generator in self._generators])

    def stratified(self, count: int = 1) -> Tensor:
        """Numbers in [0, 1), [B, count], one from each of as many equal pieces as there are numbers in the whole batch:
        all of the range is covered, whatever the chance. Which piece a number is from is chance again."""
        pieces = torch.randperm(self._batch * count, generator=keyed_generator("pieces", *self._key))
        mine = pieces.view(self._batch, count)[self._clips.start : self._clips.stop]
        inside = torch.stack([torch.rand(count, generator=generator) for generator in self._generators])
        return (mine + inside) / (self._batch * count)
