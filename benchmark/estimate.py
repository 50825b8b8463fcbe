"""Estimate of the speed on a GPU from counts of kernels, operations and bytes. It is no measurement."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from benchmark.report import Row
from utils.tables import markdown_table


class Gpu(NamedTuple):
    """Rates that a GPU reaches in practice."""

    flops: float
    """Floating-point operations per second of matrix products, convolutions and attention in bfloat16."""
    bandwidth: float
    """Bytes per second of elementwise kernels: 85% of the memory's bandwidth."""
    gap: float = 1e-6
    """Seconds between two kernels."""
    launch: float = 5e-6
    """Seconds of the host per kernel. The host works ahead, so this counts only if it takes longer than the GPU."""


GPUS = {"H100": Gpu(600e12, 0.85 * 3.35e12), "H200": Gpu(600e12, 0.85 * 4.8e12)}
BLOCK_PIXEL_FRAMES = 12
PASSES_PER_BLOCK = {  # of four steps, with rollout.fuse_context
    "block_first": {"denoise": 3, "context+denoise": 1},
    "timestep_first": {"context+denoise": 4},
}


class Estimate(NamedTuple):
    """Seconds of one unit of work."""

    math: float
    elementwise: float
    gaps: float
    host: float

    @property
    def total(self) -> float:
        """Time on the GPU, or of the host if it is longer."""
        return max(self.math + self.elementwise + self.gaps, self.host)


def estimate(figures: Mapping[str, Any], gpu: Gpu) -> Estimate:
    """Return the estimate of a row of `--what kernels`."""
    kernels = figures["kernels"]
    return Estimate(
        figures["flops"] / gpu.flops,
        figures["elementwise_bytes"] / gpu.bandwidth,
        kernels * gpu.gap,
        kernels * gpu.launch,
    )


def estimate_report(rows: Sequence[Row], gpu: Gpu) -> str:
    """Return Markdown tables: milliseconds of each pass and of decoding, and frames per second of the schedules.

    Args:
        rows: results of `scripts/benchmark.py --what kernels`.
    """
    estimates: dict[str, dict[str, Estimate]] = {}
    for row in rows:
        if row["what"] == "kernels" and row["figures"]:
            group = estimates.setdefault(row["settings"].get("compile", "off"), {})
            group[row["settings"]["work"]] = estimate(row["figures"], gpu)
    table = [["compile", "work", "math, ms", "elementwise, ms", "gaps, ms", "total, ms"]]
    for compiled, group in estimates.items():
        for work, seconds in group.items():
            parts = (seconds.math, seconds.elementwise, seconds.gaps, seconds.total)
            table.append([compiled, work, *(f"{1e3 * part:.1f}" for part in parts)])
    return "\n".join([markdown_table(table), "", markdown_table(_speeds(estimates))])


def _speeds(estimates: Mapping[str, Mapping[str, Estimate]]) -> list[list[str]]:
    table = [["compile", "schedule", "block, ms", "FPS, rollout", "FPS with decoding"]]
    decoders = [group["decoder"].total for group in estimates.values() if "decoder" in group]
    for compiled, group in estimates.items():
        decoder = group["decoder"].total if "decoder" in group else next(iter(decoders), None)
        for schedule, passes in PASSES_PER_BLOCK.items():
            if passes.keys() <= group.keys():
                block = sum(count * group[name].total for name, count in passes.items())
                both = "-" if decoder is None else f"{BLOCK_PIXEL_FRAMES / (block + decoder):.1f}"
                speed = f"{BLOCK_PIXEL_FRAMES / block:.1f}"
                table.append([compiled, schedule, f"{1e3 * block:.0f}", speed, both])
    return table
