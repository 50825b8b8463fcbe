"""A tiny decoder of Wan's latents with the architecture of TAEHV (github.com/madebyollin/taehv).

It decodes in a small part of the Wan decoder's time, at lower quality. Its only memory of the past is one frame per
memory block. The state dict has TAEHV's names, so the public weights taew2_1 load (widths 256, 128, 64, 64).
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.decoder import Decoder
from model.vae import use_channels_last_
from model.weight_files import read_state
from model.weight_names import State
from model.weights import build_from_state
from utils.errors import UserError

_GROWTH = (1, 2, 2)  # of the number of frames, per stage
_STAGE = 6  # modules of a stage: three memory blocks, upsampling, growth in time, convolution
_FIRST = 3  # modules before the first stage
_EXAMPLE = "choose a file with TAEHV's names, such as taew2_1.pth"


class MemoryBlock(nn.Module):
    """Residual block of three convolutions over each frame and the frame before it."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Sequential(
            _conv(2 * width, width), nn.ReLU(), _conv(width, width), nn.ReLU(), _conv(width, width)
        )

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        """Return [N, C, h, w] of frames x and the frames before them, [N, C, h, w] each."""
        return F.relu(self.conv(torch.cat([x, before], dim=1)) + x)


class GrowTime(nn.Module):
    """Turns each frame into `factor` frames by a convolution of size 1."""

    def __init__(self, width: int, factor: int):
        super().__init__()
        self.factor = factor
        self.conv = nn.Conv2d(width, width * factor, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return [factor N, C, h, w] of frames [N, C, h, w]."""
        return self.conv(x).unflatten(1, (self.factor, -1)).flatten(0, 1)


class TinyNetwork(nn.Module):
    """The network: latents to pixels in [0, 1], 8 `patch` times as large and with four times the frames."""

    def __init__(self, channels: int, widths: Sequence[int], patch: int = 1):
        """
        Args:
            channels: latent channels.
            widths: channels of the three stages and of the output stage.
            patch: the last convolution computes squares of patch x patch pixels.
        """
        super().__init__()
        self.channels, self.widths, self.patch = channels, tuple(widths), patch
        layers: list[nn.Module] = [nn.Identity(), _conv(channels, widths[0]), nn.ReLU()]  # TAEHV's names are positions
        for width, following, factor in zip(widths, widths[1:], _GROWTH, strict=False):
            layers += [*(MemoryBlock(width) for _ in range(3)), nn.Upsample(scale_factor=2), GrowTime(width, factor)]
            layers.append(_conv(width, following, bias=False))
        self.decoder = nn.Sequential(*layers, nn.ReLU(), _conv(widths[-1], 3 * patch**2))

    def forward(self, latents: Tensor, past: Sequence[Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
        """Decode the next latents of a video.

        Args:
            latents: normalised latents [B, F, C, h, w].
            past: the second result of the piece before: the last input frame of each memory block. None: the video
                starts here.

        Returns:
            Pixels [B, 4 F, 3, H, W], not clamped, and the state for the next piece. The first three pixel frames of a
            video have no meaning.
        """
        batch, layers = len(latents), list(self.decoder)
        latest: list[Tensor] = []
        x = (torch.tanh(latents / 3) * 3).flatten(0, 1).contiguous(memory_format=torch.channels_last)
        x = layers[2](layers[1](x))
        for start in range(_FIRST, _FIRST + _STAGE * len(_GROWTH), _STAGE):
            *blocks, upsample, grow, convolution = layers[start : start + _STAGE]
            for block in blocks:
                frames = x.unflatten(0, (batch, -1))
                first = torch.zeros_like(frames[:, :1]) if past is None else past[len(latest)]
                latest.append(frames[:, -1:].clone())
                x = block(x, torch.cat([first, frames[:, :-1]], dim=1).flatten(0, 1))
            x = convolution(upsample(grow(x)))  # growth commutes with upsampling and is cheaper before it
        x = F.pixel_shuffle(layers[-1](layers[-2](x)), self.patch)
        return x.unflatten(0, (batch, -1)), latest


class TinyDecoder(Decoder):
    """A loaded tiny decoder for inference."""

    def __init__(self, net: TinyNetwork):
        self.net = net.eval().requires_grad_(False)
        use_channels_last_(self.net)

    @property
    def channels(self) -> int:
        """Latent channels C."""
        return self.net.channels

    @property
    def spatial_stride(self) -> int:
        """Pixels per latent in height and width."""
        return 2 ** len(_GROWTH) * self.net.patch

    @property
    def temporal_stride(self) -> int:
        """Pixel frames per latent frame after the first."""
        return 4

    def to(self, device: torch.device | str) -> "TinyDecoder":
        """Move the weights."""
        self.net.to(device)
        return self

    def decode_piece(self, latents: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Decode the next latent frames of a video; see `Decoder.decode_piece`."""
        weight = next(self.net.parameters())
        pixels, latest = self.net(latents.to(weight.device, weight.dtype), state)
        pixels = pixels if state is not None else pixels[:, self.temporal_stride - 1 :]
        return pixels.float().clamp(0, 1) * 2 - 1, latest


def load_tiny_decoder(path: str | Path, like: Decoder, dtype: torch.dtype | None = None) -> TinyDecoder:
    """Load a tiny decoder for the latents of another decoder.

    Args:
        path: .pth or .safetensors file with TAEHV's names, or a folder with one. Weights of an encoder are ignored.
        like: the decoder of the model.
        dtype: of the weights; None: as stored.

    Raises:
        UserError: if the file is missing, cut off, unsafe to read, holds another network, or decodes other latents.
    """
    state = {name: value for name, value in read_state(Path(path)).items() if name.startswith("decoder.")}
    sizes = _sizes(state, path)
    for stage, factor in enumerate(_GROWTH):  # files may hold unused rows for a growth in time that TAEHV leaves out
        name = f"decoder.{_FIRST + _STAGE * stage + 4}.conv.weight"
        state[name] = state[name][-factor * sizes["widths"][stage] :]
    decoder = TinyDecoder(build_from_state(partial(TinyNetwork, **sizes), state, path, dtype))
    for name, kind in ("channels", "latent channels"), ("spatial_stride", "pixels per latent"):
        theirs, ours = getattr(decoder, name), getattr(like, name)
        if theirs != ours:
            raise UserError(
                f"{path} decodes {theirs} {kind}, but the model has {ours}; choose a decoder for this model"
            )
    return decoder


def _sizes(state: State, path: str | Path) -> dict[str, Any]:
    """Return the arguments of `TinyNetwork` for a state dict."""
    last = _FIRST + _STAGE * len(_GROWTH)
    inputs = [1, *(_FIRST + _STAGE * stage + _STAGE - 1 for stage in range(len(_GROWTH)))]
    grown = [f"decoder.{_FIRST + _STAGE * stage + 4}.conv.weight" for stage in range(len(_GROWTH))]
    names = [*(f"decoder.{n}.weight" for n in (*inputs, last + 1)), *grown]
    for name in names:
        if name not in state:
            raise UserError(f"{path} holds no tiny decoder ({name} is missing); {_EXAMPLE}")
        if state[name].ndim != 4:
            raise UserError(f"{path} holds no tiny decoder ({name} is {list(state[name].shape)}); {_EXAMPLE}")
    widths = [len(state[f"decoder.{n}.weight"]) for n in inputs]
    patch = round((len(state[names[len(inputs)]]) / 3) ** 0.5)
    return dict(channels=state[names[0]].shape[1], widths=widths, patch=max(1, patch))


def _conv(inputs: int, outputs: int, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias)
