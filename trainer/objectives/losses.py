"""Training losses as pure functions of tensors.

Latents x, x0 and noise are [B, F, C, h, w]; sigma is a noise level in [0, 1] and x = (1 - sigma) x0 + sigma noise.
sg is the stop-gradient. Every function returns a float32 tensor.
"""

import torch
from torch import Tensor


def masked_mse(prediction: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the mean squared error over frames, averaged per clip and then over clips.

        mean over b of  sum_f m_bf e_bf / max(1, sum_f m_bf),  e_bf = mean over (c, h, w) of (prediction - target)^2

    Averaging per clip first makes the loss independent of how a batch is split into micro-batches.

    Args:
        prediction, target: [B, F, C, h, w].
        mask: weight m of each frame, [B, F]; None means all ones. A clip of weight 0 contributes 0.
    """
    error = (prediction.float() - target.float()).square()
    if mask is None:
        return error.mean()
    per_frame = error.flatten(2).mean(dim=2)
    return ((per_frame * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)).mean()


def flow_matching_loss(flow: Tensor, x0: Tensor, noise: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the flow-matching loss (Lipman et al., arXiv 2210.02747; Wan2.1, arXiv 2503.20314, section 4.2).

        L = E |flow(x, sigma) - (noise - x0)|^2

    Args:
        flow: the network's prediction at x, [B, F, C, h, w].
        x0, noise: the two ends of the path, [B, F, C, h, w].
        mask: weight of each frame, [B, F]; None means all ones.
    """
    return masked_mse(flow, noise - x0, mask)


def kl_to_standard_normal(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Return KL(N(mean, exp(log_variance)) || N(0, 1)) per element (Kingma & Welling, arXiv 1312.6114, appendix B).

    L = 0.5 mean(mean^2 + exp(log_variance) - 1 - log_variance)
    """
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()


def dmd_gradient(x0: Tensor, critic_x0: Tensor, teacher_x0: Tensor) -> Tensor:
    """Return the DMD gradient: the gradient of the reverse KL at generated clips (arXiv 2311.18828, equations 7 and 8).

        g = (critic_x0 - teacher_x0) / mean|x0 - teacher_x0|,  the mean taken over each clip

    The denominator makes the gradient's size independent of the noise level. A clip that equals the teacher's estimate
    gets gradient 0. NaNs of a network pass through, so that training detects them.

    Args:
        x0: generated clips, [B, F, C, h, w].
        critic_x0, teacher_x0: estimates of x0 from the same noisy version of the clips, [B, F, C, h, w].
    """
    distance = (x0 - teacher_x0).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    return torch.where(distance == 0, 0.0, (critic_x0 - teacher_x0) / distance)


def dmd_loss(x0: Tensor, gradient: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return a surrogate loss whose derivative with respect to x0 is `gradient`, up to a factor (arXiv 2405.14867).

        L = 0.5 mean (x0 - sg(x0 - gradient))^2,  so dL/dx0 = gradient / number of elements that the mask keeps

    The value of L has no meaning; only its derivative does.

    Args:
        x0, gradient: [B, F, C, h, w].
        mask: 1 for each frame that counts, [B, F]; None means all frames.
    """
    return 0.5 * masked_mse(x0, (x0 - gradient).detach(), mask)


def chord_flow(point: Tensor, next_point: Tensor, sigma: float, next_sigma: float) -> Tensor:
    """Return the flow of the straight line through two points of a trajectory, in float32.

        v = (next_point - point) / (next_sigma - sigma)

    In bfloat16 the division by a small step of sigma would add an error of the size of the target.
    """
    return (next_point.float() - point.float()) / (next_sigma - sigma)


def forward_kl_loss(
    flow: Tensor,
    point: Tensor,
    next_point: Tensor,
    sigma: float,
    next_sigma: float,
    form: str = "x0",
    generator_point: Tensor | None = None,
) -> Tensor:
    """Return the forward-KL loss, a regression onto a teacher trajectory (HiAR, arXiv 2603.08703, section 3.3).

    With the chord's flow v = chord_flow(...), the teacher's point x and the generator's point y, the forms compare

        x0        y - sigma flow                     with  x - sigma v  (the chord extended to sigma 0)
        endpoint  y + (next_sigma - sigma) flow      with  next_point
        flow      flow                               with  v

    Args:
        flow: the generator's flow at y, [B, F, C, h, w].
        point, next_point: the teacher's trajectory at sigma and next_sigma, [B, F, C, h, w].
        form: "x0", "endpoint" or "flow".
        generator_point: y, the point of the generator's own rollout at sigma; None means the teacher's point x.
    """
    error = flow.float() - chord_flow(point, next_point, sigma, next_sigma)
    if form == "flow":
        return error.square().mean()
    error = {"x0": -sigma, "endpoint": next_sigma - sigma}[form] * error
    if generator_point is not None:
        error = error + (generator_point.float() - point.float())
    return error.square().mean()


def motion(clip: Tensor) -> Tensor:
    """Return the mean absolute difference between neighbouring frames of latents [B, F, C, h, w]; a metric, no loss."""
    return (clip[:, 1:] - clip[:, :-1]).abs().mean()
