"""Benchmark of training: iterations of score distillation by the trainer, on random ODE pairs."""

import tempfile
import time
from pathlib import Path

import torch
from tqdm import tqdm

from benchmark.measure import Measurement, Results, counted_flops, peak_memory
from benchmark.networks import PROMPT
from benchmark.process import run_in_process
from model.weights import ModelDirectory
from pipeline.build import latent_size
from trainer.datasets.ode_pairs import pair_file, write_ode_pair, write_sigmas
from trainer.objectives import build_objective
from trainer.trainer import Trainer
from utils.config import Config
from utils.device import pick_device
from utils.process_group import process_group


def measure_training(config: Config, iterations: int, peak_flops: float) -> Results:
    """Measure training in a separate process, so that the peak memory is that of training alone.

    Args:
        iterations: number of timed iterations.
        peak_flops: FLOP/s of a large matrix product.

    Returns:
        `critic_iteration` and `generator_iteration`: seconds; an iteration with the generator updates both networks.
        `iterations_per_second`: over all timed iterations.
        `critic_memory` and `peak_memory`: peak bytes before the first update of the generator, and of the whole run.
        `flops` and `share_of_peak`: those of an iteration with the generator.
    """
    results = run_in_process(_train, config, iterations)
    flops, seconds = results["flops"], results["generator_iteration"]
    assert isinstance(flops, int) and isinstance(seconds, Measurement)
    return results | {"share_of_peak": flops / seconds.median / peak_flops}


def _train(config: Config, iterations: int) -> Results:
    device = pick_device(config.runtime.device, config.runtime.threads)
    every = config.distill.generator_every
    with tempfile.TemporaryDirectory() as folder, process_group(device):
        write_random_data(config, Path(folder) / "data")
        trainer = Trainer(config, build_objective(config, device), f"{folder}/run")
        # Iteration 0 updates the generator. Start after it, to measure the memory of the critic's iterations alone.
        trainer.iteration = 1
        critic_memory = None
        times: dict[bool, list[float]] = {False: [], True: []}
        for number in tqdm(range(every + iterations), desc="iterations", leave=False, disable=None):
            updates_generator = "generator" in trainer.objective.networks_to_update(trainer.iteration)
            if updates_generator and number and critic_memory is None:
                critic_memory = peak_memory(device)
            start = time.perf_counter()
            trainer.step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if number >= every:  # by now, each network has been updated and, if configured, compiled
                times[updates_generator].append(time.perf_counter() - start)
            trainer.iteration += 1
        memory = peak_memory(device)
        trainer.iteration = every
        flops = counted_flops(trainer.step)
    total = sum(times[False]) + sum(times[True])
    return {
        "critic_iteration": Measurement.of(times[False]) if times[False] else None,
        "generator_iteration": Measurement.of(times[True]),
        "iterations_per_second": iterations / total,
        "critic_memory": critic_memory,
        "peak_memory": memory,
        "flops": flops,
    }


def write_random_data(config: Config, folder: Path) -> None:
    """Write random ODE pairs and a prompt file, and set their paths in `config`."""
    folder.mkdir()
    channels = ModelDirectory.open(config.model.base).transformer_config()["in_channels"]
    size = latent_size(config.video)
    points = config.distill.forward_kl_steps + 1
    for index in range(4):
        trajectory = torch.randn(points, config.data.num_frames, channels, *size)
        write_ode_pair(pair_file(folder, index), f"{PROMPT} {index}", trajectory)
    write_sigmas(folder, [1 - index / points for index in range(points)])
    prompts = folder / "prompts.txt"
    prompts.write_text("".join(f"{PROMPT} {index}\n" for index in range(4)))
    config.data.path, config.data.prompts, config.data.sigmas = str(folder), str(prompts), []
