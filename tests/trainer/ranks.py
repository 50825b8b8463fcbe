"""Start train.py: as ranks forked from one process that has imported everything, or by torchrun.

Importing torch and diffusers takes seconds. A forked rank starts in a fraction of one.
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
_CONTEXT = multiprocessing.get_context("forkserver")
# All tests of a pytest process share one fork server, so the list includes what the pipeline's tests import.
_CONTEXT.set_forkserver_preload(
    [
        "trainer.trainer",
        "shapes.objectives",
        "inference",
        "pipeline.parallel.runner",
        "scripts.pipeline_parallel_inference",
    ]
)


def fork_ranks(world_size: int, words: Sequence[str], setup: str = "") -> list[ForkServerProcess]:
    """Start `train.py` with these command-line words on `world_size` ranks.

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


def start_torchrun(world_size: int, words: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start `torchrun train.py` with these command-line words, in a process group of its own."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world_size}"]
    return subprocess.Popen(
        [*launcher, str(ROOT / "train.py"), *words], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip
