"""trainer/losses.py against values computed by hand."""

import math

import pytest
import torch

from trainer.losses import flow_matching_loss, kl_to_standard_normal, masked_mse


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


def test_flow_matching_loss_is_about_noise_minus_x0():
    x0, noise = frames(1, 2), frames(4, 8)
    assert flow_matching_loss(frames(3, 6), x0, noise).item() == 0
    assert flow_matching_loss(frames(3, 5), x0, noise).item() == pytest.approx(0.5)
    assert flow_matching_loss(frames(3, 5), x0, noise, torch.tensor([[1.0, 0.0]])).item() == 0


def test_kl_by_hand():
    assert kl_to_standard_normal(torch.zeros(3), torch.zeros(3)).item() == 0
    mean, log_variance = torch.tensor([1.0, 0.0]), torch.tensor([0.0, math.log(4.0)])
    assert kl_to_standard_normal(mean, log_variance).item() == pytest.approx((0.5 + 0.5 * (3 - math.log(4))) / 2)
