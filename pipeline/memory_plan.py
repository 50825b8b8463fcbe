"""Plan the GPU memory of generation from the sizes of the networks, without loading weights.

Weights and caches are exact. Activations are measured: the real passes run on the meta device, where tensors have sizes
but no memory. Not counted: encoding a prefix or a source, repeated rollouts, and the graphs of compiled code.
"""

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch import nn
from transformers import UMT5Config, UMT5EncoderModel

from model import presets
from model.causal_wan import CausalWanModel
from model.sizes import base_config, component_config, num_parameters, on_meta, text_encoder_preset
from model.vae import WanVAE
from pipeline.batching import arrange, unbatched
from pipeline.build import build_schedule, check_size, context_frames, frames_per_block, latent_size
from utils.config import Config
from utils.device import CACHE_DTYPES, DTYPES
from utils.peak_memory import FusedAttention, PeakMemory

GB = 1e9
_CUDA_BYTES = 0.6 * GB  # CUDA's context, its libraries, and gaps between allocations
_ENCODING_BYTES = 0.2 * GB  # activations of the text encoder for a prompt of 512 tokens
_MAX_BLOCKS = 64  # the number of live caches does not depend on later blocks
_MEASURED_LAYERS = 2  # all layers use the same memory, one after the other


@dataclass(frozen=True)
class Part:
    """One use of memory in bytes, while prompts are encoded and while videos are generated."""

    label: str
    encoding: float
    generating: float


@dataclass(frozen=True)
class MemoryPlan:
    """The parts of one configuration."""

    parts: list[Part]

    @property
    def encoding(self) -> float:
        """Bytes while prompts are encoded."""
        return sum(part.encoding for part in self.parts)

    @property
    def generating(self) -> float:
        """Bytes while videos are generated."""
        return sum(part.generating for part in self.parts)

    @property
    def peak(self) -> float:
        """Largest number of bytes at a time."""
        return max(self.encoding, self.generating)

    def __str__(self) -> str:
        """Return the table as comment lines; the configuration before it stays valid YAML."""
        lines = ["# GPU memory in GB while prompts are encoded, and while videos are generated:"]
        rows = [*self.parts, Part(f"in total; the peak is {self.peak / GB:.2f} GB", self.encoding, self.generating)]
        lines += [f"# {part.encoding / GB:7.2f} {part.generating / GB:7.2f}  {part.label}" for part in rows]
        return "\n".join(lines)


def memory_plan(config: Config, batch_size: int = 1) -> MemoryPlan:
    """Return the plan of a configuration for `batch_size` videos at once.

    Raises:
        UserError: if the networks' sizes are unknown, or the video's size is impossible.
    """
    sizes = base_config(config.model.base)
    check_size(config, sizes)
    folder, net = Path(config.model.base), _network(_key(sizes))
    item, guided = DTYPES[config.model.dtype].itemsize, 1 + (config.rollout.guidance_scale != 1)
    encoder = component_config(folder / "text_encoder") or text_encoder_preset(sizes["text_dim"], folder)
    vae = component_config(folder / "vae") or presets.VAES["wan"]
    streamed, encoder_bytes = _text_encoder_bytes(_key(encoder), item)
    encoding, generating = {
        "none": (encoder_bytes, encoder_bytes),
        "text": (encoder_bytes, 0.0),
        "all": (streamed, streamed),
    }[config.model.offload]
    dtype = config.model.dtype
    height, width = latent_size(config.video)
    text_bytes = 2 * len(net.layers) * config.model.text_length * _width(net) * item * batch_size * guided
    block = frames_per_block(config.rollout, config.video.num_output_frames)
    state, working = _decoder_bytes(_key(vae), (batch_size, block, height, width), dtype, config.model.decode_frames)
    parts = [
        Part(f"text encoder: weights ({dtype})", encoding, generating),
        Part("text encoder: activations (estimate)", _ENCODING_BYTES, 0),
        Part(f"DiT: weights ({_weights_label(config)})", 0, dit_bytes(net, config)),
        _cache_part(config, net, batch_size, guided),
        Part("DiT: keys and values of the prompt", 0, text_bytes),
        Part("DiT: activations of a pass", 0, _pass_bytes(_key(sizes), _pass_key(config, batch_size))),
        Part(f"VAE: weights ({dtype})", 0, item * _vae_parameters(_key(vae))),
        Part("VAE: features that the decoder keeps between blocks", 0, state),
        Part("VAE: activations of decoding", 0, working),
        Part("CUDA (estimate)", _CUDA_BYTES, _CUDA_BYTES),
    ]
    return MemoryPlan(parts)


# ---- Weights ----


def dit_bytes(net: CausalWanModel, config: Config) -> float:
    """Return the bytes of a DiT's weights on the GPU, for `model.dtype`, `model.quantization` and `model.offload`."""
    item = DTYPES[config.model.dtype].itemsize
    linears = [module for layer in net.layers for module in layer.modules() if isinstance(module, nn.Linear)]
    quantized = config.model.quantization != "none"
    sizes = [_linear_bytes(linear, item, quantized) for linear in linears]
    others = item * (num_parameters(net) - sum(num_parameters(linear) for linear in linears))
    return others + (2 * max(sizes) if config.model.offload == "all" else sum(sizes))  # 2: a copy may overlap the next


def _linear_bytes(linear: nn.Linear, item: int, quantized: bool) -> float:
    bias = item * linear.out_features
    weight = linear.weight.numel()
    return weight + 4 * linear.out_features + bias if quantized else item * weight + bias  # 4: scales


def _weights_label(config: Config) -> str:
    model = config.model
    label = model.dtype if model.quantization == "none" else f"{model.dtype}, layers {model.quantization}"
    return label + (", two linear layers at a time" if model.offload == "all" else "")


