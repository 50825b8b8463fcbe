"""Benchmark of single forward passes of the DiT, without a whole rollout."""

from collections.abc import Callable, Sequence
from functools import partial

import torch

from benchmark.flops import PassFlops
from benchmark.measure import (
    Measurement,
    Repeats,
    Results,
    interleaved_durations,
    peak_memory,
    ratios,
    reset_peak_memory,
)
from benchmark.networks import PROMPT, BenchmarkNetworks
from benchmark.plain_loop import plain_config, use_plain_network
from benchmark.plain_network import PlainCache, PlainNetwork
from model.kv_cache import KVCache
from pipeline.build import latent_size
from pipeline.rollout import Rollout
from pipeline.schedule import Denoise, Op, WriteContext, WriteThenDenoise
from pipeline.text_to_video import TextToVideo

PASSES = ("denoise", "context", "context+denoise")


class Passes:
    """Executes single passes with a full window, through a `Rollout`."""

    def __init__(self, rollout: Rollout, block_frames: int, context_frames: int, rewind: Callable[[int], object]):
        """
        Args:
            context_frames: frames of a full context.
            rewind: sets the rollout's only cache to the state before a block.
        """
        block = -(-context_frames // block_frames)
        self.rollout, self.rewind = rollout, partial(rewind, block)
        write = WriteContext(block, 0, 0)
        denoise_next = WriteThenDenoise(write, Denoise(block + 1, 0, 0))
        self.ops: dict[str, Op] = {
            "denoise": Denoise(block, 0, 0), "context": write, "context+denoise": denoise_next
        }  # fmt: skip

    def execute(self, name: str) -> None:
        """Run one pass; `name` is in PASSES."""
        self.rollout.blocks.clear()
        self.rewind()
        for _ in self.rollout.run(iter([self.ops[name]]), [0]):
            pass


def measure_passes(
    networks: BenchmarkNetworks, names: Sequence[str], repeats: Repeats, peak_flops: float, plain: bool = False
) -> Results:
    """Measure passes of one block with a full window of random keys and values.

    Args:
        names: from PASSES. The results `flops` and `share_of_peak` are for the first of them.
        peak_flops: FLOP/s of a large matrix product.
        plain: also run each pass with the plain network, interleaved, for comparison.
    """
    config, device = networks.config, networks.device
    reset_peak_memory(device)
    net = networks.transformer()
    pipeline = TextToVideo(config, net, networks.random_embeddings(net), None)  # type: ignore[arg-type]
    passes, cache = full_window(pipeline)
    if plain:
        for name in names:
            passes.execute(name)  # for the measurement of memory
    results = {} if plain else _durations([passes], names, device, repeats)
    memory = peak_memory(device)
    if plain:
        results = _durations([passes, plain_full_window(pipeline)], names, device, repeats)
    full = cache.context_frames
    count = PassFlops(
        net.config, latent_size(config.video), config.rollout.block_frames, full, config.model.text_length
    )
    counts: dict[str, Callable[[int], int]] = {
        "denoise": count.denoise,
        "context": count.write,
        "context+denoise": count.write_then_denoise,
    }
    flops, first = counts[names[0]](full), results[f"{names[0]}_pass"]
    assert isinstance(first, Measurement)
    return results | {
        "flops": flops,
        "share_of_peak": flops / first.median / peak_flops,
        "peak_memory": memory,
        "parameters": sum(p.numel() for p in net.parameters()),
        "cache": cache.num_bytes,
    }


def _durations(passes: Sequence[Passes], names: Sequence[str], device: torch.device, repeats: Repeats) -> Results:
    """Return the durations of the first passes, and the comparison with the second ones if there are any."""
    results: Results = {}
    for name in names:
        own, *others = interleaved_durations([partial(p.execute, name) for p in passes], device, repeats)
        results[f"{name}_pass"] = Measurement.of(own)
        for other in others:
            results |= {f"plain_{name}_pass": Measurement.of(other), f"times_plain_{name}": ratios(other, own)}
    return results


def full_window(pipeline: TextToVideo) -> tuple[Passes, KVCache]:
    """Return the passes of a pipeline, and their cache with a full window."""
    rollout, block_frames = pipeline.rollout([PROMPT], [0]), pipeline.config.rollout.block_frames
    cache = rollout.new_cache()
    fill_cache(cache, pipeline.net.config.num_layers)
    rollout.new_cache = lambda: cache

    def rewind(block: int) -> None:
        cache.num_frames = block * block_frames

    return Passes(rollout, block_frames, cache.context_frames, rewind), cache


def plain_full_window(pipeline: TextToVideo) -> Passes:
    """Return the same passes by the plain network.

    The block of the first two passes is already in the cache, as after a block's first step, so that nothing moves. The
    joint pass is two passes, and the second of them moves the window.
    """
    config = plain_config(pipeline.config)
    pipeline = TextToVideo(config, pipeline.net, pipeline.embeddings.cache, None)  # type: ignore[arg-type]
    rollout, block_frames = pipeline.rollout([PROMPT], [0]), config.rollout.block_frames
    use_plain_network(rollout, PlainNetwork.sharing(pipeline.net), pipeline, [PROMPT])
    cache: PlainCache = rollout.new_cache()
    rollout.new_cache = lambda: cache
    for layer in cache.layers:
        for name in ("k", "v"):
            layer[name].normal_()

    def rewind(block: int) -> None:
        for layer in cache.layers:
            layer["global_end"].fill_((block + 1) * block_frames * cache.tokens_per_frame)
            layer["local_end"].fill_(layer["k"].shape[1])

    return Passes(rollout, block_frames, cache.frames - block_frames, rewind)


def fill_cache(cache: KVCache, num_layers: int) -> None:
    """Fill the window of a new cache with random keys and values."""
    cache.commit(cache.context_frames)
    for layer in range(num_layers):
        for context in cache.read(layer):  # views, because the slots of a window filled once are contiguous
            context.normal_()
