"""Messages on their way to one client, in bounded memory: a slow client loses pictures."""

import asyncio
import contextlib
import json
import threading
import time
from collections import deque
from typing import Any

MAX_BYTES = 8 * 2**20  # of pictures and events that wait
MAX_EVENTS = 512
MAX_REPLIES = 32

Payload = str | bytes


class Outbox:
    """A queue with two kinds of messages, delivered in the order in which they came.

    Replies are always delivered. Pictures and events are dropped, oldest first, when too many wait. Any thread may add
    messages; one task of the event loop takes them.

    Attributes:
        dropped_frames: number of frames that were dropped so far.
        num_bytes: size of the pictures and events that wait.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, max_bytes: int = MAX_BYTES):
        """
        Args:
            loop: the event loop of the task that takes messages.
            max_bytes: bytes of pictures and events that may wait.
        """
        self.dropped_frames = self.num_bytes = 0
        self._loop, self._max_bytes = loop, max_bytes
        self._lock = threading.Lock()
        self._replies: deque[tuple[int, dict[str, Any]]] = deque()
        self._events: deque[tuple[int, Payload, bool]] = deque()  # number, payload, whether it is a frame
        self._next_number = 0
        self._last_taken = time.monotonic()
        self._wake = asyncio.Event()
        self._has_room = asyncio.Event()
        self._has_room.set()

    def reply(self, message: dict[str, Any]) -> None:
        """Add a message that must arrive. A newer queue position replaces one that waits. Event loop only."""
        if message["type"] == "queue":
            self._replies = deque(entry for entry in self._replies if entry[1]["type"] != "queue")
        self._replies.append((self._number(), message))
        if len(self._replies) >= MAX_REPLIES:
            self._has_room.clear()
        self._wake.set()

    async def room(self) -> None:
        """Wait until few replies are queued, so that a client that never reads cannot fill the memory."""
        await self._has_room.wait()

    def add(self, payload: Payload | dict[str, Any], is_frame: bool = False) -> None:
        """Add a picture or an event; drop the oldest ones if too many wait."""
        data = json.dumps(payload) if isinstance(payload, dict) else payload
        with self._lock:
            was_empty = not self._events
            if was_empty:
                self._last_taken = time.monotonic()
            self._events.append((self._number(), data, is_frame))
            self.num_bytes += len(data)
            while len(self._events) > 1 and (self.num_bytes > self._max_bytes or len(self._events) > MAX_EVENTS):
                _, dropped, dropped_frame = self._events.popleft()
                self.num_bytes -= len(dropped)
                self.dropped_frames += dropped_frame
        if was_empty:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server ends
                self._loop.call_soon_threadsafe(self._wake.set)

    def forget_events(self) -> None:
        """Drop all pictures and events that wait, such as those of a stopped session."""
        with self._lock:
            self._events.clear()
            self.num_bytes = 0

    async def take(self) -> Payload:
        """Return the next message; wait for it."""
        while (payload := self._pop()) is None:
            self._wake.clear()
            await self._wake.wait()
        return payload

    def stalled_seconds(self) -> float:
        """Return for how long the client has not taken a waiting message; 0 if none waits."""
        with self._lock:
            return time.monotonic() - self._last_taken if self._events else 0.0

    def _pop(self) -> Payload | None:
        with self._lock:
            self._last_taken = time.monotonic()
            if self._replies and (not self._events or self._replies[0][0] < self._events[0][0]):
                _, message = self._replies.popleft()
                if len(self._replies) < MAX_REPLIES:
                    self._has_room.set()
                return json.dumps(message)
            if self._events:
                _, payload, _ = self._events.popleft()
                self.num_bytes -= len(payload)
                return payload
            return None

    def _number(self) -> int:
        self._next_number += 1
        return self._next_number
