"""Arguments of `HiARPipeline`: settings, prompts, noise and prefixes in diffusers' conventions.

Wrong arguments raise ValueError with one line.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from model.vae import WanVAE
from pipeline.build import TEMPORAL_STRIDE, describe_blocks, nearest_lengths, num_pixel_frames, rollout_sigmas
from pipeline.prefix import check_prefix_exists, encode_prefix, is_image, read_prefix
from utils.config import Config
from utils.config_loading import override_config

OUTPUT_TYPES = ("np", "pil", "pt", "latent")
SEEDS = 2**63 - 1

Frames = str | os.PathLike[str] | Image.Image | np.ndarray | list[Image.Image]
"""A path, images, or pixel frames as uint8 [H, W, 3] or [T, H, W, 3]."""


# ---- Settings ----


def apply_settings(config: Config, settings: Mapping[str, Any]) -> Config:
    """Return a copy of a configuration with a pipeline's settings, such as `{"rollout.window": 12}`.

    Raises:
        ValueError: for another key than those of `settings_of`, a wrong value, or video-to-video.
    """
    if unknown := sorted(settings.keys() - settings_of(config).keys()):
        raise ValueError(
            f"no setting {unknown[0]!r}: name keys of rollout and video in docs/config.md, or model.text_length"
        )
    changes = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in settings.items()]
    result = override_config(config, changes)
    if result.video.source:
        raise ValueError("a pipeline has no video-to-video (video.source): use TextToVideo.generate with strength=S")
    return result


def settings_of(config: Config) -> dict[str, Any]:
    """Return the settings that a pipeline stores in model_index.json.

    Raises:
        ValueError: for the tiny decoder, because a pipeline decodes with its component `vae`.
    """
    if config.model.decoder != "wan":
        raise ValueError(f"a pipeline decodes with its VAE: leave out model.decoder={config.model.decoder}")
    sections = {name: asdict(getattr(config, name)) for name in ("rollout", "video")}
    settings = {f"{name}.{key}": value for name, section in sections.items() for key, value in section.items()}
    settings.pop("video.crf")  # a pipeline writes no files
    return settings | {
        "model.text_length": config.model.text_length,
        "teacher.negative_prompt": config.teacher.negative_prompt,
    }


# ---- Arguments of a call ----


def check_prompts(prompt: str | Sequence[str]) -> list[str]:
    """Return the stripped prompts."""
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, list) or not prompts or not all(isinstance(text, str) for text in prompts):
        raise ValueError("prompt must be a string or a list of strings")
    if not all(text.strip() for text in prompts):
        raise ValueError("the prompt is empty: describe a video")
    return [text.strip() for text in prompts]


def check_choices(output_type: str, tensor_inputs: Sequence[str], num_videos_per_prompt: int) -> None:
    """Check the arguments of these names in `HiARPipeline.__call__`."""
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, not {output_type!r}")
    if unknown := sorted(set(tensor_inputs) - {"latents"}):
        raise ValueError(f"callback_on_step_end_tensor_inputs may contain only 'latents', not {unknown}")
    if num_videos_per_prompt < 1:
        raise ValueError(f"num_videos_per_prompt must be at least 1, not {num_videos_per_prompt}")


def step_settings(
    config: Config, num_inference_steps: int | None, guidance_scale: float | None, negative_prompt: str | None
) -> dict[str, Any]:
    """Return the settings that the arguments of these names change. None changes nothing."""
    settings: dict[str, Any] = {"rollout.guidance_scale": guidance_scale, "teacher.negative_prompt": negative_prompt}
    if config.rollout.num_steps:
        settings["rollout.num_steps"] = num_inference_steps
    elif num_inference_steps not in (None, num_steps := len(rollout_sigmas(config.rollout)) - 1):
        raise ValueError(
            f"num_inference_steps={num_inference_steps}, but the generator is distilled to {num_steps} steps: leave it "
            "out, or change the setting rollout.denoising_step_list"
        )
    if negative_prompt is not None and (guidance_scale or config.rollout.guidance_scale) == 1:
        raise ValueError("negative_prompt has no effect without guidance: leave it out, or give guidance_scale")
    return {key: value for key, value in settings.items() if value is not None}


def lora_scale(attention_kwargs: Mapping[str, Any] | None, has_lora: bool) -> float:
    """Return the factor on the LoRA's weights in a call."""
    arguments = dict(attention_kwargs or {})
    scale = arguments.pop("scale", 1.0)
    if arguments:
        raise ValueError(f"attention_kwargs may contain only 'scale', not {sorted(arguments)}")
    if not isinstance(scale, (int, float)) or scale <= 0:
        raise ValueError(f"the scale of a LoRA must be positive, not {scale!r}; disable_lora() turns it off")
    if scale != 1 and not has_lora:
        raise ValueError("attention_kwargs sets the scale of a LoRA, but none is loaded")
    return scale


