"""What benchmarks measure of training: iterations of score distillation, by the trainer, on random ODE pairs."""

import multiprocessing
import signal
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from tqdm import tqdm

from benchmark.inference import PROMPT
from benchmark.measure import Figures, Spread, counted_flops, peak_memory
from model.weights import ModelDirectory
from pipeline.build import latent_size
from trainer.datasets.ode_pairs import pair_file, write_ode_pair, write_sigmas
from trainer.objectives import build_objective
from trainer.trainer import Trainer
from utils.config import Config
from utils.device import pick_device
from utils.errors import UserError
from utils.process_group import process_group


def measure_training(config: Config, iterations: int, peak_flops: float) -> Figures:
    """In a process of its own, whose peak memory is then this training's alone.

    Figures: `critic_iteration` and `generator_iteration` (which updates both) in seconds, `iterations_per_second` over
    all; `critic_memory` and `peak_memory` in bytes, before and with the first update of the generator.
    """
    figures = in_own_process(_train, config, iterations)
    flops, seconds = figures["flops"], figures["generator_iteration"]
    assert isinstance(flops, int) and isinstance(seconds, Spread)
    return figures | {"share_of_peak": flops / seconds.median / peak_flops}


def _train(config: Config, iterations: int) -> Figures:
    device = pick_device(config.runtime.device)
    every = config.distill.generator_every
    with tempfile.TemporaryDirectory() as folder, process_group(device):
        write_data(config, Path(folder) / "data")
        trainer = Trainer(config, build_objective(config, device), f"{folder}/run")
        # Iteration 0 is the generator's: begin behind it, so that memory without and with it can be told apart.
        trainer.iteration = 1
        critic_memory = None
        times: dict[bool, list[float]] = {False: [], True: []}
        for number in tqdm(range(every + iterations), desc="iterations", leave=False, disable=None):
            generator = "generator" in trainer.objective.networks_to_update(trainer.iteration)
            if generator and number and critic_memory is None:
                critic_memory = peak_memory(device)
            started = time.perf_counter()
            trainer.step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if number >= every:  # one update of each net, compiled now if so configured
                times[generator].append(time.perf_counter() - started)
            trainer.iteration += 1
        memory = peak_memory(device)
        trainer.iteration = every
        flops = counted_flops(trainer.step)
    total = sum(times[False]) + sum(times[True])
    return {
        "critic_iteration": Spread.of(times[False]) if times[False] else None,
        "generator_iteration": Spread.of(times[True]),
        "iterations_per_second": iterations / total,
        "critic_memory": critic_memory,
        "peak_memory": memory,
        "flops": flops,
    }


def write_data(config: Config, folder: Path) -> None:
    """Random ODE pairs and a file of prompts, which `config` then names."""
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


# ---- A process of its own ----


def in_own_process(work: Callable[..., Figures], *arguments: object) -> Figures:
    """What `work(*arguments)` returns in a fresh process.

    Raises:
        UserError: its own, or if it was killed.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(there, work, arguments), daemon=True)
    process.start()
    there.close()
    try:
        result = here.recv()
    except EOFError:
        process.join()
        raise UserError(
            f"the training process ended with code {process.exitcode}; -9 is mostly want of memory: train less at once"
        ) from None
    process.join()
    if isinstance(result, UserError):
        raise result
    return result


def _send(connection: Connection, work: Callable[..., Figures], arguments: tuple) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the parent, and that this process
    try:
        connection.send(work(*arguments))
    except UserError as error:
        connection.send(error)
