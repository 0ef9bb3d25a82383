"""Ctrl-C and SIGTERM: the training ends after the iteration in which they come, and says how to go on."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType

__all__ = ["StopSignals", "TrainingStoppedError"]


class TrainingStoppedError(KeyboardInterrupt):
    """A training that was asked to stop, and has saved what it had.

    Args:
        message: Where it stopped and how to go on.
        signal_number: Which signal asked.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number


class StopSignals:
    """Notes the first SIGINT or SIGTERM; the second acts as if this were not here.

    Python delivers signals to its main thread alone; in another one nothing is noted.

    Example:
        >>> with StopSignals() as stop:
        ...     while not stop.requested:
        ...         iterate()
    """

    def __init__(self) -> None:
        self.requested = 0  # the signal's number
        self._before: dict[int, Callable | int | None] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = number
        self.__exit__()
