"""The losses, as pure functions of tensors."""

from torch import Tensor


def flow_matching_loss(flow: Tensor, x0: Tensor, noise: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared error of a predicted flow against noise - x0 (Lipman et al., arXiv 2210.02747; Wan2.1, section 4.2).

    Args:
        flow, x0, noise: [B, F, C, h, w].
        mask: [B, F], how much a frame counts; None counts all alike.
    """
    return masked_mse(flow, noise - x0, mask)


def masked_mse(prediction: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared error in float32 over frames, weighted by `mask` [B, F] if there is one; 0 if it masks all."""
    error = (prediction.float() - target.float()).square()
    if mask is None:
        return error.mean()
    per_frame = error.flatten(2).mean(dim=2)
    return (per_frame * mask).sum() / mask.sum().clamp(min=1)


def kl_to_standard_normal(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, exp(log_variance)) || N(0, 1)), mean over elements (Kingma & Welling, arXiv 1312.6114, app. B)."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
