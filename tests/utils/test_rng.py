"""utils/rng.py: noise is a pure function of (seed, sample, block, step), drawn on the CPU (law 2, docs/method.md).

Earlier draws do not change it, and drawing it does not change torch's global generator. Each part of the key matters.
Golden values ensure that a seed gives the same video in all versions.
"""

import itertools

import numpy as np
import pytest
import torch

from utils.rng import keyed_generator, keyed_noise

SHAPE = (3, 4, 2)


def test_noise_depends_only_on_its_key():
    first = keyed_noise(1, 2, 3, 4, SHAPE)
    torch.manual_seed(99)
    torch.randn(7)
    keyed_noise(5, 6, 7, 8, SHAPE)
    assert torch.equal(keyed_noise(1, 2, 3, 4, SHAPE), first)


def test_the_global_generator_does_not_change():
    torch.manual_seed(0)
    expected = torch.randn(3)
    torch.manual_seed(0)
    keyed_noise(1, 2, 3, 4, SHAPE)
    assert torch.equal(torch.randn(3), expected)


def test_every_part_of_the_key_matters():
    keys = [*itertools.product(range(2), repeat=4), (11, 1, 1, 1), (1, 11, 1, 1)]  # parts are not concatenated
    noises = {tuple(keyed_noise(*key, (4,)).tolist()) for key in keys}
    assert len(noises) == len(keys)


def test_strings_are_part_of_the_key():
    streams = [keyed_generator("noise", 1), keyed_generator("training", 1), keyed_generator("1"), keyed_generator(1)]
    assert len({generator.initial_seed() for generator in streams}) == 4


def test_numpy_integers_equal_integers():
    assert keyed_generator("a", np.int64(3)).initial_seed() == keyed_generator("a", 3).initial_seed()
    with pytest.raises(TypeError):
        keyed_generator("a", 0.5)  # floats that print alike can differ


def test_noise_is_standard_normal_float32_on_the_cpu():
    noise = keyed_noise(0, 0, 0, 0, (100_000,))
    assert noise.dtype == torch.float32 and noise.device.type == "cpu"
    assert noise.mean().item() == pytest.approx(0, abs=0.02) and noise.std().item() == pytest.approx(1, abs=0.02)
    other = keyed_noise(0, 0, 0, 1, (100_000,))
    assert (noise * other).mean().item() == pytest.approx(0, abs=0.02)


def test_block_and_step_are_not_interchangeable():
    assert not torch.equal(keyed_noise(0, 0, 1, 0, SHAPE), keyed_noise(0, 0, 0, 1, SHAPE))


def test_golden_values():
    assert keyed_generator("ode regression", 0, 5).initial_seed() == 9003981330482642307
    few = keyed_noise(1, 2, 3, 4, (4,)).tolist()
    assert few == pytest.approx([2.416963577270508, 1.1262400150299072, 0.14652889966964722, -0.10097860544919968])
    many = keyed_noise(0, 1, 2, 3, (3, 4, 8, 8))  # torch uses another algorithm for 16 and more numbers
    expected = [-0.5723236203193665, -0.5701403021812439, 1.2765454053878784, -0.20350010693073273]
    assert many.flatten()[[0, 1, 400, 767]].tolist() == pytest.approx(expected, rel=1e-5)
