"""The forward pass of the Wan VAE's decoder over a piece of a video, with the parameters of diffusers' network.

Wan's decoder is causal in time: each 3D convolution sees the two frames before its own. diffusers decodes one latent
frame at a time, and pads and concatenates every convolution's input. Here all latent frames of a piece go through the
network at once. Norm and SiLU write their result behind the two stored frames, into the buffer that the convolution
reads. All activations are [B, T, H, W, C], so that channels are adjacent in memory, as tensor cores and CPUs need it.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanAttentionBlock,
    WanCausalConv3d,
    WanResample,
    WanResidualBlock,
    WanRMS_norm,
)
from torch import Tensor, nn

_STORED = 2  # frames that a convolution of size 3 in time sees before its own
# PyTorch calls oneDNN's convolution for large inputs and batches only; its own is about five times slower.
_ONEDNN_DTYPES = [torch.float32] if torch.backends.mkldnn.is_available() else []
if _ONEDNN_DTYPES and torch.ops.mkldnn._is_mkldnn_bf16_supported():
    _ONEDNN_DTYPES.append(torch.bfloat16)
_TINY = 1e-24  # added to the mean square: zeros stay zeros


class PastFrames:
    """The last two input frames of every causal convolution, in the order in which the network runs them."""

    def __init__(self, stored: Sequence[Tensor] | None):
        """
        Args:
            stored: `latest` of the piece before, each [B, 2, H, W, C]. None: the video starts here; its past is zero.
        """
        self._stored = None if stored is None else iter(stored)
        self.latest: list[Tensor] = []

    def buffer(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """Return a new buffer [B, 2 + T, H, W, C] that starts with the next convolution's stored frames.

        Args:
            shape: [B, T, H, W, C].
        """
        buffer = like.new_empty(shape[0], _STORED + shape[1], *shape[2:])
        past = buffer[:, :_STORED]
        if self._stored is None:
            past.zero_()
        else:
            past.copy_(next(self._stored))
        return buffer

    def store(self, buffer: Tensor) -> None:
        """Store the last frames of a filled buffer for the next piece."""
        self.latest.append(buffer[:, -_STORED:].clone())  # a view would keep the whole buffer in memory


def decode_piece(
    vae: AutoencoderKLWan, kernels: Sequence[Tensor], latents: Tensor, stored: Sequence[Tensor] | None
) -> tuple[Tensor, list[Tensor]]:
    """Decode the next latent frames of a video.

    Args:
        latents: raw latents [B, F, h, w, C] in the dtype of the network.
        stored: the second result of the piece before; None at the start of a video.

    Returns:
        Pixels [B, T, 3, H, W] in [-1, 1], float32, and the frames to store for the next piece.
    """
    past, decoder, starts = PastFrames(stored), vae.decoder, stored is None
    x = _pointwise(vae.post_quant_conv, latents)
    x = _convolve_raw(decoder.conv_in, x, past)
    middle = decoder.mid_block
    x = _residual(middle.resnets[0], x, past)
    for attention, resnet in zip(middle.attentions, middle.resnets[1:], strict=True):
        x = _residual(resnet, x if attention is None else _attend(attention, x), past)
    for block in decoder.up_blocks:
        start = x
        for resnet in block.resnets:
            x = _residual(resnet, x, past)
        for layer in _upsamplers(block):
            x = _upsample(layer, kernels[0], x, past, starts)
            kernels = kernels[1:]
        if getattr(block, "avg_shortcut", None) is not None:  # Wan2.2
            x = x + _channels_last(block.avg_shortcut(_channels_first(start), first_chunk=starts))
    x = _norm_silu_convolve(decoder.norm_out, decoder.conv_out, x, past)
    return _to_pixels(x, vae.config.patch_size or 1), past.latest


def _upsamplers(block: nn.Module) -> list[WanResample]:
    layers: Any = block.upsamplers if hasattr(block, "upsamplers") else [block.upsampler]
    return [layer for layer in layers or [] if layer is not None]


def _residual(block: WanResidualBlock, x: Tensor, past: PastFrames) -> Tensor:
    shortcut = x if isinstance(block.conv_shortcut, nn.Identity) else _pointwise(block.conv_shortcut, x)
    x = _norm_silu_convolve(block.norm1, block.conv1, x, past)
    return _norm_silu_convolve(block.norm2, block.conv2, x, past).add_(shortcut)


def _attend(block: WanAttentionBlock, x: Tensor) -> Tensor:
    """Apply attention among the positions of each frame."""
    frames = _norm(block.norm, x).flatten(0, 1).flatten(1, 2)  # [B T, H W, C]
    q, k, v = _pointwise(block.to_qkv, frames).unsqueeze(1).chunk(3, dim=-1)
    mixed = F.scaled_dot_product_attention(q, k, v).squeeze(1)
    return _pointwise(block.proj, mixed).view(x.shape).add_(x)


def _upsample(layer: WanResample, kernel: Tensor, x: Tensor, past: PastFrames, starts: bool) -> Tensor:
    """Double height and width, and the number of frames if the layer does so; a video's first frame stays single."""
    if layer.mode == "upsample3d":
        later = x[:, 1:] if starts else x
        doubled = _convolve_raw(layer.time_conv, later, past).unflatten(-1, (2, -1)).movedim(4, 2).flatten(1, 2)
        x = torch.cat([x[:, :1], doubled], dim=1) if starts else doubled
    y = _run(layer.resample[1], x.flatten(0, 1).permute(0, 3, 1, 2), (1, 1), kernel).permute(0, 2, 3, 1).contiguous()
    return _interleave(y.unflatten(-1, (2, 2, -1))).unflatten(0, x.shape[:2])


