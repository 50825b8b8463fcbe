"""Runs one case of a benchmark."""

import sys
from collections.abc import Sequence

import torch
from torch._dynamo.exc import TorchDynamoException
from tqdm import tqdm

from benchmark.cases import Case
from benchmark.decoder import measure_decoder
from benchmark.full_size import count_kernels
from benchmark.measure import Repeats, Results
from benchmark.networks import BenchmarkNetworks
from benchmark.passes import PASSES, measure_passes
from benchmark.rollout import RolloutBenchmark, measure_rollout
from benchmark.text_encoder import measure_text_encoder
from benchmark.training import measure_training
from model.compilation import compile_failure
from utils.device import pick_device


def check_cases(cases: Sequence[Case], random: str) -> tuple[torch.device, list[str]]:
    """Check that all cases can run; return their device, and lines that name their attention kernels.

    Counts of kernels alone need no device but the CPU.

    Args:
        random: see `BenchmarkNetworks`.

    Raises:
        UserError: see `BenchmarkNetworks.check` and `pick_device`.
    """
    runtime, kernels_only = cases[0].config.runtime, all(case.kind == "kernels" for case in cases)
    device = pick_device("cpu" if kernels_only else runtime.device, runtime.threads)
    checked = {repr(case.config): case for case in cases if case.kind != "training"}
    networks = [BenchmarkNetworks(case.config, device, random) for case in checked.values()]
    lines = [net.check(backend=not kernels_only) for net in networks]
    return device, [line for line in dict.fromkeys(lines) if line]


def run_case(
    case: Case,
    networks: BenchmarkNetworks,
    repeats: Repeats,
    peak_flops: float,
    passes: Sequence[str] | None,
    iterations: int,
    plain: bool = True,
) -> Results:
    """Return the results of a case. If memory runs out or compilation fails, print a note and return no results.

    Args:
        peak_flops: FLOP/s of a large matrix product.
        passes: from PASSES; only for a case of kind `pass`. None: all.
        iterations: timed iterations; only for a case of kind `training`.
        plain: compare passes and rollouts with those of the plain loop.
    """
    torch.compiler.reset()  # torch stops compiling a function after a few variants
    try:
        if case.kind in ("rollout", "baseline"):
            return _run_rollouts(case, networks, repeats, peak_flops, plain)
        if case.kind == "pass":
            return measure_passes(networks, passes or PASSES, repeats, peak_flops, plain)
        if case.kind == "kernels":
            return count_kernels(networks, case.settings["work"])
        if case.kind == "training":
            return measure_training(case.config, iterations, peak_flops)
        measure = measure_decoder if case.kind == "decoder" else measure_text_encoder
        return measure(networks, repeats, peak_flops)
    except torch.OutOfMemoryError:
        reason = "out of memory"
    except TorchDynamoException as error:
        reason = f"cannot be compiled ({compile_failure(error)})"
    tqdm.write(f"{reason}: {case}", file=sys.stderr)
    return {}


def _run_rollouts(case: Case, networks: BenchmarkNetworks, repeats: Repeats, peak_flops: float, plain: bool) -> Results:
    pipeline = networks.pipeline()
    is_baseline = case.kind == "baseline"
    plain = plain and not is_baseline
    kinds = 1 if is_baseline else 3 if plain else 2  # rollouts, videos, and rollouts by the plain loop
    label = " ".join(case.settings.values())
    # One more rollout counts host syncs. The plain loop has more ops if others are fused: the bar may pass its end.
    total = (repeats.total * kinds + 1) * pipeline.num_ops()
    with tqdm(total=total, desc=label, unit="op", leave=False, disable=None) as bar:
        benchmark = RolloutBenchmark(pipeline, lambda op: bar.update(), is_baseline)
        return measure_rollout(benchmark, repeats, peak_flops, benchmark.with_plain_network() if plain else None)
