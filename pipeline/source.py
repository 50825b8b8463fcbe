"""Sources: the clips that video-to-video changes, encoded while the rollout runs, in constant memory."""

import copy
import itertools
import os
from collections.abc import Iterator

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.vae import WanVAE
from pipeline.build import TEMPORAL_STRIDE, num_pixel_frames
from utils.clips import VideoReader
from utils.config import Config
from utils.errors import UserError


def fit_to_source(config: Config) -> Config:
    """Return the configuration with `video.num_output_frames` cut to the length of `video.source`, if there is one.

    The source's path becomes absolute, so that metadata reproduces the video from any folder.
    A clip is decoded once to count its frames: headers are wrong for damaged files and for variable frame rates.

    Raises:
        UserError: if the source cannot be read.
    """
    video = config.video
    if not video.source:
        return config
    if video.source.endswith(".safetensors"):
        frames = _read_shape(video.source)[0]
    else:
        most = num_pixel_frames(video.num_output_frames)
        with VideoReader(video.source, most, fps=video.fps) as reader:
            frames = (sum(1 for _ in reader) - 1) // TEMPORAL_STRIDE + 1
    fitted = copy.deepcopy(config)
    fitted.video.num_output_frames = min(frames, video.num_output_frames)
    fitted.video.source = os.path.abspath(video.source)
    return fitted


def source_frames(config: Config, vae: WanVAE) -> Iterator[Tensor]:
    """Yield the latents [1, 1, C, h, w], float32, of each latent frame of `video.source`.

    A clip is resampled to the video's frame rate and fitted to its size. Only the pixel frames of one latent frame are
    in memory.

    Raises:
        UserError: if the source cannot be read, or has latents of another size.
    """
    video = config.video
    if video.source.endswith(".safetensors"):
        yield from _read_latents(video.source, vae.latent_shape(video.height, video.width))
        return
    encoder = vae.stream_encoder()
    with VideoReader(video.source, fps=video.fps, size=(video.height, video.width)) as reader:
        frames = iter(reader)
        chunk = list(itertools.islice(frames, 1))
        while chunk:
            pixels = torch.stack([torch.from_numpy(frame.copy()) for frame in chunk]).permute(0, 3, 1, 2)
            yield encoder.push(pixels[None].float() / 127.5 - 1)
            chunk = list(itertools.islice(frames, vae.temporal_stride))
            if len(chunk) < vae.temporal_stride:
                return


def _read_shape(path: str) -> list[int]:
    try:
        with safe_open(path, framework="pt") as file:
            shape = file.get_slice("latents").get_shape()
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read latents from {path} ({error}); --save_latents writes such files") from None
    if len(shape) != 4:
        raise UserError(f"latents in {path} must be [F, C, h, w], not {shape}")
    return shape


def _read_latents(path: str, expected: tuple[int, ...]) -> Iterator[Tensor]:
    """Yield the frames [1, 1, C, h, w] of saved latents; read one at a time."""
    num_frames, *shape = _read_shape(path)
    if tuple(shape) != expected:
        raise UserError(f"latents in {path} are {shape}, the video's are {list(expected)}")
    with safe_open(path, framework="pt") as file:
        latents = file.get_slice("latents")
        for index in range(num_frames):
            yield latents[index : index + 1][None].float()
