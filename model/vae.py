"""The Wan VAE: pixels to normalised latents and back, whole, streamed, or in one differentiable pass.

Built on diffusers' `AutoencoderKLWan`. Everywhere else in this repository latents are normalised per channel with the
VAE's published mean and standard deviation, and laid out [B, F, C, h, w]; pixels are [B, T, 3, H, W] in [-1, 1].
F latent frames are T = 4 (F - 1) + 1 pixel frames (for Wan's stride 4 in time).
"""

from functools import cache, partial

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResample, WanRMS_norm, patchify, unpatchify
from einops import rearrange
from torch import Tensor, nn

from utils.errors import UserError


class WanVAE:
    """A loaded `AutoencoderKLWan` with Wan's latent normalisation applied."""

    def __init__(self, vae: AutoencoderKLWan):
        self.net = vae.eval().requires_grad_(False)
        quicken_on_cpu_(self.net)

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

    def num_pixel_frames(self, num_latent_frames: int) -> int:
        """Pixel frames that `num_latent_frames` latent frames decode to."""
        return self.temporal_stride * (num_latent_frames - 1) + 1

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of one latent frame of a video of height x width pixels."""
        return self.channels, height // self.spatial_stride, width // self.spatial_stride

    def to(self, device: torch.device | str) -> "WanVAE":
        """Move the weights, for example off the device after use."""
        self.net.to(device)
        return self

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Encode pixels [B, T, 3, H, W] in [-1, 1] to latents [B, F, C, h, w], float32 (the posterior's mean).

        Raises:
            UserError: if T is not 4n+1 or the size is not a multiple of the stride.
        """
        num_frames, height, width = pixels.shape[1], *pixels.shape[-2:]
        if (num_frames - 1) % self.temporal_stride or height % self.spatial_stride or width % self.spatial_stride:
            raise UserError(
                f"the VAE cannot encode {num_frames} frames of {height}x{width}: frames must be "
                f"{self.temporal_stride}n+1, height and width multiples of {self.spatial_stride}"
            )
        mean = self.net.encode(self._own(pixels).transpose(1, 2)).latent_dist.mode()
        return normalise(self.net, mean.float()).transpose(1, 2)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode a whole video: latents [B, F, C, h, w] to pixels [B, T, 3, H, W] in [-1, 1], float32."""
        return self.stream().push(latents)

    def stream(self) -> "StreamingDecoder":
        """A decoder that takes a video's latents piece by piece, in order."""
        return StreamingDecoder(self)

    def _own(self, x: Tensor) -> Tensor:
        return x.to(self.net.device, self.net.dtype)


class StreamingDecoder:
    """Decodes one video block by block; the pieces equal whole-video decoding, in constant memory.

    Wan's decoder is causal in time and keeps the last two frames of each convolution's input. diffusers holds that
    state on the network for the length of one `decode`; here it belongs to the stream, so that several videos can be
    decoded in turns by one network.
    """

    def __init__(self, vae: WanVAE):
        self._vae = vae
        self._features: list[Tensor | None] | None = None

    @torch.no_grad()
    def push(self, latents: Tensor) -> Tensor:
        """Decode the next latents [B, F, C, h, w]; returns their pixels [B, T, 3, H, W] in [-1, 1], float32.

        The first latent frame of the video gives one pixel frame, every later one `temporal_stride`.
        """
        vae = self._vae.net
        z = denormalise(vae, latents.float().transpose(1, 2))
        z = vae.post_quant_conv(self._vae._own(z))
        pieces = []
        for frame in z.split(1, dim=2):
            first = self._features is None
            if self._features is None:
                vae.clear_cache()
                self._features = [None] * len(vae._feat_map)
            out = vae.decoder(frame, feat_cache=self._features, feat_idx=[0], first_chunk=first)
            pieces.append(_from_patches(vae, out).clamp(-1, 1).float())
        return torch.cat(pieces, dim=2).transpose(1, 2)


def normalise(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Raw VAE latents [B, C, F, h, w] to zero mean and unit variance per channel (Wan2.1's published statistics)."""
    mean, std = _statistics(vae, latents)
    return (latents - mean) / std


def denormalise(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """The inverse of `normalise`."""
    mean, std = _statistics(vae, latents)
    return latents * std + mean


def _statistics(vae: AutoencoderKLWan, like: Tensor) -> tuple[Tensor, Tensor]:
    mean, std = tuple(vae.config.latents_mean), tuple(vae.config.latents_std)
    return _per_channel(mean, like.dtype, like.device), _per_channel(std, like.dtype, like.device)


@cache  # or every block would copy them to the GPU, and the host wait for all that is queued there
def _per_channel(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device).view(1, -1, 1, 1, 1)


def _from_patches(vae: AutoencoderKLWan, x: Tensor) -> Tensor:
    return unpatchify(x, vae.config.patch_size) if vae.config.patch_size is not None else x


# ---- one differentiable pass over a whole clip, for training ----
# diffusers runs the networks frame by frame through a feature cache, and skips all temporal resampling without one.
# Over a whole clip the same function is a plain causal convolution; only the first frame, which temporal resampling
# passes through untouched, needs care. Parity with the chunked version is tested.


def encode_clip(vae: AutoencoderKLWan, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Posterior mean and log-variance, raw [B, C, F, h, w] each, of pixels [B, 3, T, H, W] with T = 4n+1."""
    x = patchify(pixels, vae.config.patch_size) if vae.config.patch_size is not None else pixels
    encoder = vae.encoder
    x = encoder.conv_in(x)
    for layer in encoder.down_blocks:
        x = _resample_clip(layer, x) if isinstance(layer, WanResample) else layer(x)
    x = encoder.conv_out(encoder.nonlinearity(encoder.norm_out(encoder.mid_block(x))))
    mean, log_variance = vae.quant_conv(x).chunk(2, dim=1)
    return mean, log_variance.clamp(-30, 20)


def decode_clip(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Pixels [B, 3, T, H, W], not clamped, of raw latents [B, C, F, h, w]."""
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
    """`WanResample` over all frames of x [B, C, T, h, w] at once."""
    if layer.mode == "upsample3d" and x.shape[2] > 1:
        later = rearrange(layer.time_conv(x[:, :, 1:]), "b (two c) t h w -> b c (t two) h w", two=2)
        x = torch.cat([x[:, :, :1], later], dim=2)
    batch = x.shape[0]
    x = layer.resample(rearrange(x, "b c t h w -> (b t) c h w"))
    x = rearrange(x, "(b t) c h w -> b c t h w", b=batch)
    if layer.mode == "downsample3d" and x.shape[2] > 1:
        x = torch.cat([x[:, :, :1], layer.time_conv(x)], dim=2)
    return x


def channels_last_(net: nn.Module) -> None:
    """Lay convolution weights out channels last, which convolutions on CPUs and tensor cores run faster in."""
    for parameter in net.parameters():
        if parameter.ndim == 5:
            parameter.data = parameter.data.to(memory_format=torch.channels_last_3d)
        elif parameter.ndim == 4:
            parameter.data = parameter.data.to(memory_format=torch.channels_last)


def quicken_on_cpu_(net: nn.Module) -> None:
    """Give what a CPU computes slowly in diffusers' VAE another path to the same values.

    A 3D convolution of a single clip goes to oneDNN, as those of several do: the kernel PyTorch takes for it is some
    five times slower. So is its norm over a dimension that is not the last, which RMS normalisation asks for.
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
    length = x.square().sum(dim=1, keepdim=True).sqrt().clamp_min(1e-12)  # F.normalize's bound
    return x * length.reciprocal() * (norm.scale * norm.gamma) + norm.bias
