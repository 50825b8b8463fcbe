"""Build networks, schedules, caches and rollouts from a configuration, and compute sizes and strides."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from diffusers.models.attention import AttentionMixin
from diffusers.models.attention_dispatch import attention_backend
from torch import Tensor

from model.attention_backends import fastest_backend
from model.causal_wan import CausalWanModel
from model.compilation import compiles, keep_compiled_code
from model.cuda_graphs import use_cuda_graphs
from model.denoiser import Denoiser, GuidedCache, GuidedDenoiser
from model.embeddings import EmbeddingCache
from model.flow import solver_sigmas, step_sigmas
from model.kv_cache import KVCache
from model.lora import fuse_lora
from model.offload import stream_weights_
from model.quantization import check_quantization, quantize_layers_
from model.tiny_decoder import load_tiny_decoder
from model.vae import WanVAE
from model.weights import ModelDirectory
from pipeline.rollout import BlockLayout, Rollout
from pipeline.schedule import Schedule
from utils.config import Config, RolloutConfig, VideoConfig
from utils.device import CACHE_DTYPES, DTYPES
from utils.distributed import rank
from utils.errors import UserError
from utils.rng import keyed_noise

# Every Wan2.1 VAE has these strides. They are needed before a VAE is loaded; `WanVAE` reads them from the network.
VAE_STRIDE = 8  # pixels per latent in height and width
TEMPORAL_STRIDE = 4  # pixel frames per latent frame after the first

AnyRollout = TypeVar("AnyRollout", bound=Rollout)


# ---- Sizes ----


def latent_size(video: VideoConfig) -> tuple[int, int]:
    """Return the height and width of a video's latents."""
    return video.height // VAE_STRIDE, video.width // VAE_STRIDE


def pixel_size(height: int, width: int) -> tuple[int, int]:
    """Return the height and width in pixels of latents with this height and width."""
    return height * VAE_STRIDE, width * VAE_STRIDE


def num_pixel_frames(num_latent_frames: int) -> int:
    """Return the number of pixel frames T = 4 (F - 1) + 1 that F latent frames decode to."""
    return TEMPORAL_STRIDE * (num_latent_frames - 1) + 1


def overlap_pixel_frames(rollout: RolloutConfig) -> int:
    """Return the last pixel frames of a rollout that are kept for the next one; 0 for a single rollout."""
    return num_pixel_frames(rollout.overlap_frames) if rollout.num_rollouts > 1 else 0


