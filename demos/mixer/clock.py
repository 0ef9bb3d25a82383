"""When the next frame of running chains is due."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

import torch

FRAMES_PER_SECOND = 16  # as many as two CPU cores give several visitors
ACCELERATED = 30  # where the steps cost the server's cores next to nothing
STEPS_PER_FRAME = 2

__all__ = ["FRAMES_PER_SECOND", "FrameClock"]


class FrameClock:
    """Paces frames: as many as can be seen, no more.

    Args:
        device: Where the chains run.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.frames = 0
        self.wanted = FRAMES_PER_SECOND if torch.device(device).type == "cpu" else ACCELERATED
        self._times: deque[float] = deque([time.perf_counter()], maxlen=self.wanted + 1)

    @property
    def rate(self) -> float:
        """Frames a second, over the last few."""
        passed = self._times[-1] - self._times[0]
        return (len(self._times) - 1) / passed if passed else 0.0

    def fill(self, step: Callable[[], None]) -> None:
        """Takes the steps of one frame: one at least, no more than there is time for."""
        for _ in range(STEPS_PER_FRAME):
            step()
            if time.perf_counter() - self._times[-1] > 0.5 / self.wanted:
                break
        self.frames += 1

    def wait(self, stop: threading.Event) -> None:
        """Until the next frame is due."""
        stop.wait(max(0.0, self._times[-1] + 1 / self.wanted - time.perf_counter()))
        self._times.append(time.perf_counter())
