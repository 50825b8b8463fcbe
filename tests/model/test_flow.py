"""model/flow.py: sigmas and the formulas of flow matching.

Claims: `flow_to_x0` inverts `add_noise`; the closed form of shifted sigmas equals the table of 1000 timesteps that Wan
and Self-Forcing use; the sigmas of the published configurations; guidance. Formulas: docs/method.md.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.flow import add_noise, flow_to_x0, guide, shift_sigma, solver_sigmas, step_sigmas


@settings(max_examples=20)
@given(st.floats(0, 1))
def test_the_flow_leads_back_to_x0(sigma):
    x0, noise = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = add_noise(x0, noise, sigma)
    torch.testing.assert_close(flow_to_x0(x, noise - x0, sigma), x0)


def test_sigma_1_is_noise_and_sigma_0_is_x0():
    x0, noise = torch.randn(2, 5)
    assert torch.equal(add_noise(x0, noise, 1.0), noise)
    assert torch.equal(add_noise(x0, noise, 0.0), x0)


def test_sigmas_per_frame_broadcast():
    x0, noise = torch.ones(2, 3, 4), torch.zeros(2, 3, 4)
    sigma = torch.tensor([0.0, 0.5, 1.0]).view(1, 3, 1)
    x = add_noise(x0, noise, sigma)
    assert x[0, :, 0].tolist() == [1.0, 0.5, 0.0]
    torch.testing.assert_close(flow_to_x0(x, noise - x0, sigma), x0)


def test_x0_is_float32_even_if_the_flow_is_not():
    x = torch.full((4,), 1.0)
    flow = torch.full((4,), 1 / 3, dtype=torch.bfloat16)
    x0 = flow_to_x0(x, flow, 0.9)
    assert x0.dtype == torch.float32
    torch.testing.assert_close(x0, 1.0 - 0.9 * flow.float())
    assert flow_to_x0(x.bfloat16(), flow, 0.9).dtype == torch.float32
    assert flow_to_x0(x.double(), flow.double(), 0.9).dtype == torch.float64


# ---- sigmas ----


@pytest.fixture(scope="module")
def table() -> torch.Tensor:
    """The timesteps of Self-Forcing's FlowMatchScheduler: 1000 even sigmas falling from 1, with shift 5."""
    sigmas = torch.linspace(1.0, 0.0, 1001)[:-1]
    return 1000 * 5 * sigmas / (1 + 4 * sigmas)


def test_shifted_steps_equal_the_entries_of_the_public_table(table):
    steps = [1000.0, 750.0, 500.0, 250.0]
    looked_up = torch.cat([table, torch.zeros(1)])[1000 - torch.tensor(steps).long()]  # as in its `warp_denoising_step`
    sigmas = step_sigmas(steps, warp=True, shift=5.0)
    torch.testing.assert_close(torch.tensor(sigmas[:-1]) * 1000, looked_up)


@settings(max_examples=20)
@given(st.integers(1, 1000))
def test_the_closed_form_equals_the_public_table(step):
    sigmas = torch.linspace(1.0, 0.0, 1001, dtype=torch.float64)
    entry = (5 * sigmas / (1 + 4 * sigmas))[1000 - step].item()
    assert shift_sigma(step / 1000, 5.0) == pytest.approx(entry, abs=1e-12)


def test_sigmas_of_self_forcing_and_hiar():
    sigmas = step_sigmas([1000, 750, 500, 250], warp=True, shift=5.0)
    assert sigmas == pytest.approx([1, 0.9375, 0.833333, 0.625, 0], abs=1e-6)


def test_only_a_trailing_zero_is_ignored():
    assert step_sigmas([1000, 1, 0.5, 0], warp=False, shift=5.0) == [1.0, 0.001, 0.0005, 0.0]


def test_sigmas_of_causvid_are_not_shifted():
    assert step_sigmas([1000, 757, 522], warp=False, shift=8.0) == [1.0, 0.757, 0.522, 0.0]
    assert step_sigmas([1000, 757, 522, 0], warp=False, shift=8.0) == [1.0, 0.757, 0.522, 0.0]


def test_sigmas_of_the_teachers_trajectory():
    """48 steps with shift 8, saved at steps 0, 12, 24, 36 and -1 (docs/method.md)."""
    sigmas = solver_sigmas(48, 8.0)
    assert len(sigmas) == 49 and sigmas == sorted(sigmas, reverse=True)
    assert [sigmas[i] for i in (0, 12, 24, 36, -1)] == pytest.approx([1, 0.96, 0.888889, 0.727273, 0], abs=1e-6)


@settings(max_examples=20)
@given(st.floats(0, 1), st.floats(0.1, 20))
def test_shifting_keeps_the_ends_and_the_order(u, shift):
    assert shift_sigma(0.0, shift) == 0 and shift_sigma(1.0, shift) == pytest.approx(1)
    assert shift_sigma(u, 1.0) == pytest.approx(u)
    assert shift_sigma(u, shift) <= shift_sigma(min(1.0, u + 0.1), shift)
    tensor = shift_sigma(torch.tensor([u], dtype=torch.float64), shift)
    assert tensor.item() == pytest.approx(shift_sigma(u, shift))


def test_guidance():
    cond, uncond = torch.tensor([3.0]), torch.tensor([1.0])
    assert [guide(cond, uncond, scale).item() for scale in (0, 1, 6)] == [1, 3, 13]