def tokens_per_frame(video: VideoConfig, patch_size: Sequence[int]) -> int:
    """Return the DiT's tokens per latent frame. `patch_size` is (time, height, width)."""
    height, width = latent_size(video)
    return (height // patch_size[1]) * (width // patch_size[2])


def frames_per_block(rollout: RolloutConfig, num_frames: int) -> int:
    """Return the latent frames per block of a video of `num_frames` frames. A bidirectional video is one block."""
    return num_frames if rollout.schedule == "bidirectional" else rollout.block_frames


def block_layout(rollout: RolloutConfig, num_frames: int, prefix_frames: int = 0) -> BlockLayout:
    """Return the frames of each block of a video of `num_frames` latent frames, of which a prefix fills the first."""
    independent = rollout.independent_first_frame and rollout.schedule != "bidirectional"
    return BlockLayout(frames_per_block(rollout, num_frames), prefix_frames, num_frames, independent)


def describe_blocks(rollout: RolloutConfig) -> str:
    """Return a phrase for messages, such as "blocks of 3"."""
    return f"{'a first frame and ' * rollout.independent_first_frame}blocks of {rollout.block_frames}"


def context_frames(rollout: RolloutConfig, num_frames: int) -> tuple[int, int]:
    """Return (context frames that a cache holds, sink frames among them) for a video of `num_frames` latent frames."""
    window = min(rollout.window or num_frames, num_frames)
    context = max(0, window - frames_per_block(rollout, num_frames))
    return context, min(rollout.sink, context)


def check_size(config: Config, transformer: Mapping[str, Any]) -> None:
    """Check that the video size is a multiple of VAE stride times patch size. No weights are loaded.

    Args:
        transformer: the generator's network configuration.

    Raises:
        UserError: with the nearest sizes that work.
    """
    patch = transformer.get("patch_size", (1, 2, 2))
    stride = math.lcm(*(VAE_STRIDE * p for p in patch[1:]))
    for key in ("height", "width"):
        size = getattr(config.video, key)
        if size % stride:
            nearest = " or ".join(str(n) for n in (size // stride * stride, -(-size // stride) * stride) if n)
            raise UserError(f"--{key} {size} is not a multiple of {stride} (VAE and patches); the nearest: {nearest}")


# ---- Networks ----


def load_network(config: Config, device: torch.device, fall_back: bool = True) -> CausalWanModel:
    """Load the causal generator that `config.model` names, and prepare it; see `prepare_network`."""
    check_precision(config, device)
    return prepare_network(load_weights(config), config, device, fall_back)


def check_precision(config: Config, device: torch.device) -> None:
    """Check that a device supports the 8-bit types of a configuration. No weights are loaded.

    Raises:
        UserError: naming the types that work.
    """
    check_quantization(config.model.quantization, device)
    if config.rollout.cache_dtype == "float8_e4m3fn" and device.type == "mps":
        raise UserError("rollout.cache_dtype=float8_e4m3fn does not run on mps; use int8")


def load_weights(config: Config) -> CausalWanModel:
    """Load the causal generator that `config.model` names to the CPU, with its LoRA merged.

    Raises:
        UserError: for missing or broken files.
    """
    model = config.model
    directory = ModelDirectory.open(model.base)
    weights, dtype = model.generator or None, DTYPES[model.dtype]
    net = directory.load_transformer(CausalWanModel, dtype, weights=weights, use_ema=model.use_ema)
    if model.lora:
        fuse_lora(net, model.lora, model.lora_scale)
    return net


def prepare_network(
    net: CausalWanModel, config: Config, device: torch.device, fall_back: bool = True
) -> CausalWanModel:
    """Move a generator to its device, freeze it, and apply quantization, attention backend and compilation.

    With `model.offload=all`, the weights of the layers stay on the CPU, and the layers are not compiled.

    Args:
        fall_back: see `CausalWanModel.compile_layers`.

    Raises:
        UserError: for an attention backend that is not available.
    """
    net.eval().requires_grad_(False)
    if config.model.quantization != "none":
        quantize_layers_(net, net.layers, config.model.quantization, device)
    streamed = config.model.offload == "all" and device.type != "cpu"
    if streamed:
        stream_weights_(net, net.layers, device)
    else:
        net.to(device)
    choose_attention_backend(net, config.model.attention_backend, device)
    if not streamed:
        net.prepare_inference()
    if compiles(config.model.compile, device) and not streamed:
        keep_compiled_code(announce=rank() == 0)
        net.compile_layers(fall_back)
    if config.model.cuda_graphs and device.type == "cuda" and not streamed:
        use_cuda_graphs(net)
    return net


def load_embeddings(config: Config, device: torch.device, capacity: int | None = None) -> EmbeddingCache:
    """Load the text encoder of `config.model.base`, wrapped in a cache of its embeddings.

    Args:
        capacity: embeddings to keep in memory; None for all of them.

    Raises:
        UserError: for missing or broken files.
    """
    model = config.model
    directory, dtype = ModelDirectory.open(model.base), DTYPES[model.dtype]
    return EmbeddingCache.load(directory, dtype, model.text_length, model.text_cache, capacity).to(device)


def load_vae(config: Config, device: torch.device) -> WanVAE:
    """Load the VAE of `config.model.base`, with the decoder of `config.model.decoder`. Only CUDA compiles the decoder.

    Raises:
        UserError: for missing or broken files, or a tiny decoder for other latents.
    """
    model = config.model
    vae = WanVAE(ModelDirectory.open(model.base).load_vae(DTYPES[model.dtype]), max_frames=model.decode_frames)
    if model.decoder == "tiny":
        vae.decoder = load_tiny_decoder(model.tiny_decoder, vae, DTYPES[model.dtype])
    if device.type == "cuda" and compiles(model.compile, device):
        vae.compile_decoder()
    return vae.to(device)


def choose_attention_backend(
    net: AttentionMixin, name: str, device: torch.device | None = None, dtype: torch.dtype | None = None
) -> None:
    """Select one of diffusers' attention backends for all layers of a network.

    Args:
        name: `auto` selects the fastest one of the device; see `fastest_backend`.
        device: where the network will run; default: where it is.
        dtype: of the computation; default: the network's. For a network in training mode, the backend must have a
            backward pass.

    Raises:
        UserError: for an unknown backend, one that runs downloaded code, or one whose package is not installed.
    """
    if name == "auto":
        head_dim = net.config["attention_head_dim"]  # type: ignore[attr-defined]
        name = fastest_backend(device or net.device, dtype or net.dtype, head_dim, net.training)  # type: ignore
    if name == "native":
        return
    if name.endswith("_hub"):
        raise UserError(f"model.attention_backend={name} would download code and run it; choose an installed backend")
    try:
        with attention_backend():  # restores the default of all other networks
            net.set_attention_backend(name)
    except (ValueError, RuntimeError, ImportError) as error:
        raise UserError(f"model.attention_backend={name}: {str(error).splitlines()[0]}") from None


# ---- Schedule and rollout ----


def rollout_sigmas(rollout: RolloutConfig) -> list[float]:
    """Return the S + 1 sigmas of a rollout, from the first step's input down to 0.

    Video-to-video scales all levels by its strength, so it has as many steps as text-to-video (docs/v2v.md compares
    this with a start in the middle of the list).
    """
    if rollout.num_steps:
        sigmas = solver_sigmas(rollout.num_steps, rollout.timestep_shift)
    else:
        sigmas = step_sigmas(rollout.denoising_step_list, rollout.warp_denoising_step, rollout.timestep_shift)
    return [rollout.strength * sigma for sigma in sigmas]


def nearest_lengths(
    rollout: RolloutConfig, num_frames: int, prefix_frames: int, short_last_block: bool = False
) -> list[int]:
    """Return an empty list if a video can have this length; else the nearest lengths that work, in latent frames.

    The generated frames must fill whole blocks. After a prefix, or with `short_last_block`, the last block may be
    short.
    """
    layout = block_layout(rollout, num_frames, prefix_frames)
    block, generated = layout.block_frames, num_frames - prefix_frames
    if generated > 0 and (layout.is_whole or prefix_frames or short_last_block):
        return []
    first = int(layout.independent_first_frame and not prefix_frames)
    lower = prefix_frames + first + max(1 - first, (generated - first) // block) * block
    return list(dict.fromkeys([lower, lower + block]))


def build_schedule(
    rollout: RolloutConfig, num_frames: int, prefix_frames: int = 0, short_last_block: bool = False
) -> Schedule:
    """Build the schedule of a video of `num_frames` latent frames, of which the prefix fills `prefix_frames`.

    Args:
        short_last_block: allow a short last block without a prefix, for video-to-video.

    Raises:
        UserError: if the frames do not fill whole blocks, with the nearest lengths that work. After a prefix, the last
            block may be short. Also for a bidirectional schedule with a prefix.
    """
    layout = block_layout(rollout, num_frames, prefix_frames)
    if prefix_frames:
        check_causal(rollout)
    if lengths := nearest_lengths(rollout, num_frames, prefix_frames, short_last_block):
        after = f" after a prefix of {prefix_frames}" if prefix_frames else ""
        raise UserError(
            f"{num_frames} latent frames{after} cannot be divided into {describe_blocks(rollout)}; "
            f"the nearest valid --num_output_frames: {' or '.join(map(str, lengths))}"
        )
    try:
        return Schedule(
            num_steps=len(rollout_sigmas(rollout)) - 1,
            num_blocks=layout.num_blocks,
            method="timestep_first" if rollout.schedule == "timestep_first" else "block_first",
            context=rollout.context,
            leading_blocks=rollout.leading_blocks,
            leading_steps=rollout.leading_steps,
            prefix_blocks=layout.prefix_blocks,
            context_noise=rollout.context_noise,
            write_frames=rollout.write_window or None,
        )
    except ValueError as error:
        raise UserError(f"rollout: {error}") from None


def check_causal(rollout: RolloutConfig) -> None:
    """Check that videos of this schedule can continue a prefix.

    Raises:
        UserError: for a bidirectional schedule.
    """
    if rollout.schedule == "bidirectional":
        raise UserError(
            "rollout.schedule=bidirectional cannot continue an image or a clip: the network has one noise level per "
            "video; use block_first or timestep_first with a causal generator"
        )


def build_rollout(
    config: Config,
    denoiser: Denoiser | GuidedDenoiser,
    samples: Sequence[int],
    *,
    prefix: Tensor | None = None,
    noise_offset: int = 0,
    source: Iterator[Tensor] | None = None,
    num_frames: int | None = None,
    size: tuple[int, int] | None = None,
    dtype: torch.dtype | None = None,
    history_frames: int = 0,
    rollout_class: type[AnyRollout] = Rollout,  # type: ignore[assignment]
    **options: Any,
) -> AnyRollout:
    """Assemble a rollout of `config.rollout`. Its noise is keyed by `config.runtime.seed` and the sample numbers.

    Args:
        samples: the sample number of each video of the batch.
        prefix: clean latents [1 or B, F, C, h, w] that the videos continue.
        noise_offset: added to block numbers in the keys of noise; earlier rollouts of the video use lower numbers.
        source: latents [1, 1, C, h, w] of each frame of the clip that video-to-video starts from.
        num_frames: latent frames of the video, prefix included; default: `config.video.num_output_frames`.
        size: height and width of the latents; default: those of `config.video`.
        dtype: dtype of the cached keys and values; default: that of `config.rollout.cache_dtype`.
        history_frames: evicted frames that a cache keeps for `TrainingRollout.replay`.
        rollout_class: `Rollout`, `TrainingRollout` or `StageRollout`.
        options: further arguments of `rollout_class`. They replace arguments that this function computes.
    """
    net, rollout, device = denoiser.net, config.rollout, denoiser.net.device
    length = num_frames or config.video.num_output_frames
    layout = block_layout(rollout, length, 0 if prefix is None else prefix.shape[1])
    if config.video.source:
        length = layout.start(layout.num_blocks)  # a short last block attends to as many frames as the others
    elif layout.is_whole:  # all blocks are, so the layout has no end
        layout = replace(layout, num_frames=None)
    height, width = size or latent_size(config.video)
    context, sink = context_frames(rollout, length)
    cache_dtype = dtype or CACHE_DTYPES.get(rollout.cache_dtype, DTYPES[config.model.dtype])

    def noise(block: int, step: int) -> Tensor:
        shape = (layout.frames(block), net.config.in_channels, height, width)
        key = block + noise_offset, step
        drawn = torch.stack([keyed_noise(config.runtime.seed, sample, *key, shape) for sample in samples])
        if device.type == "cuda":  # a copy from pinned memory is queued, so the host does not wait for the GPU
            drawn = drawn.pin_memory()
        return drawn.to(device, non_blocking=True)

    def empty_cache() -> KVCache | None:
        if rollout.schedule == "bidirectional":
            return None
        sizes = len(samples), height, width, context, rollout.block_frames, sink, history_frames
        return net.new_cache(*sizes, cache_dtype, rollout.moving_sink)

    def new_cache() -> KVCache | GuidedCache | None:
        return GuidedCache(empty_cache(), empty_cache()) if isinstance(denoiser, GuidedDenoiser) else empty_cache()

    def source_block(block: int) -> Tensor:
        assert source is not None
        frames = list(itertools.islice(source, layout.frames(block)))
        if len(frames) < layout.frames(block):
            raise UserError(f"{config.video.source} ends within block {block}: it changed while it was read")
        return torch.cat(frames, dim=1).to(device, non_blocking=True).expand(len(samples), -1, -1, -1, -1)

    if prefix is not None:
        prefix = prefix.to(device, torch.float32).expand(len(samples), -1, -1, -1, -1)
    arguments: dict[str, Any] = {
        "denoiser": denoiser,
        "sigmas": rollout_sigmas(rollout),
        "noise": noise,
        "new_cache": new_cache,
        "layout": layout,
        "prefix": prefix,
        "source": None if source is None else source_block,
        "deterministic": rollout.use_ode_trajectory,
        "retained_frames": context if options.get("denoiser_at") and rollout.prompt_switch == "recache" else 0,
    }
    return rollout_class(**arguments | options)
