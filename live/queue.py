"""The queue for one device: one client holds it, the others wait in the order in which they came."""

from collections import deque
from typing import Generic, TypeVar

from utils.errors import UserError

MAX_WAITING = 64

Entry = TypeVar("Entry")


class DeviceQueue(Generic[Entry]):
    """First come, first served. It has no thread of its own; the event loop calls it."""

    def __init__(self, max_waiting: int = MAX_WAITING):
        self.holder: Entry | None = None
        self.waiting: deque[Entry] = deque()
        self._max_waiting = max_waiting

    def enter(self, entry: Entry) -> None:
        """Append an entry; one that waits already keeps its place.

        Raises:
            UserError: if the queue is full.
        """
        if entry in self.waiting:
            return
        if len(self.waiting) >= self._max_waiting:
            raise UserError(f"the queue is full ({self._max_waiting} clients wait); try again later")
        self.waiting.append(entry)

    def leave(self, entry: Entry) -> bool:
        """Remove a waiting entry; return whether it waited."""
        if entry not in self.waiting:
            return False
        self.waiting.remove(entry)
        return True

    def release(self, entry: Entry) -> None:
        """Free the device that `entry` holds."""
        assert self.holder is entry
        self.holder = None

    def next_holder(self) -> Entry | None:
        """Give a free device to the first waiting entry and return it; None if there is none or the device is busy."""
        if self.holder is not None or not self.waiting:
            return None
        self.holder = self.waiting.popleft()
        return self.holder