def sample_numbers(
    num_prompts: int,
    videos_per_prompt: int,
    generator: torch.Generator | Sequence[torch.Generator] | None,
    seed: int | None,
) -> tuple[int, list[int]]:
    """Return the seed and the sample number of every video, which determine its noise.

    With `seed`, they are those of inference.py. Otherwise each sample number is drawn: from its generator, from the one
    generator, or from torch's global generator.
    """
    total = num_prompts * videos_per_prompt
    if seed is not None:
        if generator is not None:
            raise ValueError("give generator or seed, not both")
        if not isinstance(seed, (int, np.integer)):
            raise ValueError(f"seed must be a whole number, not {seed!r}")
        return int(seed), [sample for _ in range(num_prompts) for sample in range(videos_per_prompt)]
    generators = [generator] * total if generator is None or isinstance(generator, torch.Generator) else list(generator)
    if len(generators) != total:
        raise ValueError(f"generator lists {len(generators)} generators for {total} videos: give one, or one per video")
    devices = ["cpu" if g is None else g.device for g in generators]
    drawn = [torch.randint(SEEDS, (), generator=g, device=d) for g, d in zip(generators, devices, strict=True)]
    return 0, [int(number) for number in drawn]


def latent_frames(num_frames: int) -> int:
    """Return the latent frames of a video of `num_frames` = 4n+1 pixel frames."""
    if num_frames < 1 or (num_frames - 1) % TEMPORAL_STRIDE:
        lower = num_pixel_frames(1 + max(0, num_frames - 1) // TEMPORAL_STRIDE)
        raise ValueError(f"num_frames={num_frames} is not 4n+1; the nearest: {lower} or {lower + TEMPORAL_STRIDE}")
    return (num_frames - 1) // TEMPORAL_STRIDE + 1


def check_length(config: Config, prefix_frames: int) -> None:
    """Check that the frames after a prefix of `prefix_frames` latent frames fill whole blocks."""
    frames = config.video.num_output_frames
    if lengths := nearest_lengths(config.rollout, frames, prefix_frames):
        choices = " or ".join(str(num_pixel_frames(length)) for length in lengths)
        after = f" after a prefix of {num_pixel_frames(prefix_frames)}" if prefix_frames else ""
        raise ValueError(
            f"num_frames={num_pixel_frames(frames)}{after} does not fill {describe_blocks(config.rollout)} latent "
            f"frames; the nearest: {choices}"
        )


# ---- Prefixes ----


def read_prefixes(
    image: Frames | list[Frames] | None, video: Frames | None, num_prompts: int, config: Config, vae: WanVAE
) -> Tensor | None:
    """Return the latents [num_prompts, F, C, h, w] of the prefixes; None without image and video."""
    if image is not None and video is not None:
        raise ValueError("give image or video, not both")
    if image is None and video is None:
        return None
    if video is not None:
        return _read(video, config, vae, "video").expand(num_prompts, -1, -1, -1, -1)
    images = image if isinstance(image, list) else [image] * num_prompts
    if len(images) != num_prompts:
        raise ValueError(f"image lists {len(images)} images for {num_prompts} prompts: give one, or one per prompt")
    return torch.cat([_read(source, config, vae, "image") for source in images])


def _read(source: Any, config: Config, vae: WanVAE, argument: str) -> Tensor:
    if isinstance(source, (str, os.PathLike)):
        path = os.fspath(source)
        check_prefix_exists(path)
        if is_image(path) != (argument == "image"):
            raise ValueError(f"{argument}={path!r} is {'an image' if is_image(path) else 'no image'}")
        return read_prefix(path, config, vae)
    if argument == "image" or isinstance(source, list):
        source = np.stack([_pixels(item) for item in (source if isinstance(source, list) else [source])])
    if not isinstance(source, np.ndarray) or source.dtype != np.uint8 or source.ndim != 4 or source.shape[3] != 3:
        shape = "[H, W, 3]" if argument == "image" else "[T, H, W, 3]"
        raise ValueError(f"{argument} must be a path, PIL images or a uint8 array {shape}")
    return encode_prefix(source, config, vae, f"the {argument}")


def _pixels(image: Any) -> Any:
    return np.asarray(image.convert("RGB")) if isinstance(image, Image.Image) else image
