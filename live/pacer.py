"""Pace of a generation: not faster than the video plays, so that a new prompt is soon on the screen."""

import threading
import time


class Pacer:
    """Delays the ops of a session. The device idles between ops if it is faster than the video.

    The first block is not delayed. From then on, each pass of the network has its share of a block's duration. `ahead`
    seconds of frames are generated early, so that the player never waits.
    """

    def __init__(self, seconds_per_pass: float, ahead: float):
        """
        Args:
            seconds_per_pass: duration of a block divided by the number of steps; 0 delays nothing.
            ahead: seconds of video to generate before they are due.
        """
        self.seconds_per_pass, self.ahead = seconds_per_pass, ahead
        self._due: float | None = None  # time at which the next pass may run
        self._held_at: float | None = None
        self._stopped = threading.Event()
        self._lock = threading.Lock()

    def start(self) -> None:
        """Start the clock, when the first block is denoised. Later calls do nothing."""
        with self._lock:
            if self._due is None:
                self._due = time.monotonic() - self.ahead

    def hold(self) -> None:
        """Stop the clock while the session is paused."""
        with self._lock:
            if self._held_at is None:
                self._held_at = time.monotonic()

    def release(self) -> None:
        """Let the clock go on, with as many seconds ahead as before."""
        with self._lock:
            if self._held_at is not None and self._due is not None:
                self._due += time.monotonic() - self._held_at
            self._held_at = None

    def stop(self) -> None:
        """End all delays."""
        self._stopped.set()

    def wait(self) -> None:
        """Wait until the next pass may run. Called after each pass."""
        with self._lock:
            if self._due is None or not self.seconds_per_pass:
                return
            now = time.monotonic()
            # A device that is too slow for a while catches up, but at most `ahead` seconds of video.
            self._due = max(self._due + self.seconds_per_pass, now - self.ahead)
            delay = self._due - now
        if delay > 0:
            self._stopped.wait(delay)
