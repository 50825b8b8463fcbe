"""Benchmark of the streaming VAE decoder."""

import torch
from diffusers import AutoencoderKLWan

from benchmark.measure import Measurement, Repeats, Results, counted_flops, durations, peak_memory, reset_peak_memory
from benchmark.networks import BenchmarkNetworks
from model.vae import WanVAE


def measure_decoder(networks: BenchmarkNetworks, repeats: Repeats, peak_flops: float) -> Results:
    """Measure the decoding of one block. The first block is not timed, because it has fewer pixel frames.

    Args:
        peak_flops: FLOP/s of a large matrix product.
    """
    config, device, vae = networks.config, networks.device, networks.vae()
    frames = config.rollout.block_frames
    latents = torch.randn(1, frames, *vae.latent_shape(config.video.height, config.video.width), device=device)
    stream = vae.stream()
    stream.push(latents)  # the first block decodes to fewer frames
    reset_peak_memory(device)
    times = durations(lambda: stream.push(latents), device, repeats)
    memory = peak_memory(device)
    flops = counted_flops(lambda: stream.push(latents)) if vae.decoder is not None else _wan_flops(vae, latents)
    pixel_frames = frames * vae.temporal_stride
    return {
        "block": Measurement.of(times),
        "pixel_frame": Measurement.of(t / pixel_frames for t in times),
        "fps_decode": Measurement.of(pixel_frames / t for t in times),
        "peak_memory": memory,
        "flops": flops,
        "share_of_peak": flops / Measurement.of(times).median / peak_flops,
    }


def _wan_flops(vae: WanVAE, latents: torch.Tensor) -> int:
    """Return the operations of Wan's decoder for a block, counted on the meta device, where nothing is computed."""
    with torch.device("meta"):
        stream = WanVAE(AutoencoderKLWan.from_config(vae.net.config)).stream()
    stream.push(latents.to("meta"))
    return counted_flops(lambda: stream.push(latents.to("meta")))
