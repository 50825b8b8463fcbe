"""trainer/objectives/losses.py against values computed by hand."""

import math

import pytest
import torch

from trainer.objectives.losses import (
    chord_flow,
    dmd_gradient,
    dmd_loss,
    flow_matching_loss,
    forward_kl_loss,
    kl_to_standard_normal,
    masked_mse,
    motion,
)


def frames(*values: float) -> torch.Tensor:
    """[1, F, C=1, h=1, w=2] with one value per frame."""
    return torch.tensor(values).view(1, -1, 1, 1, 1).expand(1, len(values), 1, 1, 2)


def test_masked_mse_by_hand():
    prediction, target = frames(1, 2, 5), frames(0, 0, 0)
    assert masked_mse(prediction, target).item() == pytest.approx((1 + 4 + 25) / 3)
    assert masked_mse(prediction, target, torch.tensor([[1.0, 1.0, 0.0]])).item() == pytest.approx((1 + 4) / 2)
    assert masked_mse(prediction, target, torch.tensor([[0.0, 0.0, 1.0]])).item() == pytest.approx(25)
    assert masked_mse(prediction, target, torch.zeros(1, 3)).item() == 0


def test_masked_frames_get_no_gradient():
    prediction = torch.randn(2, 3, 4, 2, 2, requires_grad=True)
    mask = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    masked_mse(prediction, torch.zeros(2, 3, 4, 2, 2), mask).backward()
    assert torch.equal(prediction.grad.abs().amax((2, 3, 4)) > 0, mask.bool())


def test_masked_mse_computes_in_float32():
    prediction, target = torch.full((1, 1, 1, 1, 1), 300.0).half(), torch.zeros(1, 1, 1, 1, 1).half()
    assert masked_mse(prediction, target).item() == 90000  # beyond float16
    assert masked_mse(prediction, target).dtype == torch.float32


def test_the_target_of_flow_matching_is_noise_minus_x0():
    x0, noise = frames(1, 2), frames(4, 8)
    assert flow_matching_loss(frames(3, 6), x0, noise).item() == 0
    assert flow_matching_loss(frames(3, 5), x0, noise).item() == pytest.approx(0.5)
    assert flow_matching_loss(frames(3, 5), x0, noise, torch.tensor([[1.0, 0.0]])).item() == 0


def test_kl_by_hand():
    assert kl_to_standard_normal(torch.zeros(3), torch.zeros(3)).item() == 0
    mean, log_variance = torch.tensor([1.0, 0.0]), torch.tensor([0.0, math.log(4.0)])
    assert kl_to_standard_normal(mean, log_variance).item() == pytest.approx((0.5 + 0.5 * (3 - math.log(4))) / 2)


# ---- Score distillation ----


def clips(number: int, *shape: int) -> torch.Tensor:
    return torch.randn(*(shape or (2, 3, 4, 2, 2)), generator=torch.Generator().manual_seed(number))


def test_the_dmd_loss_has_the_dmd_gradient():
    x0, critic, teacher = clips(0).requires_grad_(), clips(1), clips(2)
    gradient = dmd_gradient(x0.detach(), critic, teacher)
    for clip in range(2):
        distance = (x0[clip] - teacher[clip]).abs().mean()
        torch.testing.assert_close(gradient[clip], ((critic - teacher)[clip] / distance).detach())
    mask = torch.tensor([[0.0, 1.0, 1.0], [0.0, 1.0, 0.0]])
    for weights in (None, mask):
        x0.grad = None
        dmd_loss(x0, gradient, weights).backward()
        counted = torch.ones(2, 3) if weights is None else weights
        elements = 2 * counted.sum(1) * 16  # each of the two clips counts as much
        torch.testing.assert_close(x0.grad, gradient * (counted / elements[:, None])[:, :, None, None, None])


def test_descending_the_dmd_gradient_leads_from_the_critics_clip_to_the_teachers():
    x0, teacher = clips(0), clips(1)
    x0.requires_grad_()
    for _ in range(200):  # a critic that has caught up with the generator
        gradient = dmd_gradient(x0.detach(), x0.detach(), teacher)
        [direction] = torch.autograd.grad(dmd_loss(x0, gradient), x0)
        x0 = (x0 - 2.0 * direction).detach().requires_grad_()
    assert (x0 - teacher).abs().mean() < 0.6 * (clips(0) - teacher).abs().mean()


def test_a_clip_equal_to_the_teachers_x0_gets_no_gradient():
    """Neither 0 / 0 nor 1 / 0 may occur: one bad clip must not spoil the batch."""
    teacher = clips(0)
    assert torch.equal(dmd_gradient(teacher, teacher, teacher), torch.zeros_like(teacher))
    assert torch.equal(dmd_gradient(teacher, teacher + 1, teacher), torch.zeros_like(teacher))


@pytest.mark.parametrize("own", [False, True], ids=["the teacher's point", "a point of its own"])
def test_forward_kl_against_a_closed_form(own):
    """On a straight trajectory x0 + sigma (noise - x0) the target of form x0 is x0, at any point of the generator."""
    x0, noise, flow = clips(0), clips(1), clips(2)
    sigma, next_sigma = 0.96, 0.8889
    point, next_point = ((1 - s) * x0 + s * noise for s in (sigma, next_sigma))
    seen = point + 0.3 * clips(3) if own else point
    torch.testing.assert_close(chord_flow(point, next_point, sigma, next_sigma), noise - x0, atol=1e-4, rtol=1e-4)
    forms = {
        "x0": ((seen - sigma * flow) - x0).square().mean(),
        "flow": (flow - (noise - x0)).square().mean(),
        "endpoint": ((seen + (next_sigma - sigma) * flow) - next_point).square().mean(),
    }
    perfect = {"x0": (seen - x0) / sigma, "flow": noise - x0, "endpoint": (seen - next_point) / (sigma - next_sigma)}
    for form, expected in forms.items():
        words = (point, next_point, sigma, next_sigma, form, seen if own else None)
        torch.testing.assert_close(forward_kl_loss(flow, *words), expected, rtol=2e-4, atol=1e-5, msg=form)
        assert forward_kl_loss(perfect[form], *words) < 1e-8
    default = forward_kl_loss(flow, point, next_point, sigma, next_sigma, generator_point=seen if own else None)
    torch.testing.assert_close(default, forms["x0"], rtol=2e-4, atol=1e-5)


def test_forward_kl_is_computed_in_float32():
    """The target is as exact as its bfloat16 points; division in bfloat16 would add an error."""
    x0, noise = clips(0, 2, 3, 4, 8, 8), clips(1, 2, 3, 4, 8, 8)
    point, next_point = (((1 - s) * x0 + s * noise).bfloat16() for s in (1.0, 0.96))
    exact = (next_point.double() - point.double()) / -0.04
    torch.testing.assert_close(chord_flow(point, next_point, 1.0, 0.96).double(), exact, rtol=1e-5, atol=1e-5)


def test_motion_by_hand():
    assert motion(frames(1.0, 2.0, 5.0)).item() == pytest.approx((1 + 3) / 2)
    assert motion(frames(4.0, 4.0, 4.0)).item() == 0
