"""What the processes of a pipeline know of each other: who has come, who has died, and who says so.

A process that waits for a message from a dead one would wait for ever, or for as long as its backend does. Here every
process shows signs of life in the run's store, and a thread of each watches the others: when one is gone, all end, and
one of them says which it was.
"""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta

import torch.distributed as dist

COMES_WITHIN = 45.0  # seconds in which every process has to show up
BEATS_WITHIN = 20.0  # seconds without a sign of life after which a process of another machine counts as dead
_INTERVAL = 0.5


def connect(rank: int, world_size: int) -> dist.Store:
    """The store of this run, as torchrun (or its environment variables, set by hand) names it.

    Raises:
        TimeoutError: if whoever holds it never comes.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    agent_holds_it = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        store = dist.TCPStore(
            host,
            port,
            world_size,
            is_master=rank == 0 and not agent_holds_it,
            timeout=timedelta(seconds=COMES_WITHIN),
            wait_for_workers=False,
        )
    except (RuntimeError, ValueError) as error:
        raise TimeoutError(f"no answer from {host}:{port} within {COMES_WITHIN:.0f} s") from error
    return dist.PrefixStore(f"run {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


class Peers:
    """The other processes of a run, watched from a thread.

    Ctrl-C and termination are handled by it as well: the main thread may be waiting inside of a library.
    """

    def __init__(self, store: dist.Store, rank: int, names: Mapping[int, str], at_end: Callable[[], str] = lambda: ""):
        """
        Args:
            names: of every rank, what it does.
            at_end: called when the run fails, before the process ends; what it returns is added to the message.
        """
        self.store = store
        self.rank = rank
        self.names = names
        self.at_end = at_end
        self._others = [other for other in names if other != rank]
        self._pids: dict[int, int] = {}  # of those on this machine
        self._beats: dict[int, tuple[bytes, float]] = {}
        self._lock = threading.Lock()
        self._over = False

    def gather(self) -> None:
        """Wait until everybody has come, then watch them.

        Raises:
            TimeoutError: naming those that have not.
        """
        # Signals wait for a thread of their own, here and in all threads that start from now on.
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        here = socket.gethostname()
        self.store.set(f"here/{self.rank}", f"{here} {os.getpid()}")
        deadline = time.monotonic() + COMES_WITHIN
        while missing := [r for r in self._others if not self.store.check([f"here/{r}"])]:
            if time.monotonic() > deadline:
                names = ", ".join(f"{r} ({self.names[r]})" for r in missing)
                raise TimeoutError(f"rank {names} never came within {COMES_WITHIN:.0f} s")
            time.sleep(0.1)
        for other in self._others:
            host, pid = self.store.get(f"here/{other}").decode().rsplit(" ", 1)
            if host == here:
                self._pids[other] = int(pid)
        threading.Thread(target=self._watch, daemon=True).start()
        threading.Thread(target=self._await_signal, daemon=True).start()

    def leave(self) -> None:
        """Say that this process has done its part, and wait until all have."""
        if not self._others:
            return
        self.store.set(f"done/{self.rank}", "1")
        while not self.store.check([f"done/{other}" for other in self._others]):
            time.sleep(0.05)
        self._over = True
        # Rank 0 may hold the store, and goes last.
        if self.rank > 0:
            self.store.set(f"left/{self.rank}", "1")
            return
        deadline = time.monotonic() + BEATS_WITHIN
        while any(self._needs_store(other) for other in self._others) and time.monotonic() < deadline:
            time.sleep(0.05)

    def _needs_store(self, other: int) -> bool:
        """Whether a rank that has done its part is still about to say that it leaves; it may have died since."""
        gone = other in self._pids and not _is_running(self._pids[other])
        return not gone and not self.store.check([f"left/{other}"])

    def fail(self, reason: str) -> None:
        """End this process, and thereby the run. The message comes from whoever finds the failure first."""
        with self._lock:  # one thread of this process only, and for good
            kept = self.at_end()
            try:
                first = self.store.add("failures", 1) == 1
            except RuntimeError:  # the store is gone as well: the first that is left speaks
                first = not any(_is_running(pid) for other, pid in self._pids.items() if other < self.rank)
            said = f"error: {reason}" if first else "note: the run has failed"
            if first or kept:
                print(" ".join(f"{said}; {kept}".split()).removesuffix(";"), file=sys.stderr, flush=True)
            if first or self.rank == 0:
                time.sleep(2)  # the others look for whoever has spoken, and for the store, which rank 0 may hold
            os._exit(1)

    def blame(self, error: BaseException) -> None:
        """End after an exception: if a peer has died it is the cause, otherwise this process is."""
        for _ in range(int(3 / _INTERVAL)):
            self._end_if_someone_died()
            if self.store_has_failed():
                self.fail(f"rank {self.rank} ends with the others")
            time.sleep(_INTERVAL)
        self.fail(f"rank {self.rank} ({self.names[self.rank]}): {type(error).__name__}: {error}")

    def store_has_failed(self) -> bool:
        """Whether another process has told of a failure already."""
        try:
            return bool(self.store.check(["failures"]))
        except RuntimeError:
            return True

    def _watch(self) -> None:
        beat = 0
        while not self._over:
            beat += 1
            try:
                self.store.set(f"beat/{self.rank}", str(beat))
            except RuntimeError:
                if self._over:
                    return
                self._end_if_someone_died()
                self.fail("the launcher is gone")
            self._end_if_someone_died()
            time.sleep(_INTERVAL)

    def _end_if_someone_died(self) -> None:
        dead = [r for r in self._others if not self._is_alive(r)]
        if dead and not self._over:
            self.fail("; ".join(f"rank {r} ({self.names[r]}) has died" for r in dead))

    def _is_alive(self, other: int) -> bool:
        gone = other in self._pids and not _is_running(self._pids[other])
        try:
            if gone:
                return bool(self.store.check([f"done/{other}"]))
            if self.store.check([f"done/{other}"]) or not self.store.check([f"beat/{other}"]):
                return True
            beat, now = self.store.get(f"beat/{other}"), time.monotonic()
        except RuntimeError:
            return not gone  # the store may have gone with it
        if self._beats.get(other, (b"", 0.0))[0] != beat:
            self._beats[other] = beat, now
        return now - self._beats[other][1] < BEATS_WITHIN

    def _await_signal(self) -> None:
        signal.sigwait(_SIGNALS)
        # torchrun ends everybody when one has died.
        self._end_if_someone_died()
        self.fail("interrupted")


_SIGNALS = {signal.SIGINT, signal.SIGTERM}


def _is_running(pid: int) -> bool:
    """Whether a process of this machine exists and is no zombie."""
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except ProcessLookupError:
        return False
    except OSError:
        return True
