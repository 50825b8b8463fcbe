"""Watch the ranks of a pipeline: detect ranks that did not start or died, and end the run with one message.

A rank that waits for a message from a dead rank would wait forever, or until its backend's timeout. Therefore each rank
writes heartbeats to the run's store, and a thread in each rank watches the other ranks. If a rank is gone, all ranks
exit, and one of them names it.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import NoReturn

import torch.distributed as dist

from utils.distributed import check_launcher
from utils.errors import expected_failure, report_to_torchrun

LOWERS_MEMORY = "--window, --height and --width, model.dtype=bfloat16 or model.offload=all, or use more ranks"
STARTUP_TIMEOUT = 45.0  # seconds until every rank must have started
HEARTBEAT_TIMEOUT = 20.0  # seconds without a heartbeat after which a rank on another machine counts as dead
_POLL_INTERVAL = 0.5
_DEATH_TIMEOUT = 3.0  # seconds to wait, after a connection broke, until a rank's process ends


def connect_store(rank: int, world_size: int) -> dist.Store:
    """Connect to the key-value store of this run, at the address in torchrun's environment variables.

    Raises:
        TimeoutError: if no process serves the store.
        UserError: if an environment variable is missing.
    """
    check_launcher()
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    torchrun_serves_it = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        store = dist.TCPStore(
            host,
            port,
            world_size,
            is_master=rank == 0 and not torchrun_serves_it,
            timeout=timedelta(seconds=STARTUP_TIMEOUT),
            wait_for_workers=False,
        )
    except (RuntimeError, ValueError) as error:
        raise TimeoutError(f"no answer from {host}:{port} within {STARTUP_TIMEOUT:.0f} s") from error
    return dist.PrefixStore(f"run {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


class PeerMonitor:
    """Watches the other ranks of a run from a thread, and exits this process if one of them is gone.

    It handles Ctrl-C and termination too, because the main thread may be blocked inside a library call.
    """

    def __init__(
        self, store: dist.Store, rank: int, roles: Mapping[int, str], on_failure: Callable[[], str] = lambda: ""
    ):
        """
        Args:
            store: shared by all ranks.
            rank: this process.
            roles: the roles of every rank, for messages.
            on_failure: called once if the run fails, before this process exits. Its result is added to the message.
        """
        self.store = store
        self.rank = rank
        self.roles = roles
        self.on_failure = on_failure
        self._others = [other for other in roles if other != rank]
        self._pids: dict[int, int] = {}  # of the ranks on this machine
        self._heartbeats: dict[int, tuple[bytes, float]] = {}  # last value, and when it was first seen
        self._lock = threading.Lock()
        self._finished = False

    def start(self) -> None:
        """Wait until every rank has started, then watch them.

        Raises:
            TimeoutError: with the ranks that did not start, or with rank 0 if the store ended.
        """
        # This thread and all later ones block the signals; `_handle_signals` receives them.
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            self._wait_for_start(socket.gethostname())
        except RuntimeError as error:
            raise TimeoutError(f"rank 0 ({self.roles[0]}), or torchrun, ended before all ranks had started") from error
        threading.Thread(target=self._watch, daemon=True).start()
        threading.Thread(target=self._handle_signals, daemon=True).start()

    def _wait_for_start(self, hostname: str) -> None:
        self.store.set(f"started/{self.rank}", f"{hostname} {os.getpid()}")
        deadline = time.monotonic() + STARTUP_TIMEOUT
        while missing := [r for r in self._others if not self.store.check([f"started/{r}"])]:
            if time.monotonic() > deadline:
                ranks = ", ".join(f"{r} ({self.roles[r]})" for r in missing)
                raise TimeoutError(f"rank {ranks} did not start within {STARTUP_TIMEOUT:.0f} s")
            time.sleep(0.1)
        for other in self._others:
            host, pid = self.store.get(f"started/{other}").decode().rsplit(" ", 1)
            if host == hostname:
                self._pids[other] = int(pid)

    def finish(self) -> None:
        """Report that this rank has finished its work, and wait until all ranks have finished theirs."""
        if not self._others:
            return
        self.store.set(f"finished/{self.rank}", "1")
        while not self.store.check([f"finished/{other}" for other in self._others]):
            time.sleep(0.05)
        self._finished = True
        # Rank 0 may serve the store, so it exits last.
        if self.rank > 0:
            self.store.set(f"exiting/{self.rank}", "1")
            return
        deadline = time.monotonic() + HEARTBEAT_TIMEOUT
        while any(self._still_needs_store(other) for other in self._others) and time.monotonic() < deadline:
            time.sleep(0.05)

    def _still_needs_store(self, other: int) -> bool:
        """Return whether a finished rank is alive and has not reported its exit yet."""
        return not self._process_is_gone(other) and not self.store.check([f"exiting/{other}"])

    def fail(self, reason: str) -> NoReturn:
        """Exit this process, so that the run ends. Only the rank that fails first prints the reason."""
        with self._lock:  # never released: only one thread of this process may fail
            try:
                details = self.on_failure()
            except (OSError, RuntimeError, ValueError) as error:  # must not hide the reason of the failure
                details = f"the unfinished video is lost ({type(error).__name__}: {error})"
            try:
                is_first = self.store.add("failures", 1) == 1
            except RuntimeError:  # the store is gone too: the lowest rank that is alive prints the reason
                is_first = not any(_is_running(pid) for other, pid in self._pids.items() if other < self.rank)
            message = f"error: {reason}" if is_first else "note: the run failed"
            if is_first or details:
                line = " ".join(f"{message}; {details}".split()).removesuffix(";")
                report_to_torchrun(line, delay=0 if is_first else 1)
                print(line, file=sys.stderr, flush=True)
            if is_first or self.rank == 0:
                time.sleep(2)  # the other ranks still read the store, which rank 0 may serve
            os._exit(1)

    def fail_after(self, error: BaseException) -> NoReturn:
        """Exit after an exception. The message names a dead rank as the cause if there is one, otherwise this rank."""
        self._fail_with_others()
        failure = expected_failure(error, LOWERS_MEMORY)
        text = failure[0] if failure else f"{type(error).__name__}: {error}"
        self.fail(f"rank {self.rank} ({self.roles[self.rank]}): {text}")

    def _fail_with_others(self) -> None:
        """Exit if a rank dies within a few seconds, or has reported a failure. Connections break before ranks end."""
        deadline = time.monotonic() + _DEATH_TIMEOUT
        while time.monotonic() < deadline and not self._finished:
            self._fail_if_rank_died()
            with contextlib.suppress(RuntimeError):  # the store may have died with its rank
                if self.store.check(["failures"]):
                    self.fail(f"rank {self.rank} ended because the run failed")
            time.sleep(0.1)

    def _watch(self) -> None:
        """Send heartbeats and check the other ranks until the run ends."""
        count = 0
        while not self._finished:
            count += 1
            try:
                self.store.set(f"heartbeat/{self.rank}", str(count))
            except RuntimeError:
                self._fail_with_others()
                if self._finished:
                    return
                self.fail("torchrun has ended")
            self._fail_if_rank_died()
            time.sleep(_POLL_INTERVAL)

    def _fail_if_rank_died(self) -> None:
        dead = [other for other in self._others if not self._is_alive(other)]
        if dead and not self._finished:
            self.fail("; ".join(f"rank {other} ({self.roles[other]}) has died" for other in dead))

    def _is_alive(self, other: int) -> bool:
        """Return whether a rank runs or has finished its work."""
        is_gone = self._process_is_gone(other)
        try:
            if is_gone:
                return bool(self.store.check([f"finished/{other}"]))
            if self.store.check([f"finished/{other}"]) or not self.store.check([f"heartbeat/{other}"]):
                return True
            heartbeat, now = self.store.get(f"heartbeat/{other}"), time.monotonic()
        except RuntimeError:
            return not is_gone  # the store may have died with that rank
        if self._heartbeats.get(other, (b"", 0.0))[0] != heartbeat:
            self._heartbeats[other] = heartbeat, now
        return now - self._heartbeats[other][1] < HEARTBEAT_TIMEOUT

    def _process_is_gone(self, other: int) -> bool:
        """Return whether a rank on this machine has ended; False for other machines."""
        return other in self._pids and not _is_running(self._pids[other])

    def _handle_signals(self) -> None:
        signal.sigwait(_SIGNALS)
        # torchrun terminates all ranks if one of them died; report that rank as the cause.
        self._fail_if_rank_died()
        self.fail("interrupted")


_SIGNALS = {signal.SIGINT, signal.SIGTERM}


def _is_running(pid: int) -> bool:
    """Return whether a process of this machine exists and is not a zombie."""
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except ProcessLookupError:
        return False
    except OSError:
        return True
