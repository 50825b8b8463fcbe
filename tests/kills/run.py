"""Kill inference, pipeline ranks and training at 30 random moments, and compare the results bit for bit: `make kills`.

    python tests/kills/run.py [--kills 30] [--seed 0]

Each round runs a command in a new folder, kills one process of it with SIGKILL at a random moment, and starts the same
command again. After two kills the command may finish. Its files must equal those of an uninterrupted run, and no
partial file may remain.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

from processes import Command, contents, make_commands, run, started

KILLS_PER_ROUND = 2


def finish(command: Command, folder: Path) -> float:
    """Run a command to its end; return its duration in seconds."""
    start = time.monotonic()
    codes, printed = run(command, folder)
    if any(codes):
        sys.exit(f"{command.name} ended with exit codes {codes}:\n{printed[-3000:]}")
    return time.monotonic() - start


def kill_once(command: Command, folder: Path, delay: float, rank: int) -> bool:
    """Start a command and kill one process after `delay` seconds; return whether it was still running."""
    with started(command, folder) as processes:
        time.sleep(delay)
        alive = processes[rank].is_alive()
        if alive:
            os.kill(processes[rank].pid, signal.SIGKILL)
        for process in processes:  # the other ranks end by themselves
            process.join(30)
        return alive


def rounds(command: Command, folder: Path, kills: int, rng: random.Random) -> int:
    """Kill a command `kills` times in rounds; exit with an error if a result differs. Return the number of kills."""
    folder.mkdir()
    finish(command, folder / "warm")  # the first start of the server takes longer
    duration = finish(command, folder / "expected")
    expected, made = contents(folder / "expected"), 0
    print(f"{command.name}: {len(expected)} files and tensors in {duration:.1f} s", flush=True)
    while made < kills:
        target, moments = folder / f"round{made}", []
        for _ in range(min(KILLS_PER_ROUND, kills - made)):
            delay, rank = rng.uniform(0.02, 0.95) * duration, rng.randrange(command.ranks)
            if kill_once(command, target, delay, rank):
                moments.append(f"rank {rank} at {delay:.2f} s" if command.ranks > 1 else f"{delay:.2f} s")
        finish(command, target)
        found = contents(target)
        wrong = [name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)]
        if wrong:
            sys.exit(f"{command.name}, killed at {', '.join(moments)}: {sorted(wrong)[:5]} differ in {target}")
        made += len(moments)
        print(f"{command.name}: same bits after kills at {', '.join(moments) or 'no moment'}", flush=True)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30, help="number of kills over all commands")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments and ranks")
    parser.add_argument("--only", choices=["inference", "pipeline", "training"], help="one command only")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        commands = [command for command in make_commands(Path(folder)) if args.only in (None, command.name)]
        total = sum(rounds(c, Path(folder) / c.name, args.kills // len(commands), rng) for c in commands)
    print(f"{total} kills: every result has the same bits as without them")


if __name__ == "__main__":
    main()
