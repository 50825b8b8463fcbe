"""The Wan VAE, diffusers' `AutoencoderKLWan`: for inference on whole videos and streams, and for training on clips.

`WanVAE` encodes to and decodes from latents that are normalised per channel by the VAE's published mean and standard
deviation; the rest of this repository uses only these. Latents are [B, F, C, h, w], pixels [B, T, 3, H, W] in [-1, 1].
F latent frames decode to T = 4 (F - 1) + 1 pixel frames. `encode_clip` and `decode_clip` use raw latents.
"""

from functools import cache, partial

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResample, WanRMS_norm, patchify, unpatchify
from einops import rearrange
from torch import Tensor, nn

from utils.errors import UserError


class WanVAE:
    """A loaded `AutoencoderKLWan` for inference, with Wan's normalisation of latents."""

    def __init__(self, vae: AutoencoderKLWan):
        self.net = vae.eval().requires_grad_(False)
        use_fast_cpu_kernels_(self.net)

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
        """Return the number of pixel frames that `num_latent_frames` latent frames decode to."""
        return self.temporal_stride * (num_latent_frames - 1) + 1

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Return (C, h, w) of a latent frame, for a video of height x width pixels."""
        return self.channels, height // self.spatial_stride, width // self.spatial_stride

    def to(self, device: torch.device | str) -> "WanVAE":
        """Move the weights, for example off the device after use."""
        self.net.to(device)
        return self

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

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Return the pixels [B, T, 3, H, W] in [-1, 1], float32, of a whole video's latents [B, F, C, h, w]."""
        return self.stream().push(latents)

    def stream(self, keep: int = 0) -> "StreamingDecoder":
        """Return a decoder for one video's latents, piece by piece and in order; see `StreamingDecoder`."""
        return StreamingDecoder(self, keep)

    def stream_encoder(self) -> "StreamingEncoder":
        """Return an encoder for one video's pixels, piece by piece and in order."""
        return StreamingEncoder(self)

    def _cast(self, x: Tensor) -> Tensor:
        return x.to(self.net.device, self.net.dtype)


class StreamingDecoder:
    """Decodes one video block by block in constant memory, with the same result as decoding it whole.

    Wan's decoder is causal in time and keeps the last two frames of every convolution's input. diffusers keeps these
    frames on the network during one `decode`. Here each stream keeps its own, so that one network can decode several
    videos alternately.
    """

    def __init__(self, vae: WanVAE, keep: int = 0):
        """
        Args:
            keep: number of latest pixel frames to keep in `latest`.
        """
        self._vae, self._keep = vae, keep
        self._features: list[Tensor | None] | None = None
        self.latest: Tensor | None = None  # [B, up to `keep`, 3, H, W], in [-1, 1]

    @torch.no_grad()
    def push(self, latents: Tensor) -> Tensor:
        """Decode the next latents [B, F, C, h, w] and return their pixels [B, T, 3, H, W] in [-1, 1], float32.

        The video's first latent frame decodes to one pixel frame, each later one to `temporal_stride` pixel frames.
        """
        vae = self._vae.net
        z = denormalise(vae, latents.float().transpose(1, 2))
        z = vae.post_quant_conv(self._vae._cast(z))
        pieces = []
        for frame in z.split(1, dim=2):
            first = self._features is None
            if self._features is None:
                vae.clear_cache()
                self._features = [None] * len(vae._feat_map)
            out = vae.decoder(frame, feat_cache=self._features, feat_idx=[0], first_chunk=first)
            pieces.append(_from_patches(vae, out).clamp(-1, 1).float())
        decoded = torch.cat(pieces, dim=2).transpose(1, 2)
        if self._keep:
            kept = decoded if self.latest is None else torch.cat([self.latest, decoded], dim=1)
            self.latest = kept[:, -self._keep :].clone()  # a view would keep all frames in memory
        return decoded


class StreamingEncoder:
    """Encodes one video piece by piece in constant memory, with the same result as `WanVAE.encode` of the whole.

    Like the decoder, Wan's encoder is causal and keeps the last frames of every convolution's input.
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
