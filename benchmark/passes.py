"""Benchmark of single forward passes of the DiT, without a whole rollout."""

from collections.abc import Callable, Sequence
from functools import partial

from benchmark.flops import PassFlops
from benchmark.measure import Measurement, Repeats, Results, durations, peak_memory, reset_peak_memory
from benchmark.networks import PROMPT, BenchmarkNetworks
from model.kv_cache import KVCache
from pipeline.build import latent_size
from pipeline.schedule import Denoise, Op, WriteContext, WriteThenDenoise
from pipeline.text_to_video import TextToVideo

PASSES = ("denoise", "context", "context+denoise")


def measure_passes(networks: BenchmarkNetworks, names: Sequence[str], repeats: Repeats, peak_flops: float) -> Results:
    """Measure passes of one block with a full window of random keys and values, executed by a `Rollout`.

    Args:
        names: from PASSES. The results `flops` and `share_of_peak` are for the first of them.
        peak_flops: FLOP/s of a large matrix product.
    """
    config, device = networks.config, networks.device
    reset_peak_memory(device)
    net = networks.transformer()
    pipeline = TextToVideo(config, net, networks.random_embeddings(net), None)  # type: ignore[arg-type]
    rollout = pipeline.rollout([PROMPT], [0])
    block_frames = config.rollout.block_frames
    cache = rollout.new_cache()
    fill_cache(cache, net.config.num_layers)
    rollout.new_cache = lambda: cache
    block = -(-cache.context_frames // block_frames)
    ops: dict[str, Op] = {
        "denoise": Denoise(block, 0, 0),
        "context": WriteContext(block, 0, 0),
        "context+denoise": WriteThenDenoise(WriteContext(block, 0, 0), Denoise(block + 1, 0, 0)),
    }

    def execute(name: str) -> None:
        rollout.blocks.clear()
        cache.num_frames = block * block_frames
        for _ in rollout.run(iter([ops[name]]), [0]):
            pass

    results: Results = {
        f"{name}_pass": Measurement.of(durations(partial(execute, name), device, repeats)) for name in names
    }
    full = cache.context_frames
    count = PassFlops(net.config, latent_size(config.video), block_frames, full, config.model.text_length)
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
        "peak_memory": peak_memory(device),
        "parameters": sum(p.numel() for p in net.parameters()),
        "cache": cache.num_bytes,
    }


def fill_cache(cache: KVCache, num_layers: int) -> None:
    """Fill the window of a new cache with random keys and values."""
    cache.commit(cache.context_frames)
    for layer in range(num_layers):
        for context in cache.read(layer):  # views, because the slots of a window filled once are contiguous
            context.normal_()
