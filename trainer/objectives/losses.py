"""The losses, as pure functions of tensors."""

import torch
from torch import Tensor


def flow_matching_loss(flow: Tensor, x0: Tensor, noise: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared error of a predicted flow against noise - x0 (Lipman et al., arXiv 2210.02747; Wan2.1, section 4.2).

    Args:
        flow, x0, noise: [B, F, C, h, w].
        mask: [B, F], how much a frame counts; None counts all alike.
    """
    return masked_mse(flow, noise - x0, mask)


def masked_mse(prediction: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over clips of the squared error in float32 of their frames, weighted by `mask` [B, F] if there is one.

    Each clip by itself, so that it counts as much in a large part of a batch as in a small one; 0 where all is masked.
    """
    error = (prediction.float() - target.float()).square()
    if mask is None:
        return error.mean()
    per_frame = error.flatten(2).mean(dim=2)
    return ((per_frame * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)).mean()


def kl_to_standard_normal(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, exp(log_variance)) || N(0, 1)), mean over elements (Kingma & Welling, arXiv 1312.6114, app. B)."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()


def dmd_gradient(x0: Tensor, critic_x0: Tensor, teacher_x0: Tensor) -> Tensor:
    """Gradient of the reverse KL at generated clips (DMD, arXiv 2311.18828, equations 7 and 8), [B, F, C, h, w].

    The difference of what critic and teacher take a clip to be, over each clip's mean distance to the teacher's: its
    size does not depend on the noise level that the two were asked at. It is zero for a clip that the teacher would not
    change at all; what a net gets wrong (NaN) is not covered up.
    """
    distance = (x0 - teacher_x0).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    return torch.where(distance == 0, 0.0, (critic_x0 - teacher_x0) / distance)


def dmd_loss(x0: Tensor, gradient: Tensor, mask: Tensor | None = None) -> Tensor:
    """A loss whose gradient by x0 is `gradient` over the number of elements that count (DMD2's 0.5 mse surrogate).

    Args:
        x0, gradient: [B, F, C, h, w]; only the loss's derivative by x0 means something, its value does not.
        mask: [B, F], frames that count; None counts all.
    """
    return 0.5 * masked_mse(x0, (x0 - gradient).detach(), mask)


def chord_flow(point: Tensor, next_point: Tensor, sigma: float, next_sigma: float) -> Tensor:
    """The flow of the straight line between two points of a trajectory, float32.

    In bfloat16 the division by a small step of sigma would leave an error of its own size.
    """
    return (next_point.float() - point.float()) / (next_sigma - sigma)


def forward_kl_loss(
    flow: Tensor,
    point: Tensor,
    next_point: Tensor,
    sigma: float,
    next_sigma: float,
    form: str = "x0",
    seen: Tensor | None = None,
) -> Tensor:
    """Forward KL as regression onto a teacher trajectory (HiAR, arXiv 2603.08703, section 3.3).

    The teacher's flow from `point` to `next_point` is taken to go on as a straight line; its x0 at sigma 0 is the
    target.

    Args:
        flow: the student's, [B, F, C, h, w].
        point, next_point: the teacher's trajectory at sigma and next_sigma.
        form: compare x0, flow, or endpoint (of the Euler step to next_sigma). At the teacher's own point x0's error is
            the flow's times sigma, and the endpoint's the flow's times the step.
        seen: what the student's flow is at, if that is not `point` but where its own rollout came to; at sigma too.
    """
    error = flow.float() - chord_flow(point, next_point, sigma, next_sigma)
    if form == "flow":
        return error.square().mean()
    error = {"x0": -sigma, "endpoint": next_sigma - sigma}[form] * error
    if seen is not None:
        error = error + (seen.float() - point.float())
    return error.square().mean()


def motion(clip: Tensor) -> Tensor:
    """Mean absolute change from frame to frame of latents [B, F, C, h, w]."""
    return (clip[:, 1:] - clip[:, :-1]).abs().mean()
