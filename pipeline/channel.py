"""A bounded queue between two threads that carries errors."""

import threading
from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class ClosedError(Exception):
    """The queue was closed while a thread waited."""


class Channel(Generic[T]):
    """A bounded queue from one thread to another that can end, with or without an error."""

    def __init__(self, size: int):
        self._items: deque[T] = deque()
        self._size = size
        self._changed = threading.Condition()
        self._ended = self._closed = False
        self._error: BaseException | None = None

    @property
    def is_empty(self) -> bool:
        """Whether no item waits."""
        with self._changed:
            return not self._items

    def put(self, item: T) -> None:
        """Append an item; wait while the queue is full.

        Raises:
            ClosedError: if the queue is closed.
        """
        with self._changed:
            self._changed.wait_for(lambda: len(self._items) < self._size or self._closed)
            if self._closed:
                raise ClosedError
            self._items.append(item)
            self._changed.notify_all()

    def get(self) -> T | None:
        """Return the next item; wait for it. Return None at the end, or raise the error that ended the queue."""
        with self._changed:
            self._changed.wait_for(lambda: self._items or self._ended or self._closed)
            if self._items and not self._closed:
                self._changed.notify_all()
                return self._items.popleft()
            error, self._error = self._error, None
            if error is not None and not self._closed:
                raise error
            return None

    def end(self, error: BaseException | None = None) -> None:
        """End the queue after the items that it holds."""
        with self._changed:
            self._ended, self._error = True, error
            self._changed.notify_all()

    def close(self) -> None:
        """End the queue now and drop its items."""
        with self._changed:
            self._closed = True
            self._items.clear()
            self._changed.notify_all()
