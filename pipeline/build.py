"""Builds networks, schedules, caches and rollouts from a configuration, and computes the sizes that they need."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers.models.attention import AttentionMixin
from diffusers.models.attention_dispatch import attention_backend
from torch import Tensor

from model.causal_wan import CausalWanModel, TextContext
from model.denoiser import Denoiser
from model.embeddings import EmbeddingCache
from model.flow import step_sigmas
from model.kv_cache import KVCache
from model.lora import fuse_lora
from model.vae import WanVAE
from model.weights import ModelDirectory
from pipeline.rollout import BlockLayout, Rollout, Transport
from pipeline.schedule import Op, Schedule
from utils.config import Config, RolloutConfig, VideoConfig
from utils.device import DTYPES
from utils.errors import UserError
from utils.rng import keyed_noise

VAE_STRIDE = 8  # pixels per latent of every Wan2.1 VAE; WanVAE reads it from the loaded network


def latent_size(video: VideoConfig) -> tuple[int, int]:
    """Return the height and width of the latents of a video."""
    return video.height // VAE_STRIDE, video.width // VAE_STRIDE


def load_network(config: Config, device: torch.device, fall_back: bool = True) -> CausalWanModel:
    """The causal generator that `config.model` names.

    Args:
        fall_back: see `CausalWanModel.compile_layers`.

    Raises:
        UserError: for missing or broken files.
    """
    model = config.model
    directory = ModelDirectory.open(model.base)
    weights, dtype = model.generator or None, DTYPES[model.dtype]
    net = directory.load_transformer(CausalWanModel, dtype, weights=weights, use_ema=model.use_ema)
    if model.lora:
        fuse_lora(net, model.lora, model.lora_scale)
    return prepare_network(net, config, device, fall_back)


def prepare_network(
    net: CausalWanModel, config: Config, device: torch.device, fall_back: bool = True
) -> CausalWanModel:
    """Put a generator on its device and let it run as `config.model` says. The arguments are `load_network`'s."""
    net.to(device).eval().requires_grad_(False)
    choose_attention_backend(net, config.model.attention_backend)
    if config.model.compile:
        net.compile_layers(fall_back)
    return net


def load_embeddings(config: Config, device: torch.device, capacity: int | None = None) -> EmbeddingCache:
    """Load the text encoder that `config.model` names, behind its cache of embeddings."""
    model = config.model
    directory, dtype = ModelDirectory.open(model.base), DTYPES[model.dtype]
    return EmbeddingCache.load(directory, dtype, model.text_length, model.text_cache, capacity).to(device)


def load_vae(config: Config, device: torch.device) -> WanVAE:
    """The VAE that `config.model` names."""
    return WanVAE(ModelDirectory.open(config.model.base).load_vae(DTYPES[config.model.dtype]).to(device))


def build_rollout(
    config: Config,
    net: CausalWanModel,
    text: TextContext,
    samples: Sequence[int],
    prefix: Tensor | None = None,
    transport: Transport | None = None,
    observe: Callable[[Op], None] | None = None,
) -> Rollout:
    """A rollout of `config.rollout`, its noise keyed by `config.runtime.seed` and the samples' numbers.

    Args:
        given: clean latents [1 or B, F, C, h, w] that the videos start with.
        transport: for a rank of a pipeline.
    """
    layout = BlockLayout(config.rollout.block_frames, 0 if prefix is None else prefix.shape[1])
    height, width = latent_size(config.video)

    def noise(block: int, step: int) -> Tensor:
        shape = (layout.frames(block), net.config.in_channels, height, width)
        drawn = torch.stack([keyed_noise(config.runtime.seed, sample, block, step, shape) for sample in samples])
        if net.device.type == "cuda":  # pinned, the copy is queued; otherwise the host would wait for the queue
            drawn = drawn.pin_memory()
        return drawn.to(net.device, non_blocking=True)

    def new_cache() -> KVCache:
        context, sink = context_frames(config.rollout, config.video.num_output_frames)
        block, dtype = config.rollout.block_frames, DTYPES[config.model.dtype]
        return net.new_cache(len(samples), height, width, context, block, sink, dtype=dtype)

    return Rollout(
        Denoiser(net, text),
        rollout_sigmas(config.rollout),
        noise,
        new_cache,
        layout,
        prefix=None if prefix is None else prefix.to(net.device, torch.float32).expand(len(samples), -1, -1, -1, -1),
        deterministic=config.rollout.use_ode_trajectory,
        transport=transport,
        observe=observe,
    )


def choose_attention_backend(net: AttentionMixin, name: str) -> None:
    """Have every layer attend by one of diffusers' backends.

    Raises:
        UserError: for a name it does not know, or a package that is not installed.
    """
    if name == "native":
        return
    try:
        with attention_backend():  # afterwards its default for all other networks is what it was
            net.set_attention_backend(name)
    except (ValueError, RuntimeError, ImportError) as error:
        raise UserError(f"model.attention_backend={name}: {str(error).splitlines()[0]}") from None


def rollout_sigmas(rollout: RolloutConfig) -> list[float]:
    """The noise levels 0..S of a configuration."""
    return step_sigmas(rollout.denoising_step_list, rollout.warp_denoising_step, rollout.timestep_shift)


def context_frames(rollout: RolloutConfig, num_frames: int) -> tuple[int, int]:
    """Frames that a cache holds, and how many of them are the sink, for a video of `num_frames` latent frames."""
    window = min(rollout.window or num_frames, num_frames)
    context = max(0, window - rollout.block_frames)
    return context, min(rollout.sink, context)


def build_schedule(rollout: RolloutConfig, num_frames: int, prefix_frames: int = 0) -> Schedule:
    """The schedule of a video of `num_frames` latent frames, the first `prefix_frames` of which are given.

    Raises:
        UserError: if blocks do not divide the frames to generate, naming the nearest counts that work.
    """
    block = rollout.block_frames
    generated = num_frames - prefix_frames
    if generated <= 0 or generated % block:
        lower = prefix_frames + max(1, generated // block) * block
        choices = " or ".join(str(n) for n in dict.fromkeys([lower, lower + block]))
        after = f" after {prefix_frames} given ones" if prefix_frames else ""
        raise UserError(
            f"{num_frames} latent frames cannot be made{after} in blocks of {block}; "
            f"the nearest valid --num_output_frames: {choices}"
        )
    layout = BlockLayout(block, prefix_frames)
    try:
        return Schedule(
            num_steps=len(rollout_sigmas(rollout)) - 1,
            num_blocks=layout.prefix_blocks + generated // block,
            method=rollout.schedule,
            context=rollout.context,
            leading_blocks=rollout.leading_blocks,
            leading_steps=rollout.leading_steps,
            prefix_blocks=layout.prefix_blocks,
        )
    except ValueError as error:
        raise UserError(f"rollout: {error}") from None


def check_size(config: Config, transformer: Mapping[str, Any]) -> None:
    """Refuse a video size that the VAE's stride and the patches do not divide, before weights are loaded.

    Args:
        transformer: the generator's configuration.

    Raises:
        UserError: naming the nearest sizes that work.
    """
    patch = transformer.get("patch_size", (1, 2, 2))
    stride = math.lcm(*(VAE_STRIDE * p for p in patch[1:]))
    for key in ("height", "width"):
        size = getattr(config.video, key)
        if size % stride:
            nearest = " or ".join(str(n) for n in (size // stride * stride, -(-size // stride) * stride) if n)
            raise UserError(f"--{key} {size} is not a multiple of {stride} (VAE and patches); the nearest: {nearest}")
