"""Start train.py on several ranks, by torchrun or without it.

Importing torch and diffusers takes seconds, so most processes are forked from one server that has imported everything.
"""

import multiprocessing
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = str(ROOT / "train.py")
_CONTEXT = multiprocessing.get_context("forkserver")
# All tests of a pytest process share one fork server, so the list includes the modules of the pipeline's tests.
_CONTEXT.set_forkserver_preload(
    [
        *("trainer.trainer", "shapes.objectives", "torch.distributed.run", "torch.distributed.checkpoint"),
        *("pipeline.parallel.runner", "scripts.pipeline_parallel_inference", "inference", "evaluation.plots"),
    ]
)


def fork_ranks(world_size: int, words: Sequence[str], setup: str = "") -> list[ForkServerProcess]:
    """Start `train.py` with these command-line words on `world_size` ranks, without torchrun.

    Args:
        setup: Python code that each rank runs first.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [
        _CONTEXT.Process(target=_run_rank, args=(rank, world_size, port, list(words), setup), daemon=True)
        for rank in range(world_size)
    ]
    for rank in ranks:
        rank.start()
    return ranks


def _run_rank(rank: int, world_size: int, port: int, words: list[str], setup: str) -> None:
    import torch

    import train

    torch.set_num_threads(1)
    os.chdir(ROOT)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
    sys.argv = ["train.py", *words]
    exec(setup, {})
    train.main()


class Torchrun:
    """`torchrun train.py` on two ranks.

    Attributes:
        pid: process ID of the launcher.
        errors: file with the standard error of the launcher and the ranks.
    """

    def __init__(self, errors: Path, words: Sequence[str], fork: bool = True):
        """
        Args:
            fork: fork the launcher and the ranks, which then start at once; otherwise start new Python processes.
        """
        self.errors = errors
        flags = ["--standalone", "--nproc_per_node=2"]
        self._process: ForkServerProcess | subprocess.Popen[bytes]
        if fork:
            arguments = [*flags, "--run-path", "--start-method=fork", SCRIPT, *words]
            self._process = _CONTEXT.Process(target=_run_torchrun, args=(arguments, str(errors)))
            self._process.start()
        else:
            command = [sys.executable, "-m", "torch.distributed.run", *flags, SCRIPT, *words]
            with errors.open("wb") as file:
                self._process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file)
        assert self._process.pid is not None
        self.pid = self._process.pid

    def is_running(self) -> bool:
        """Return whether the launcher is running."""
        if isinstance(self._process, subprocess.Popen):
            return self._process.poll() is None
        return self._process.is_alive()

    def ranks(self) -> list[int]:
        """Return the process IDs of the ranks."""
        listed = subprocess.run(["pgrep", "-P", str(self.pid)], capture_output=True, text=True, check=True)
        return [int(pid) for pid in listed.stdout.split()]

    def wait(self, timeout: float) -> int | None:
        """Return the launcher's exit code; None if it is still running after `timeout` seconds."""
        if isinstance(self._process, subprocess.Popen):
            return self._process.wait(timeout)
        self._process.join(timeout)
        return self._process.exitcode

    def kill(self) -> None:
        """Kill the launcher with SIGKILL."""
        self._process.kill()


def _run_torchrun(arguments: list[str], errors: str) -> None:
    import torch
    from torch.distributed.run import main

    torch.set_num_threads(1)
    os.chdir(ROOT)
    with open(errors, "wb", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    main(arguments)
