"""Counts of the kernels of a configuration's passes and of its decoder, at full size and without a GPU."""

import contextlib
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial

import torch
from diffusers import AutoencoderKLWan

from benchmark.fake_cuda import DEVICE, fake_cuda
from benchmark.inductor_kernels import inductor_counts
from benchmark.kernels import KernelCounter
from benchmark.measure import Results
from benchmark.networks import PROMPT, BenchmarkNetworks, RandomTextEncoder
from benchmark.passes import full_window
from model.causal_wan import CausalWanModel
from model.compilation import compiles
from model.embeddings import EmbeddingCache
from model.presets import random_network
from model.vae import WanVAE
from pipeline.build import prepare_network
from pipeline.text_to_video import TextToVideo
from utils.config import Config


def count_kernels(networks: BenchmarkNetworks, work: str) -> Results:
    """Count the kernels of one pass with a full window, or of the decoding of a block after the first.

    The code runs twice, and the second run counts: compilation and tables that are kept come before it. The decoder is
    not compiled. Attention is counted as FlashAttention, whatever `model.attention_backend` is.

    Args:
        work: from KERNEL_ROWS.
    """
    config = networks.config
    config = replace(config, model=replace(config.model, attention_backend="native"))
    transformer, vae = networks.sizes()
    embeddings = EmbeddingCache(RandomTextEncoder(config.model.text_length, transformer["text_dim"]))
    embeddings.prepare([PROMPT])  # before the tensors are fake, because it checks the values
    compiled = compiles(config.model.compile, DEVICE)
    with inductor_counts() if compiled else contextlib.nullcontext(), fake_cuda() as device:
        if work == "decoder":
            run = _decoder(WanVAE(random_network(AutoencoderKLWan, vae, networks.dtype, device)), config, device)
        else:
            net = random_network(CausalWanModel, transformer, networks.dtype, device)
            net = prepare_network(net, config, device, fall_back=False)
            passes, _ = full_window(TextToVideo(config, net, embeddings, None))  # type: ignore[arg-type]
            run = partial(passes.execute, work)
        run()
        with KernelCounter() as counter:
            run()
    return dict(asdict(counter.count))


def _decoder(vae: WanVAE, config: Config, device: torch.device) -> Callable[[], object]:
    """Return a function that decodes one block, after the first frames of a video."""
    frames, video = config.rollout.block_frames, config.video
    latents = torch.randn(1, frames, *vae.latent_shape(video.height, video.width), device=device)
    stream = vae.stream()
    stream.push(latents)
    return partial(stream.push, latents)
