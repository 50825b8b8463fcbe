"""Processes that run scripts/pipeline_parallel_inference.py as the ranks of one run.

All processes are forked from a server that has imported everything once: importing torch takes seconds.
"""

import importlib
import multiprocessing
import os
import signal
import socket
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = "scripts.pipeline_parallel_inference"
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["pipeline.parallel.runner", SCRIPT, "evaluation.plots", "torch.distributed.run"])


def environments(count: int) -> list[dict[str, str]]:
    """Return torchrun's environment variables for `count` ranks on this machine."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
    return [
        address | {"RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
        for r in range(count)
    ]


def run_rank(words: list[str], environment: dict[str, str], log: str) -> None:
    """Run the script's main() as one rank, with its output in a file."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    with open(log, "w", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = ["script.py", *words]
    # The tiny VAE is slow compared with the tiny DiT: some ranks would have most steps or only decode.
    importlib.import_module("pipeline.parallel.runner").decode_passes = lambda config: 0.0
    importlib.import_module(SCRIPT).main()


def run_single_rank(
    words: list[str],
    environment: dict[str, str],
    log: str,
    startup_timeout: float,
    hold: bool,
    gpus: int,
    nan_block: int | None,
) -> None:
    """Run one rank in a process of its own.

    Args:
        hold: after the last frame of a video, create the file LOG.end and wait until it is deleted.
        gpus: number of GPUs that torch reports.
        nan_block: block that arrives at the decoder as NaN; None for none.
    """
    from pipeline.output import VideoOutput
    from pipeline.parallel import peers

    peers.STARTUP_TIMEOUT = startup_timeout
    torch.cuda.device_count = lambda: gpus
    finish = VideoOutput._write_metadata

    def finish_late(self):
        if hold:
            held = Path(f"{log}.end")
            held.touch()
            while held.exists():
                time.sleep(0.1)
        finish(self)

    VideoOutput._write_metadata = finish_late
    emit = VideoOutput.emit

    def emit_nan(self, latents, block=None):
        emit(self, torch.full_like(latents, float("nan")) if block == nan_block else latents, block)

    if nan_block is not None:
        VideoOutput.emit = emit_nan
    run_rank(words, environment, log)


class RankProcesses:
    """One process per rank, for runs that fail."""

    def __init__(
        self,
        folder: Path,
        count: int,
        words: list,
        absent: tuple[int, ...] = (),
        startup_timeout: float = 45.0,
        hold: bool = False,
        gpus: int = 0,
        nan_block: int | None = None,
    ):
        """
        Args:
            absent: ranks that never start.
        """
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self.logs = [folder.parent / f"{folder.name}.rank{rank}.log" for rank in range(count)]
        self.processes = []
        for rank, environment in enumerate(environments(count)):
            options = startup_timeout, hold, gpus, nan_block
            arguments = (list(map(str, words)), environment, str(self.logs[rank]), *options)
            process = CONTEXT.Process(target=run_single_rank, args=arguments, daemon=True)
            if rank not in absent:
                process.start()
            self.processes.append(process)

    def wait(self, timeout: float = 120) -> list[int | None]:
        """Return the exit codes. All processes must have ended by the timeout, in seconds."""
        deadline = time.monotonic() + timeout
        started = [process for process in self.processes if process.pid]
        for process in started:
            process.join(max(0.1, deadline - time.monotonic()))
        codes = [process.exitcode for process in started]
        for process in started:
            process.kill()
        assert None not in codes, f"still running after {timeout} s: {codes}\n{self.output}"
        return codes

    def kill(self, rank: int) -> None:
        """Kill a rank."""
        os.kill(self.processes[rank].pid, signal.SIGKILL)

    @property
    def output(self) -> str:
        """Output of all ranks."""
        return "".join(log.read_text() for log in self.logs if log.exists())


class RankPool:
    """Processes that serve as ranks again and again, for runs that succeed."""

    def __init__(self) -> None:
        self._idle: list[tuple[multiprocessing.Process, Connection]] = []

    def run(self, folder: Path, count: int, words: list) -> str:
        """Run `count` ranks, check that all of them succeed, and return their output."""
        folder.mkdir(exist_ok=True)
        while len(self._idle) < count:
            ours, theirs = CONTEXT.Pipe()
            process = CONTEXT.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            self._idle.append((process, ours))
        workers = self._idle[:count]
        del self._idle[:count]  # a failure makes them unusable
        logs = [folder.parent / f"{folder.name}.rank{rank}.log" for rank in range(count)]
        for (_, connection), environment, log in zip(workers, environments(count), logs, strict=True):
            connection.send((list(map(str, words)), environment, str(log)))
        deadline = time.monotonic() + 120
        try:
            done = [end.poll(max(0.0, deadline - time.monotonic())) and end.recv() for _, end in workers]
        except EOFError:
            done = [False]
        output = "".join(log.read_text() for log in logs if log.exists())
        assert all(done), output
        self._idle += workers
        return output

    def close(self) -> None:
        """End all processes."""
        for process, _ in self._idle:
            process.kill()


def _serve(connection: Connection) -> None:
    """Run ranks until one of them fails."""
    while True:
        run_rank(*connection.recv())
        connection.send(True)


def read_latents_in(folder: Path) -> dict[str, torch.Tensor]:
    """Return the saved latents in a folder, by file stem."""
    return {file.stem: load_file(file)["latents"] for file in sorted(folder.glob("*.safetensors"))}


def run_torchrun(words: list[str], errors: str) -> None:
    """Run the script under torchrun with two processes, in a session of its own, with the errors in a file."""
    from torch.distributed.run import main

    os.setsid()
    os.chdir(ROOT)
    with open(errors, "w", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    main(["--standalone", "--nproc_per_node=2", "scripts/pipeline_parallel_inference.py", *words])
