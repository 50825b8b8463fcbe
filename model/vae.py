"""The Wan VAE, diffusers' `AutoencoderKLWan`: for inference on whole videos and streams, and for training on clips.

`WanVAE` encodes to and decodes from latents that are normalised per channel by the VAE's published mean and standard
deviation; the rest of this repository uses only these. Latents are [B, F, C, h, w], pixels [B, T, 3, H, W] in [-1, 1].
F latent frames decode to T = 4 (F - 1) + 1 pixel frames. `encode_clip` and `decode_clip` use raw latents.
"""

from functools import cache, partial
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResample, WanRMS_norm, patchify, unpatchify
from einops import rearrange
from torch import Tensor, nn

from model.compilation import Compiler
from model.decoder import Decoder, StreamingDecoder
from model.vae_stream import decode_piece, upsampling_kernels
from utils.errors import UserError


class WanVAE(Decoder):
    """A loaded `AutoencoderKLWan` for inference, with Wan's normalisation of latents.

    Attributes:
        decoder: another decoder of the same latents, which `stream` and `decode` then use instead of Wan's.
    """

    def __init__(self, vae: AutoencoderKLWan, decoder: Decoder | None = None, max_frames: int = 0):
        self.net = vae.eval().requires_grad_(False)
        use_fast_cpu_kernels_(self.net)
        use_channels_last_(self.net.decoder)
        self._decode_piece = decode_piece
        self.decoder = decoder
        self.max_frames = max_frames

    @property
    def channels(self) -> int:
        """Latent channels C."""
        return self.net.config.z_dim

    @property
    def spatial_stride(self) -> int:
        """Pixels per latent in height and width."""
        return self.net.config.scale_factor_spatial

    @property
    def temporal_stride(self) -> int:
        """Pixel frames per latent frame after the first."""
        return self.net.config.scale_factor_temporal

    def to(self, device: torch.device | str) -> "WanVAE":
        """Move the weights, for example off the device after use."""
        self.net.to(device)
        if self.decoder is not None:
            self.decoder.to(device)
        return self

    def compile_decoder(self, fall_back: bool = True) -> None:
        """Compile the decoder. The first piece of a video and the later ones are one graph each, per number of frames.

        Args:
            fall_back: true: if compilation fails, print a note once and run uncompiled. false: raise the error.
        """
        self._decode_piece = Compiler(fall_back)(decode_piece)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Return the latents [B, F, C, h, w], float32, of pixels [B, T, 3, H, W] in [-1, 1]: the posterior's mean.

        Raises:
            UserError: if T is not 4n+1, or the size is not a multiple of the stride.
        """
        num_frames, height, width = pixels.shape[1], *pixels.shape[-2:]
        if (num_frames - 1) % self.temporal_stride or height % self.spatial_stride or width % self.spatial_stride:
            raise UserError(
                f"the VAE cannot encode {num_frames} frames of {height}x{width}: frames must be "
                f"{self.temporal_stride}n+1, height and width multiples of {self.spatial_stride}"
            )
        mean = self.net.encode(self._cast(pixels).transpose(1, 2)).latent_dist.mode()
        return normalise(self.net, mean.float()).transpose(1, 2)

    def stream(self, keep: int = 0) -> StreamingDecoder:
        """Return a decoder for one video's latents, piece by piece and in order; see `StreamingDecoder`."""
        return StreamingDecoder(self.decoder or self, keep)

    def decode_piece(self, latents: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Decode the next latent frames of a video with Wan's decoder; see `Decoder.decode_piece`."""
        z = self._cast(denormalise(self.net, latents.float().transpose(1, 2))).permute(0, 2, 3, 4, 1).contiguous()
        kernels, stored = (upsampling_kernels(self.net), None) if state is None else state
        pixels, stored = self._decode_piece(self.net, kernels, z, stored)
        return pixels, (kernels, stored)

    def stream_encoder(self) -> "StreamingEncoder":
        """Return an encoder for one video's pixels, piece by piece and in order."""
        return StreamingEncoder(self)

    def _cast(self, x: Tensor) -> Tensor:
        weight = self.net.post_quant_conv.weight  # diffusers' `device` and `dtype` visit all modules: 1 ms each
        return x.to(weight.device, weight.dtype)


class StreamingEncoder:
    """Encodes one video piece by piece in constant memory, with the same result as `WanVAE.encode` of the whole.

    Wan's encoder is causal and keeps the last frames of every convolution's input.
    """

    def __init__(self, vae: WanVAE):
        self._vae = vae
        self._features: list[Tensor | None] | None = None

    @torch.no_grad()
    def push(self, pixels: Tensor) -> Tensor:
        """Encode the next pixels [B, T, 3, H, W] in [-1, 1] and return their latents [B, F, C, h, w], float32.

        The first piece of a video has 4n+1 pixel frames, each later one a multiple of 4.
        """
        vae, stride = self._vae.net, self._vae.temporal_stride
        chunks = [stride] * (pixels.shape[1] // stride)
        if self._features is None:
            vae.clear_cache()
            self._features = [None] * len(vae._enc_feat_map)
            chunks = [1, *chunks]
        assert sum(chunks) == pixels.shape[1], f"{pixels.shape[1]} pixel frames do not fill whole latent frames"
        x = self._vae._cast(pixels).transpose(1, 2)
        x = patchify(x, vae.config.patch_size) if vae.config.patch_size is not None else x
        pieces = [vae.encoder(chunk, feat_cache=self._features, feat_idx=[0]) for chunk in x.split(chunks, dim=2)]
        mean, _ = vae.quant_conv(torch.cat(pieces, dim=2)).chunk(2, dim=1)
        return normalise(vae, mean.float()).transpose(1, 2)


def normalise(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Normalise raw latents [B, C, F, h, w] per channel by the published mean and standard deviation."""
    mean, std = _statistics(vae, latents)
    return (latents - mean) / std


def denormalise(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Return raw latents from normalised latents [B, C, F, h, w]; the inverse of `normalise`."""
    mean, std = _statistics(vae, latents)
    return latents * std + mean


def _statistics(vae: AutoencoderKLWan, like: Tensor) -> tuple[Tensor, Tensor]:
    mean, std = tuple(vae.config.latents_mean), tuple(vae.config.latents_std)
    return _per_channel(mean, like.dtype, like.device), _per_channel(std, like.dtype, like.device)


@cache  # a copy to the GPU for every block would make the host wait for all queued work
def _per_channel(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device).view(1, -1, 1, 1, 1)


def _from_patches(vae: AutoencoderKLWan, x: Tensor) -> Tensor:
    return unpatchify(x, vae.config.patch_size) if vae.config.patch_size is not None else x


# ---- one differentiable pass over a whole clip, for training ----
# diffusers runs the networks chunk by chunk through a feature cache; without the cache it skips temporal resampling.
# Over a whole clip, temporal resampling is one causal convolution that leaves the first frame unchanged. Tests compare
# both versions.


def encode_clip(vae: AutoencoderKLWan, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the posterior's mean and log-variance, [B, C, F, h, w] each, of pixels [B, 3, T, H, W] with T = 4n+1."""
    x = patchify(pixels, vae.config.patch_size) if vae.config.patch_size is not None else pixels
    encoder = vae.encoder
    x = encoder.conv_in(x)
    for layer in encoder.down_blocks:
        x = _resample_clip(layer, x) if isinstance(layer, WanResample) else layer(x)
    x = encoder.conv_out(encoder.nonlinearity(encoder.norm_out(encoder.mid_block(x))))
    mean, log_variance = vae.quant_conv(x).chunk(2, dim=1)
    return mean, log_variance.clamp(-30, 20)


def decode_clip(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Return the pixels [B, 3, T, H, W], not clamped, of raw latents [B, C, F, h, w]."""
    decoder = vae.decoder
    x = decoder.mid_block(decoder.conv_in(vae.post_quant_conv(latents)))
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            x = resnet(x)
        if block.upsamplers is not None:
            x = _resample_clip(block.upsamplers[0], x)
    x = decoder.conv_out(decoder.nonlinearity(decoder.norm_out(x)))
    return _from_patches(vae, x)


def _resample_clip(layer: WanResample, x: Tensor) -> Tensor:
    """Apply a `WanResample` to all frames of x [B, C, T, h, w] at once."""
    if layer.mode == "upsample3d" and x.shape[2] > 1:
        later = rearrange(layer.time_conv(x[:, :, 1:]), "b (two c) t h w -> b c (t two) h w", two=2)
        x = torch.cat([x[:, :, :1], later], dim=2)
    batch = x.shape[0]
    x = layer.resample(rearrange(x, "b c t h w -> (b t) c h w"))
    x = rearrange(x, "(b t) c h w -> b c t h w", b=batch)
    if layer.mode == "downsample3d" and x.shape[2] > 1:
        x = torch.cat([x[:, :, :1], layer.time_conv(x)], dim=2)
    return x


def use_channels_last_(net: nn.Module) -> None:
    """Store convolution weights channels last, the fastest layout on CPUs and tensor cores."""
    for parameter in net.parameters():
        if parameter.ndim == 5:
            parameter.data = parameter.data.to(memory_format=torch.channels_last_3d)
        elif parameter.ndim == 4:
            parameter.data = parameter.data.to(memory_format=torch.channels_last)


def use_fast_cpu_kernels_(net: nn.Module) -> None:
    """Replace slow CPU kernels in diffusers' VAE with faster equivalents.

    PyTorch uses oneDNN's 3D convolution only for batches of several clips; for one clip, its own is about five times
    slower. RMS normalisation is slow too, because its norm is not over the last dimension.
    """
    for module in net.modules():
        if isinstance(module, nn.Conv3d):
            module._conv_forward = partial(_conv3d, module)  # type: ignore[method-assign]
        elif isinstance(module, WanRMS_norm):
            module.forward = partial(_rms_norm, module)  # type: ignore[method-assign]


def _conv3d(conv: nn.Conv3d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    single = x.device.type == "cpu" and len(x) == 1 and not torch.is_grad_enabled()
    if single and torch.backends.mkldnn.is_available() and isinstance(conv.padding, tuple):
        return torch.mkldnn_convolution(x, weight, bias, conv.padding, conv.stride, conv.dilation, conv.groups)
    return nn.Conv3d._conv_forward(conv, x, weight, bias)


def _rms_norm(norm: WanRMS_norm, x: Tensor) -> Tensor:
    if x.device.type != "cpu" or x.dtype != torch.float32 or not norm.channel_first:
        return WanRMS_norm.forward(norm, x)
    length = x.square().sum(dim=1, keepdim=True).sqrt().clamp_min(1e-12)  # the lower bound of F.normalize
    return x * length.reciprocal() * (norm.scale * norm.gamma) + norm.bias
