"""How far a training is: by its iterations, or by the minutes that it may take."""

from __future__ import annotations

from composable_ebm.train.config import TrainConfig

PARTS = 8  # times that a training by the clock is evaluated and saved
REST = 4  # times as long as looking at it took, before it is looked at again

__all__ = ["Budget"]


class Budget:
    """Progress of a training from 0 to 1.

    By the clock, progress is as of the last `tick`, so that processes which tick together agree.

    Args:
        config: Says how many iterations, or how many minutes.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.minutes = config.minutes
        self.num_iterations = config.num_iterations
        self.seconds = 0.0
        self._crossed = False
        self._rested = 0.0

    def tick(self, seconds: float) -> None:
        """Takes note of the seconds that the training has taken."""
        before, self.seconds = self.progress(0), seconds
        self._crossed = int(PARTS * self.progress(0)) > int(PARTS * before) and seconds >= self._rested

    def looked(self, until: float, seconds: float) -> None:
        """Takes note of an evaluation that took so many seconds: on a busy machine they would eat all."""
        self._rested = until + REST * seconds

    def progress(self, step: int) -> float:
        """How much of the training is done after so many iterations."""
        if self.minutes:
            return min(self.seconds / (60 * self.minutes), 1.0)
        return min(step / self.num_iterations, 1.0)

    def done(self, step: int) -> bool:
        """Whether that was all."""
        return self.progress(step) >= 1

    def due(self, step: int, every: int) -> bool:
        """Whether it is time for what is done every so many iterations, or at every part of the minutes."""
        return self._crossed if self.minutes else step % every == 0

    def left(self, step: int) -> str:
        """The time left, as minutes and seconds."""
        rest = 60 * self.minutes - self.seconds
        if not self.minutes:
            rest = self.seconds / max(step, 1) * (self.num_iterations - step)
        return f"{max(int(rest), 0) // 60}:{max(int(rest), 0) % 60:02}"

    def __str__(self) -> str:
        return f"{self.minutes:g} minutes" if self.minutes else f"{self.num_iterations} iterations"
