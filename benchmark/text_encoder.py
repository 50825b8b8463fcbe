"""Benchmark of the text encoder."""

from benchmark.measure import Measurement, Repeats, Results, counted_flops, durations, peak_memory, reset_peak_memory
from benchmark.networks import PROMPT, BenchmarkNetworks


def measure_text_encoder(networks: BenchmarkNetworks, repeats: Repeats, peak_flops: float) -> Results:
    """Measure the encoding of one prompt.

    Args:
        peak_flops: FLOP/s of a large matrix product.
    """
    text_encoder, device = networks.text_encoder(), networks.device
    reset_peak_memory(device)
    times = Measurement.of(durations(lambda: text_encoder.encode([PROMPT]), device, repeats))
    memory = peak_memory(device)
    flops = counted_flops(lambda: text_encoder.encode([PROMPT]))
    return {
        "prompt": times,
        "peak_memory": memory,
        "flops": flops,
        "share_of_peak": flops / times.median / peak_flops,
    }