def _interleave(y: Tensor) -> Tensor:
    """Return x [B, 2 H, 2 W, C] with x[2 i + a, 2 j + b] = y[i + a, j + b, a, b], of y [B, H + 1, W + 1, 2, 2, C]."""
    batch, height, width, channels = len(y), y.shape[1] - 1, y.shape[2] - 1, y.shape[-1]
    x = y.new_empty(batch, height, 2, width, 2, channels)
    for a in range(2):
        for b in range(2):
            x[:, :, a, :, b] = y[:, a : a + height, b : b + width, a, b]
    return x.view(batch, 2 * height, 2 * width, channels)


def upsampling_kernels(vae: AutoencoderKLWan) -> list[Tensor]:
    """Return the weights [4 C', C, 2, 2] of convolutions that upsample as diffusers' layers do, in order.

    diffusers repeats each value in a square of 2x2 and convolves with weights of 3x3. Their taps cover only 2x2
    different values, so summed weights give the same result with four ninths of the products. They differ for the four
    pixels (a, b) of a square; the results are ordered (a, b, C').
    """
    kernels = []
    for layer in (layer for block in vae.decoder.up_blocks for layer in _upsamplers(block)):
        weight = layer.resample[1].weight
        taps = weight.new_zeros(2, 2, 3, dtype=torch.float32)  # a, row of the 2x2 kernel, row of the 3x3 weights
        taps[0, 0, :1] = taps[0, 1, 1:] = taps[1, 0, :2] = taps[1, 1, 2:] = 1
        kernel = torch.einsum("apk, bql, oikl -> aboipq", taps, taps, weight.float()).flatten(0, 2)
        kernels.append(kernel.to(weight.dtype, memory_format=torch.channels_last))
    return kernels


def _norm_silu_convolve(norm: WanRMS_norm, convolution: WanCausalConv3d, x: Tensor, past: PastFrames) -> Tensor:
    buffer = past.buffer(x.shape, x)
    torch.ops.aten.silu.out(_norm(norm, x), out=buffer[:, _STORED:])
    past.store(buffer)
    return _causal(convolution, buffer)


def _convolve_raw(convolution: WanCausalConv3d, x: Tensor, past: PastFrames) -> Tensor:
    buffer = past.buffer(x.shape, x)
    buffer[:, _STORED:].copy_(x)
    past.store(buffer)
    return _causal(convolution, buffer)


def _norm(norm: WanRMS_norm, x: Tensor) -> Tensor:
    gamma = norm.gamma.flatten()
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return F.rms_norm(x, x.shape[-1:], gamma, _TINY)
    y = x.square()  # PyTorch's kernel for CPUs creates more temporary tensors
    length = y.sum(dim=-1, keepdim=True).add_(_TINY).rsqrt_()
    return torch.mul(x, length, out=y).mul_(gamma * norm.scale)


def _pointwise(convolution: nn.Conv2d | nn.Conv3d, x: Tensor) -> Tensor:
    """Apply a convolution of size 1."""
    return F.linear(x, convolution.weight.flatten(1), convolution.bias)


def _causal(convolution: WanCausalConv3d, buffer: Tensor) -> Tensor:
    """Convolve a buffer [B, 2 + T, H, W, C] and return [B, T, H, W, C']."""
    if buffer.shape[1] == _STORED:  # the time convolution of a video's first frame
        return buffer[:, :0].repeat(1, 1, 1, 1, convolution.out_channels // convolution.in_channels)
    width, _, height, *_ = convolution._padding  # diffusers pads by hand
    return _channels_last(_run(convolution, _channels_first(buffer), (0, height, width)))


def _run(
    convolution: nn.Conv2d | nn.Conv3d, x: Tensor, padding: tuple[int, ...], kernel: Tensor | None = None
) -> Tensor:
    weight, bias = convolution.weight, convolution.bias
    assert bias is not None
    if kernel is not None:
        weight, bias = kernel, bias.repeat(4)
    if x.device.type == "cpu" and x.dtype in _ONEDNN_DTYPES and not torch.compiler.is_compiling():
        return torch.mkldnn_convolution(x, weight, bias, padding, convolution.stride, convolution.dilation, 1)
    run = F.conv3d if x.ndim == 5 else F.conv2d
    return run(x, weight, bias, 1, padding)


def _channels_first(x: Tensor) -> Tensor:
    return x.permute(0, 4, 1, 2, 3)


def _channels_last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 4, 1).contiguous()


def _to_pixels(x: Tensor, patch: int) -> Tensor:
    """Return the pixels [B, T, 3, H, W] of x [B, T, H / patch, W / patch, 3 patch patch]."""
    batch, frames, height, width, _ = x.shape
    x = x.clamp_(-1, 1).float().view(batch, frames, height, width, -1, patch, patch)  # the last: height inside a patch
    x = x.permute(0, 1, 2, 6, 3, 5, 4).reshape(batch, frames, height * patch, width * patch, -1)
    return x.permute(0, 1, 4, 2, 3)
