"""trainer/datasets/order.py: the order of the data and the random numbers of each clip."""

import numpy as np
import pytest
import torch

from trainer.datasets.order import ClipRandom, DataOrder, batch_positions, draw_clip_length
from utils.config import Config


def make(batch_size: int = 4, total_batch_size: int = 4, **train) -> Config:
    config = Config()
    config.train.batch_size, config.train.total_batch_size = batch_size, total_batch_size
    for key, value in train.items():
        setattr(config.train, key, value)
    return config


# ---- Order ----


def test_every_epoch_is_another_permutation_that_depends_on_the_key():
    order = DataOrder(7, "clips", 3)
    epochs = [order.at(range(start, start + 7)).tolist() for start in (0, 7, 14)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert order.at([13, 0, 7]).tolist() == [epochs[1][6], epochs[0][0], epochs[1][0]]  # in any sequence
    for key in (("clips", 4), ("pairs", 3)):
        assert DataOrder(7, *key).at(range(7)).tolist() != epochs[0]
    assert DataOrder(7, "clips", 3).at(range(7)).tolist() == epochs[0]


def test_an_order_may_start_in_any_epoch():
    """A resumed run does."""
    whole = DataOrder(7, "clips", 3).at(range(28))
    for start in (7, 14, 21):
        assert torch.equal(DataOrder(7, "clips", 3).at(range(start, start + 7)), whole[start : start + 7])


def test_orders_and_levels_are_those_of_earlier_versions():
    """Otherwise a resumed run would repeat some items and skip others."""
    assert DataOrder(7, "clips", 3).at(range(14)).tolist() == [1, 2, 0, 5, 3, 4, 6, 4, 0, 6, 3, 2, 5, 1]
    levels = ClipRandom(make(), "levels", 5, 0).stratified()[:, 0]
    assert (4 * levels).long().tolist() == [3, 0, 1, 2]


def test_a_permutation_is_computed_once_per_epoch(monkeypatch):
    order = DataOrder(50, "clips", 0)
    drawn = []
    randperm = torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda *args, **keys: drawn.append(args) or randperm(*args, **keys))
    order.at(range(100))
    order.at(range(50, 60))
    assert drawn == [(50,), (50,)]


@pytest.mark.parametrize(("micro_batch", "expected"), [(0, range(24, 28)), (1, range(28, 32)), (2, range(32, 36))])
def test_micro_batches_cover_the_batch_without_gaps(micro_batch, expected):
    assert batch_positions(make(4, 12).train, 2, micro_batch) == expected


def test_every_rank_has_a_micro_batch_of_its_own(monkeypatch):
    monkeypatch.setattr("trainer.datasets.order.world_size", lambda: 3)
    assert batch_positions(make(2, 0).train, 4, 1) == range(26, 28)


# ---- Clip lengths ----


def test_clip_lengths_depend_on_seed_and_iteration_and_keep_the_number_of_pixels():
    config = make(10, 10, clip_frames=[5, 9, 81])
    drawn = [draw_clip_length(config, iteration) for iteration in range(40)]
    assert set(drawn) == {(10, 5), (5, 9), (1, 81)}
    assert drawn == [draw_clip_length(config, iteration) for iteration in range(40)]
    config.runtime.seed = 1
    assert drawn != [draw_clip_length(config, iteration) for iteration in range(40)]


# ---- Random numbers of clips ----


def numbers(config: Config, purpose: str = "noise", iteration: int = 0, micro_batch: int = 0, count: int = 0):
    """Return normal, integer, uniform and stratified numbers, drawn in this order, of a micro-batch."""
    random = ClipRandom(config, purpose, iteration, micro_batch, count)
    return random.normal((3, 2)), random.integers(1000, 3), random.uniform(), random.stratified(2)


def test_every_clip_has_its_own_numbers():
    """Two clips of a batch with one key would be trained with the same noise."""
    drawn = numbers(make(6, 6))
    assert [tuple(x.shape) for x in drawn] == [(6, 3, 2), (6, 3), (6,), (6, 2)]
    for values in drawn:
        assert len({tuple(clip.flatten().tolist()) for clip in values}) == 6


def test_numbers_depend_on_purpose_iteration_and_seed_only():
    config, other = make(), make()
    other.runtime.seed = 1
    first = numbers(config)
    for values, same in zip(first, numbers(config), strict=True):
        assert torch.equal(values, same)
    for changed in (numbers(config, "critic"), numbers(config, iteration=1), numbers(other), numbers(config, "noisf")):
        assert not any(torch.equal(values, new) for values, new in zip(first, changed, strict=True))


@pytest.mark.parametrize("size", [1, 2, 6])
def test_the_micro_batch_size_changes_no_number(size):
    whole = numbers(make(12, 12))
    parts = [numbers(make(size, 12), micro_batch=micro_batch) for micro_batch in range(12 // size)]
    for kind, values in enumerate(whole):
        assert torch.equal(torch.cat([part[kind] for part in parts]), values)


def test_another_count_of_clips_replaces_the_batch_size():
    config = make(4, 8)  # two micro-batches of three clips
    first, second = (numbers(config, micro_batch=micro_batch, count=3) for micro_batch in range(2))
    whole = numbers(make(6, 6))
    for values, a, b in zip(whole, first, second, strict=True):
        assert torch.equal(torch.cat([a, b]), values)


def test_numbers_are_uniform():
    random = ClipRandom(make(2, 2), "noise", 0, 0)
    integers = random.integers(4, 4000)
    assert torch.equal(integers.unique(), torch.arange(4))
    assert (torch.stack([(integers == i).float().mean() for i in range(4)]) - 0.25).abs().max() < 0.03
    normal = random.normal((4000,))
    assert abs(normal.mean()) < 0.05 and abs(normal.std() - 1) < 0.05


@pytest.mark.parametrize("count", [1, 3])
def test_the_intervals_are_drawn_anew_in_every_iteration(count):
    def intervals(purpose: str, iteration: int) -> list[int]:
        values = ClipRandom(make(8, 8), purpose, iteration, 0).stratified(count)
        return (values.flatten() * 8 * count).long().tolist()

    first = intervals("levels", 0)
    assert intervals("levels", 0) == first
    assert intervals("levels", 1) != first != intervals("critic", 0)


@pytest.mark.parametrize("count", [1, 3])
def test_stratified_numbers_have_one_in_every_interval_of_the_whole_batch(count):
    config = make(4, 8)
    found = []
    for micro_batch in range(2):
        found.append(ClipRandom(config, "levels", 5, micro_batch).stratified(count))
    values = torch.cat(found)
    assert values.shape == (8, count)
    assert sorted((values.flatten() * 8 * count).long().tolist()) == list(range(8 * count))
    assert np.ptp((values.flatten() * 8 * count % 1).numpy()) > 0.2  # not all at the same place within the interval
    assert values.flatten().tolist() != sorted(values.flatten().tolist())
