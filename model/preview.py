"""Small pictures of latents without the VAE's decoder."""

import threading
import weakref

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.vae import WanVAE

LARGEST_SIDE = 96  # pixels, unless the latents themselves are larger
_CLIPS, _SIZE, _CLIP_FRAMES = 24, 64, 9  # of the clips that the first map is fitted to
_RIDGE = 1e-2
_DECAY = 0.5  # weight of older blocks at every block
_PRIOR = 2.0  # latents that the first map counts for, against those of the video
Sums = tuple[Tensor, Tensor]  # of input x input [9 C + 1, 9 C + 1] and input x patch [9 C + 1, 3 patch patch]

_encoded: "weakref.WeakKeyDictionary[nn.Module, tuple[Tensor, Tensor]]" = weakref.WeakKeyDictionary()
_fitting = threading.Lock()


class LatentPreview:
    """A linear map from latents to RGB: each 3x3 neighbourhood of latents gives one patch of pixels.

    Least squares fit it, first to clips of random moving rectangles that the VAE encodes, then to the decoded blocks of
    the video. It costs one small convolution per picture. All work is done on the CPU; all methods may be called by any
    thread.
    """

    def __init__(self, vae: WanVAE, latent_size: tuple[int, int]):
        """The clips of rectangles are encoded once per VAE.

        Args:
            latent_size: height and width of the latents. Large latents have fewer pixels per latent.
        """
        self._stride, self.patch = vae.temporal_stride, vae.spatial_stride
        while self.patch > 1 and self.patch * max(latent_size) > LARGEST_SIDE:
            self.patch //= 2
        self._shrink = vae.spatial_stride // self.patch
        with _fitting:
            if vae.net not in _encoded:
                _encoded[vae.net] = _encoded_rectangles(vae)
        self._prior = self._sums(*_encoded[vae.net])
        self._video: Sums = torch.zeros_like(self._prior[0]), torch.zeros_like(self._prior[1])
        self._solve()

    def learn(self, latents: Tensor, frames: np.ndarray) -> None:
        """Fit the map to a decoded block as well.

        Args:
            latents: [F, C, h, w].
            frames: its pixel frames, uint8 [T, H, W, 3].
        """
        count = len(frames) // self._stride  # the video's first latent frame decodes to one pixel frame: left out
        if count:
            pixels = torch.from_numpy(frames[-count * self._stride :][self._stride // 2 :: self._stride].copy())
            block = self._sums(latents[-count:].cpu().float(), pixels.permute(0, 3, 1, 2).float() / 127.5 - 1)
            self._video = _DECAY * self._video[0] + block[0], _DECAY * self._video[1] + block[1]
            self._solve()

    def __call__(self, latents: Tensor) -> np.ndarray:
        """Return a picture of latents [C, h, w], uint8 [h patch, w patch, 3]."""
        weight, bias = self._map
        with torch.no_grad():
            padded = F.pad(latents[None].cpu().float(), (1, 1, 1, 1), mode="replicate")
            [pixels] = F.pixel_shuffle(F.conv2d(padded, weight, bias), self.patch)
        pixels = ((pixels.nan_to_num(nan=-1.0).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        return pixels.permute(1, 2, 0).numpy()

    def _sums(self, latents: Tensor, pixels: Tensor) -> Sums:
        """Return the sums of least squares for latents [F, C, h, w] and their pixels [F, 3, H, W]."""
        columns = F.unfold(F.pad(latents, (1, 1, 1, 1), mode="replicate"), 3)  # [F, 9 C, h w]
        inputs = columns.transpose(1, 2).flatten(0, 1).double()
        inputs = torch.cat([inputs, torch.ones_like(inputs[:, :1])], dim=1)
        patches = F.pixel_unshuffle(F.avg_pool2d(pixels, self._shrink), self.patch)
        targets = patches.flatten(2).transpose(1, 2).flatten(0, 1).double()
        return inputs.T @ inputs, inputs.T @ targets

    def _solve(self) -> None:
        squares, products = self._prior
        scale = _PRIOR / float(squares[-1, -1])  # the last input is 1, so this entry counts the latents
        ridge = _RIDGE * torch.eye(len(squares), dtype=squares.dtype) * (_PRIOR + float(self._video[0][-1, -1]))
        solution = torch.linalg.solve(self._video[0] + scale * squares + ridge, self._video[1] + scale * products)
        weight = solution[:-1].T.reshape(products.shape[1], -1, 3, 3).float().contiguous()
        self._map = weight, solution[-1].float()  # one assignment: other threads see both or neither


@torch.no_grad()
def _encoded_rectangles(vae: WanVAE) -> tuple[Tensor, Tensor]:
    """Return latents [F, C, h, w] of clips, and one pixel frame [F, 3, H, W] of each. First frames are left out."""
    pixels = moving_rectangles(_CLIPS, _CLIP_FRAMES, _SIZE, torch.Generator().manual_seed(0))
    # One clip at a time: the CPU kernels of a single clip are the fastest.
    latents = torch.cat([vae.encode(clip)[:, 1:].cpu() for clip in pixels.split(1)])
    return latents.flatten(0, 1), pixels[:, 1 + vae.temporal_stride // 2 :: vae.temporal_stride].flatten(0, 1)


def moving_rectangles(num_clips: int, num_frames: int, size: int, generator: torch.Generator) -> Tensor:
    """Return clips of random colours, [B, T, 3, H, W] in [-1, 1]: four rectangles that move over a background."""

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    pixels = (2 * uniform(num_clips, 1, 3, 1, 1) - 1).repeat(1, num_frames, 1, size, size)
    position = torch.arange(size, dtype=torch.float32)
    time = torch.arange(num_frames, dtype=torch.float32)[:, None]
    for clip in pixels:
        for _ in range(4):
            colour, centre, speed = 2 * uniform(3) - 1, size * uniform(2), 4 * uniform(2) - 2
            half = size * (0.06 + 0.2 * uniform(2))
            inside = [(position - centre[i] - speed[i] * time).abs() < half[i] for i in range(2)]  # [T, size] each
            mask = inside[0][:, None, :, None] & inside[1][:, None, None, :]
            clip[:] = torch.where(mask, colour[:, None, None], clip)
    return pixels
