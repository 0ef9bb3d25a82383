"""How often running chains step and are shown."""

from __future__ import annotations

import time
from collections import deque

import torch

FRAMES_PER_SECOND = 16  # as many as two CPU cores give several visitors
ACCELERATED = 30  # where the steps cost the server's cores next to nothing
STEPS_PER_FRAME = 2

__all__ = ["FRAMES_PER_SECOND", "FrameClock"]


class FrameClock:
    """Says how many frames are wanted, as many as can be seen, and counts those that came.

    Args:
        device: Where the chains run.
    Attributes:
        frames: How many came.
        frames_per_second: Most that are wanted.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.frames = 0
        self.frames_per_second = FRAMES_PER_SECOND if torch.device(device).type == "cpu" else ACCELERATED
        self._times: deque[float] = deque([time.perf_counter()], maxlen=self.frames_per_second + 1)

    @property
    def steps_per_second(self) -> int:
        """Most steps that are wanted."""
        return STEPS_PER_FRAME * self.frames_per_second

    @property
    def rate(self) -> float:
        """Frames a second, over the last few."""
        passed = self._times[-1] - self._times[0]
        return (len(self._times) - 1) / passed if passed else 0.0

    def tick(self) -> None:
        """Counts a frame."""
        self.frames += 1
        self._times.append(time.perf_counter())
