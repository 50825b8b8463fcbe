"""Prefixes: the image, clip or saved latents that videos continue."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from model.vae import WanVAE
from model.weight_checks import is_finite
from pipeline.output import read_latents
from utils.clips import read_image, read_video, resize_and_crop
from utils.config import Config
from utils.errors import UserError
from utils.image_prompts import IMAGE_SUFFIXES


def is_image(path: str) -> bool:
    """Return whether a path names an image, by its suffix."""
    return path.lower().endswith(IMAGE_SUFFIXES)


def check_prefix_exists(path: str) -> None:
    """Check that a prefix file exists.

    Raises:
        UserError: if it does not.
    """
    if not Path(path).is_file():
        raise UserError(f"cannot read {path}: there is no such file")


def read_prefix(path: str, config: Config, vae: WanVAE) -> Tensor:
    """Read the latents of a prefix, [1, F, C, h, w], float32 and contiguous.

    A clip is resampled to the video's frame rate, fitted to its size, and cut to 4n+1 frames.

    Raises:
        UserError: if the file cannot be read, has latents of another size, or fills the whole video.
    """
    video = config.video
    if path.endswith(".safetensors"):
        latents = read_latents(path)[None].float()
        expected = vae.latent_shape(video.height, video.width)
        if latents.shape[2:] != expected:
            raise UserError(f"latents in {path} are {list(latents.shape[2:])}, the video's are {list(expected)}")
        return latents
    if is_image(path):
        frames = read_image(path)[None]
    else:
        longest = vae.num_pixel_frames(video.num_output_frames)
        frames, _ = read_video(path, max_frames=longest, fps=video.fps)
        if len(frames) == longest:
            raise UserError(
                f"{path} fills all {video.num_output_frames} latent frames of the video; "
                "cut it shorter, or raise --num_output_frames"
            )
    return encode_prefix(frames, config, vae, path)


def encode_prefix(frames: np.ndarray, config: Config, vae: WanVAE, source: str) -> Tensor:
    """Encode the frames of a prefix, fitted to the video's size and cut to 4n+1, as `read_prefix` returns them.

    Args:
        frames: uint8 [T, H, W, 3], at the video's frame rate.
        source: origin of the frames, for error messages.

    Raises:
        UserError: if the VAE returns NaN.
    """
    stride = vae.temporal_stride
    frames = frames[: (len(frames) - 1) // stride * stride + 1]
    video = config.video
    pixels = torch.from_numpy(resize_and_crop(frames, video.height, video.width).copy()).permute(0, 3, 1, 2)[None]
    latents = vae.encode(pixels.float() / 127.5 - 1).cpu().contiguous()  # torch.distributed sends contiguous tensors
    if not is_finite(latents):
        raise UserError(f"{source} is encoded to NaN or infinity by the VAE; try model.dtype=float32")
    return latents
