"""Who may run now, and who waits in which place."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["Queue"]


class Queue:
    """First come, first served. Safe in any thread.

    Args:
        limit: How many may run at once.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._tickets: list[object] = []
        self._moved = threading.Condition()

    @contextmanager
    def joined(self) -> Iterator[object]:
        """A ticket, held until the end."""
        ticket = object()
        with self._moved:
            self._tickets.append(ticket)
        try:
            yield ticket
        finally:
            with self._moved:
                self._tickets.remove(ticket)
                self._moved.notify_all()

    def place(self, ticket: object) -> int:
        """How many have to leave before its turn; 0 from then on."""
        with self._moved:
            return max(0, self._tickets.index(ticket) + 1 - self.limit)

    def wait(self, seconds: float) -> None:
        """Returns when somebody has left, or after some seconds."""
        with self._moved:
            self._moved.wait(seconds)
