"""pipeline/teacher.py: many-step sampling of the bidirectional teacher.

Claims: Euler is exact where the flow is constant along a path, and converges on a linear ODE; the points of a
trajectory follow from each other; UniPC reaches the same solution; guidance is linear, and scale 1 needs one pass.
"""

import math

import pytest
import torch
from torch import Tensor

from model.flow import solver_sigmas
from pipeline.teacher import guided_flow, sample_euler, sample_unipc

MEAN, STD = 0.5, 0.3  # of toy data


def toy_flow(x: Tensor, sigma: float) -> Tensor:
    """Return the exact flow E[noise - x0 | x] for normal data with MEAN and STD."""
    mean, variance = (1 - sigma) * MEAN, ((1 - sigma) * STD) ** 2 + sigma**2
    return (sigma - (1 - sigma) * STD**2) / variance * (x - mean) - MEAN


def toy_solution(noise: Tensor) -> Tensor:
    """Return the solution of `toy_flow`'s ODE at sigma 0: normal samples keep their quantile."""
    return MEAN + STD * noise


@pytest.fixture
def noise() -> Tensor:
    return torch.randn(2, 3, 4, 4, 6, generator=torch.Generator().manual_seed(0))


def test_euler_is_exact_on_straight_paths(noise):
    x0 = torch.full_like(noise, 2.0)
    end = sample_euler(lambda x, sigma: noise - x0, noise, solver_sigmas(7, 8.0))[-1]
    torch.testing.assert_close(end, x0)


def test_euler_solves_a_linear_ode(noise):
    """dx/dsigma = x from sigma 1 to 0: n steps give (1 - 1/n)^n x, towards x / e."""
    sigmas = [1 - i / 50 for i in range(51)]
    end = sample_euler(lambda x, sigma: x, noise, sigmas)[-1]
    torch.testing.assert_close(end, (1 - 1 / 50) ** 50 * noise)
    torch.testing.assert_close(end, noise / math.e, rtol=0.02, atol=0)


def test_the_points_of_a_trajectory_follow_from_each_other(noise):
    sigmas, steps = solver_sigmas(6, 8.0), []
    points = sample_euler(toy_flow, noise, sigmas, on_step=steps.append)
    assert len(points) == len(sigmas) == 7 and steps == list(range(6))
    assert torch.equal(points[0], noise)
    for i in range(6):
        flow = (points[i + 1] - points[i]) / (sigmas[i + 1] - sigmas[i])
        torch.testing.assert_close(flow, toy_flow(points[i], sigmas[i]), rtol=1e-3, atol=1e-4)


def test_both_samplers_reach_the_solution(noise):
    euler = sample_euler(toy_flow, noise, solver_sigmas(400, 5.0))[-1]
    unipc = sample_unipc(toy_flow, noise, 100, 5.0)
    torch.testing.assert_close(euler, toy_solution(noise), atol=0.03, rtol=0)
    torch.testing.assert_close(unipc, toy_solution(noise), atol=0.01, rtol=0)  # fewer steps, of higher order


def test_unipc_evaluates_the_flow_at_falling_sigmas_from_pure_noise(noise):
    sigmas: list[float] = []
    sample_unipc(lambda x, sigma: sigmas.append(sigma) or toy_flow(x, sigma), noise, 10, 5.0)
    assert len(sigmas) == 10 and sigmas == sorted(sigmas, reverse=True)
    assert sigmas[0] == pytest.approx(1.0, abs=2e-3) and sigmas[-1] > 0


# ---- Guidance ----


@pytest.fixture
def prompts() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 1, 5, 24, generator=torch.Generator().manual_seed(3)).unbind()


def test_guidance_leads_away_from_the_negative_prompt(net, prompts):
    x = torch.randn(1, 2, 4, 4, 4, generator=torch.Generator().manual_seed(4))

    def flow(prompt: Tensor) -> Tensor:
        return net(x.transpose(1, 2), torch.tensor([700.0]), prompt).transpose(1, 2)

    cond, uncond = map(flow, prompts)
    assert not torch.allclose(cond, uncond, atol=1e-2)
    torch.testing.assert_close(guided_flow(net, x, 0.7, *prompts, scale=6.0), uncond + 6 * (cond - uncond))
    assert torch.equal(guided_flow(net, x, 0.7, *prompts, scale=1.0), cond)


@pytest.mark.parametrize(("scale", "forwards"), [(1.0, 1), (6.0, 2)])
def test_number_of_passes_per_step(net, prompts, scale, forwards):
    calls = []
    handle = net.register_forward_hook(lambda *_: calls.append(1))
    try:
        guided_flow(net, torch.zeros(1, 1, 4, 4, 4), 0.5, *prompts, scale=scale)
    finally:
        handle.remove()
    assert len(calls) == forwards


def test_clips_of_a_batch_do_not_influence_each_other(net, prompts):
    x = torch.randn(2, 2, 4, 4, 4, generator=torch.Generator().manual_seed(5))
    wide = [prompt.expand(2, -1, -1) for prompt in prompts]
    both = guided_flow(net, x, 0.7, *wide, scale=3.0)
    for row in range(2):
        one = guided_flow(net, x[row : row + 1], 0.7, *prompts, scale=3.0)
        torch.testing.assert_close(both[row : row + 1], one, atol=1e-4, rtol=1e-4)
