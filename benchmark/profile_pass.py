"""Profile of one pass of the DiT: its kernels by time, and a trace for a browser."""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmark.networks import BenchmarkNetworks
from benchmark.passes import full_window
from pipeline.text_to_video import TextToVideo
from utils.tables import markdown_table


def profile_pass(networks: BenchmarkNetworks, name: str, trace: Path, rows: int = 25) -> str:
    """Profile one pass with a full window, after two others; write a Chrome trace.

    Args:
        name: from PASSES.
        trace: JSON file for chrome://tracing or ui.perfetto.dev.
        rows: rows of the table.

    Returns:
        A Markdown table of the kernels (on a CPU: the operators) with the longest times, and their total.
    """
    net = networks.transformer()
    pipeline = TextToVideo(networks.config, net, networks.random_embeddings(net), None)  # type: ignore[arg-type]
    passes, _ = full_window(pipeline)
    is_gpu = networks.device.type == "cuda"
    for _ in range(2):
        passes.execute(name)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_gpu else [])]
    with profile(activities=activities) as profiler:
        passes.execute(name)
        if is_gpu:
            torch.cuda.synchronize(networks.device)
    profiler.export_chrome_trace(str(trace))

    events = list(profiler.key_averages())
    if is_gpu:
        events = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    times = {event.key: (event.self_device_time_total if is_gpu else event.self_cpu_time_total) for event in events}
    events.sort(key=lambda event: times[event.key], reverse=True)
    total = sum(times.values())
    table = [["kernel" if is_gpu else "operator", "calls", "ms", "share"]]
    for event in events[:rows]:
        microseconds = times[event.key]
        table.append(
            [f"`{event.key[:80]}`", str(event.count), f"{microseconds / 1e3:.3f}", f"{microseconds / total:.1%}"]
        )
    calls = sum(event.count for event in events)
    return f"{name} pass: {calls} calls, {total / 1e3:.2f} ms\n\n{markdown_table(table)}"
