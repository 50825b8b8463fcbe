"""Prefixes: the image, clip or saved latents that videos continue."""

from collections import deque
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from model.vae import WanVAE
from model.weight_checks import is_finite
from pipeline.build import num_pixel_frames
from pipeline.latent_files import read_latents
from utils.clips import VideoReader, read_image, resize_and_crop
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


def check_one_input(config: Config, prefix_path: str) -> None:
    """Check that a video has a prefix or a source, not both.

    Raises:
        UserError: if it has both.
    """
    if prefix_path and config.video.source:
        raise UserError(
            f"a video cannot continue {prefix_path} and change video.source={config.video.source}: drop one"
        )


def read_prefix(path: str, config: Config, vae: WanVAE) -> Tensor:
    """Read the latents of a prefix, [1, F, C, h, w], float32 and contiguous.

    A clip is resampled to the video's frame rate, and fitted to its size. Its last 4n+1 pixel frames are the prefix.
    Of a clip that fills the whole video, the prefix leaves one block to generate. Memory does not grow with the clip.

    Raises:
        UserError: if the file cannot be read, or has latents of another size.
    """
    video = config.video
    if path.endswith(".safetensors"):
        latents = read_latents(path)[None].float()
        expected = vae.latent_shape(video.height, video.width)
        if latents.shape[2:] != expected:
            raise UserError(f"latents in {path} are {list(latents.shape[2:])}, the video's are {list(expected)}")
        return latents
    return encode_prefix(read_image(path)[None] if is_image(path) else _last_frames(path, config), config, vae, path)


def encode_prefix(frames: np.ndarray, config: Config, vae: WanVAE, source: str) -> Tensor:
    """Encode the last 4n+1 frames of a prefix, fitted to the video's size, as `read_prefix` returns them.

    Args:
        frames: uint8 [T, H, W, 3], at the video's frame rate.
        source: origin of the frames, for error messages.

    Raises:
        UserError: if the VAE returns NaN.
    """
    stride = vae.temporal_stride
    frames = frames[(len(frames) - 1) % stride :]
    video = config.video
    pixels = torch.from_numpy(resize_and_crop(frames, video.height, video.width).copy()).permute(0, 3, 1, 2)[None]
    latents = vae.encode(pixels.float() / 127.5 - 1).cpu().contiguous()  # torch.distributed sends contiguous tensors
    if not is_finite(latents):
        raise UserError(f"{source} is encoded to NaN or infinity by the VAE; try model.dtype=float32")
    return latents


def _last_frames(path: str, config: Config) -> np.ndarray:
    """Return the frames of a clip; of one that fills the whole video, the last that leave one block to generate."""
    video = config.video
    fills = num_pixel_frames(video.num_output_frames)
    with VideoReader(path, fps=video.fps, size=(video.height, video.width)) as reader:
        frames: deque[np.ndarray] = deque(reader, maxlen=fills)
    if len(frames) < fills:
        return np.stack(frames)
    return np.stack(frames)[-num_pixel_frames(max(1, video.num_output_frames - config.rollout.block_frames)) :]