@functools.cache
def _text_encoder_bytes(sizes: str, item: int) -> tuple[float, float]:
    """Return the bytes on the GPU if the weights are streamed, and the bytes of all weights."""
    encoder = on_meta(lambda: UMT5EncoderModel(UMT5Config.from_dict(json.loads(sizes))))
    linears = [num_parameters(module) for module in encoder.modules() if isinstance(module, nn.Linear)]
    total, table = num_parameters(encoder), num_parameters(encoder.shared)  # the token table runs on the CPU
    return item * (total - table - sum(linears) + 2 * max(linears)), item * total


# ---- Caches and activations ----


def _cache_part(config: Config, net: CausalWanModel, batch_size: int, guided: int) -> Part:
    rollout = config.rollout
    if rollout.schedule == "bidirectional":
        return Part("no KV cache", 0, 0)
    context, sink = context_frames(rollout, config.video.num_output_frames)
    dtype = CACHE_DTYPES.get(rollout.cache_dtype, DTYPES[config.model.dtype])
    with torch.device("meta"):
        sizes = batch_size, *latent_size(config.video), context, rollout.block_frames, sink
        cache = net.new_cache(*sizes, dtype=dtype)
    count = live_caches(config)[0] * guided
    name = str(dtype).removeprefix("torch.")
    return Part(f"KV caches: {count} of {context} frames and a block ({name})", 0, count * cache.num_bytes)


def live_caches(config: Config) -> tuple[int, int]:
    """Return the largest numbers of caches that are in use at a time, and of ops in one pass; see `Rollout.run`."""
    rollout, first = config.rollout, int(config.rollout.independent_first_frame)
    blocks = -(-(config.video.num_output_frames - first) // rollout.block_frames)
    schedule = build_schedule(rollout, first + rollout.block_frames * max(1, min(blocks, _MAX_BLOCKS)))
    passes = [unbatched(item) for item in arrange(schedule, rollout.order, rollout.fuse_context)]
    last_use = {op.cache: index for index, ops in enumerate(passes) for op in ops}
    live: set[int] = set()
    most = 0
    for index, ops in enumerate(passes):
        live.update(op.cache for op in ops)
        most = max(most, len(live))
        live = {cache for cache in live if last_use[cache] > index}
    return most, max(map(len, passes))


def _pass_key(config: Config, batch_size: int) -> tuple[Any, ...]:
    """Return all that the activations of a pass depend on, besides the network."""
    rollout, frames = config.rollout, config.video.num_output_frames
    context, _ = context_frames(rollout, frames)
    cached = rollout.schedule != "bidirectional"
    dtypes = config.model.dtype, rollout.cache_dtype
    block = frames_per_block(rollout, frames)
    if rollout.order == "batched" and cached:
        batch_size *= live_caches(config)[1]
    return batch_size, block, *latent_size(config.video), context if cached else None, rollout.fuse_context, dtypes


@functools.cache
@torch.no_grad()
def _pass_bytes(sizes: str, key: tuple[Any, ...]) -> int:
    """Return the peak bytes of the tensors that a pass of the DiT allocates."""
    batch_size, frames, height, width, context, fused, (dtype, cache_dtype) = key
    with torch.device("meta"):
        few_layers = json.loads(sizes) | {"num_layers": _MEASURED_LAYERS}
        net = nn.Module.to(CausalWanModel.from_config(few_layers), DTYPES[dtype])
        x = torch.empty(batch_size, net.config.in_channels, frames, height, width)
        timestep, text = torch.empty(batch_size, frames), torch.empty(batch_size, 512, net.config.text_dim)
        encoded = net.encode_text(text.to(DTYPES[dtype]))
        cache = None
        if context is not None:
            cache = net.new_cache(batch_size, height, width, context, frames, dtype=CACHE_DTYPES.get(cache_dtype))
            cache.commit(context)
        with PeakMemory() as memory, FusedAttention():
            if cache is None:
                net(x, timestep[:, 0], encoded)
            elif fused:
                both = torch.cat([x, x], dim=2), torch.cat([timestep, timestep], dim=1)
                net.write_then_denoise(*both, encoded, cache, frames, context)
            else:
                net.denoise_block(x, timestep, encoded, cache, context)
    return memory.peak


@functools.cache
@torch.no_grad()
def _decoder_bytes(sizes: str, shape: Sequence[int], dtype: str, max_frames: int) -> tuple[float, float]:
    """Return the bytes that a decoder keeps between blocks, and its further bytes while it decodes a block."""
    batch_size, frames, height, width = shape
    vae = WanVAE(nn.Module.to(_vae(sizes), DTYPES[dtype]), max_frames=max_frames)
    with torch.device("meta"):
        latents = torch.empty(batch_size, frames, vae.channels, height, width)
    with PeakMemory() as memory, FusedAttention():
        stream = vae.stream()
        stream.push(latents[:, :1])  # the first frame takes another path
        memory.peak = memory.now
        stream.push(latents)
    return memory.now, memory.peak - memory.now


@functools.cache
def _network(sizes: str) -> CausalWanModel:
    return on_meta(lambda: CausalWanModel.from_config(json.loads(sizes)))


def _vae(sizes: str) -> AutoencoderKLWan:
    return on_meta(lambda: AutoencoderKLWan.from_config(json.loads(sizes)))


@functools.cache
def _vae_parameters(sizes: str) -> int:
    return num_parameters(_vae(sizes))


def _width(net: CausalWanModel) -> int:
    return net.config.num_attention_heads * net.config.attention_head_dim


def _key(sizes: dict[str, Any]) -> str:
    """Return sizes in a form that `functools.cache` can compare."""
    return json.dumps(dict(sizes), sort_keys=True, default=list)
