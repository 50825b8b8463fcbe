"""Catches Ctrl-C and SIGTERM, so that a run ends after the current iteration with a checkpoint."""

import signal
import sys
import threading
from typing import Any


class StopSignal:
    """Catch SIGINT and SIGTERM inside a `with` block and set `received`. A second Ctrl-C interrupts at once.

    A rank that stopped immediately would leave the others waiting. Its weights, optimizer state and EMA could also
    belong to different iterations.
    """

    def __init__(self) -> None:
        self.received = False
        self._previous_handlers: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():  # Python delivers signals to this thread only
            numbers = (signal.SIGINT, signal.SIGTERM)
            self._previous_handlers = {number: signal.signal(number, self._handle) for number in numbers}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = True
        print("stopping after this iteration; press Ctrl-C again to stop at once", file=sys.stderr, flush=True)
