"""Operations for which PyTorch's CPU kernels are slow, in a faster form. All are for float32 without autograd."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_ONEDNN_FLOPS = 2e8  # least FLOPs of a product that oneDNN computes faster than MKL, by 10% to 25% on an AMD EPYC
_GELU_SCALE = 2 * math.sqrt(2 / math.pi)


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return the linear layer of x [B, N, K] with weight [M, K] and bias [M]."""
    if 2 * x.numel() * weight.shape[0] > _ONEDNN_FLOPS:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def rms_norm_(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Replace x [..., D] by its RMS norm over D, times weight; PyTorch makes six passes over x."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x.mul_(norm.square_().mul_(1 / x.shape[-1]).add_(eps).rsqrt_()).mul_(weight)


def tanh_gelu(x: Tensor) -> Tensor:
    """Return GELU(x) in the approximation by tanh."""
    # x / 2 (1 + tanh(u)) = x sigmoid(2 u), and the sigmoid is four times as fast as tanh.
    return (x * x).mul_(0.044715 * _GELU_SCALE).add_(_GELU_SCALE).mul_(x).sigmoid_().mul_(x)


def rotate_(x: Tensor, rope: Tensor) -> Tensor:
    """Replace x [B, N, ..., heads, head_dim] by its rotation; see `rotary.rotate`."""
    torch.view_as_complex(x.unflatten(-1, (-1, 2))).mul_(torch.view_as_complex(rope))
    return x
