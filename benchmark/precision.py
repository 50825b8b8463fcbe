"""Error of 8-bit caches and weights: differences from the videos of the unchanged configuration."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pipeline import TextToVideo
from pipeline.build import check_precision
from pipeline.video import Video
from utils.config import Config
from utils.config_loading import override_config
from utils.device import pick_device

CHOICES = (
    "model.dtype=bfloat16",
    "rollout.cache_dtype=float8_e4m3fn",
    "rollout.cache_dtype=int8",
    "model.quantization=int8",
    "model.quantization=int8_dynamic",
)


@dataclass(frozen=True)
class VideoError:
    """Root mean square error of latents, and peak signal-to-noise ratio of pixel frames in dB."""

    latent_rmse: float
    psnr: float


def precision_rows(
    config: Config, prompts: Sequence[str], choices: Sequence[str] = CHOICES
) -> Iterator[tuple[str, VideoError]]:
    """Yield each choice with the error of its videos against those of `config`, with the same noise.

    Args:
        choices: overrides of the configuration, separated by spaces.

    Raises:
        UserError: for a choice that cannot run.
    """
    configs = {choice: override_config(config, choice.split()) for choice in choices}
    device = pick_device(config.runtime.device, config.runtime.threads)
    for changed in configs.values():
        check_precision(changed, device)
    reference = _videos(config, prompts, device)
    for choice, changed in configs.items():
        yield choice, video_error(_videos(changed, prompts, device), reference)


def video_error(videos: Sequence[Video], reference: Sequence[Video]) -> VideoError:
    """Return the error over all videos. The PSNR of equal videos is infinite."""
    pairs = list(zip(videos, reference, strict=True))
    latent = float(np.mean([(a.latents - b.latents).square().mean().item() for a, b in pairs]))
    pixel = float(np.mean([np.square(a.frames.astype(np.float64) - b.frames).mean() for a, b in pairs]))
    return VideoError(math.sqrt(latent), 10 * math.log10(255**2 / pixel) if pixel else math.inf)


def _videos(config: Config, prompts: Sequence[str], device: torch.device) -> list[Video]:
    pipe = TextToVideo.load(config, device=device, prompts=prompts)
    return [pipe.generate(prompt) for prompt in prompts]
