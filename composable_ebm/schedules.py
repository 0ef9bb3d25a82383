"""Schedules: how temperature, noise level and step size move along a chain.

A curve maps progress t in [0, 1] to a value. A `Schedule` names the curves of one run, and turns
them into one value per step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

Curve = Callable[[float], float]

__all__ = ["Curve", "Schedule", "constant", "cosine", "geometric", "hold_then", "linear", "through"]


def constant(value: float) -> Curve:
    """The same value throughout."""
    return lambda t: value


def linear(start: float, stop: float) -> Curve:
    """start + t (stop - start)."""
    return lambda t: start + t * (stop - start)


def geometric(start: float, stop: float) -> Curve:
    """start (stop/start)^t: equal ratios between levels.

    Raises:
        ValueError: Unless both ends are positive.
    """
    if not (start > 0 and stop > 0):
        raise ValueError(f"a geometric curve needs positive ends, got {start} and {stop}; use linear.")
    return lambda t: start * (stop / start) ** t


def cosine(start: float, stop: float) -> Curve:
    """stop + (start - stop)(1 + cos πt)/2: flat at both ends."""
    return lambda t: stop + (start - stop) * 0.5 * (1 + math.cos(math.pi * t))


def through(*knots: tuple[float, float]) -> Curve:
    """Through the given points (t, value), geometric between them: slow where a chain needs time.

    Example:
        >>> noise = through((0, 1.0), (0.1, 0.06), (0.9, 0.02), (1, 0.002))
    Raises:
        ValueError: Unless the t rise from 0 to 1 and the values are positive.
    """
    times = [t for t, _ in knots]
    if len(knots) < 2 or times[0] != 0 or times[-1] != 1 or sorted(set(times)) != times:
        raise ValueError(f"the times of the knots must rise from 0 to 1, got {times}.")
    pieces = [(a, b, geometric(x, y)) for (a, x), (b, y) in pairwise(knots)]

    def curve(t: float) -> float:
        start, stop, piece = next(p for p in pieces if t <= p[1] or p is pieces[-1])
        return piece((t - start) / (stop - start))

    return curve


def hold_then(curve: Curve, share: float) -> Curve:
    """The first value of `curve` for `share` of the run, then the whole curve in what is left."""
    if not 0 <= share < 1:
        raise ValueError(f"`share` must be in [0, 1), got {share}.")
    return lambda t: curve(max(0.0, t - share) / (1 - share))


@dataclass(frozen=True)
class Schedule:
    """The curves that one annealed run follows.

    Args:
        temperature: Multiplies the kernel's temperature T in exp(-E/T).
        noise_level: Standard deviation given to noise-conditioned energies, in data units.
        step_scale: Multiplies the step size, and the noise of a decoupled Langevin step.
        num_levels: How many distinct values; None is one per step. The steps of a run are shared
            out evenly between the levels.
    """

    temperature: Curve | None = None
    noise_level: Curve | None = None
    step_scale: Curve | None = None
    num_levels: int | None = None

    def __post_init__(self) -> None:
        if self.num_levels is not None and self.num_levels < 1:
            raise ValueError(f"`num_levels` must be at least 1, got {self.num_levels}.")

    def _count(self, num_steps: int) -> int:
        # No more levels than steps, so that every run ends at the end of its curves.
        return min(self.num_levels or num_steps, num_steps)

    def levels(self, num_steps: int) -> list[int]:
        """The level of each step, 0 to num_levels - 1, never falling."""
        count = self._count(num_steps)
        return [min(count - 1, step * count // num_steps) for step in range(num_steps)]

    def values(self, curve: Curve | None, num_steps: int) -> list[float] | None:
        """The value of `curve` at each step, or None without a curve.

        Raises:
            ValueError: If a value is negative or not finite.
        """
        if curve is None:
            return None
        levels = self.levels(num_steps)
        last = max(1, self._count(num_steps) - 1)
        values = [curve(level / last) for level in levels]
        for step, value in enumerate(values):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(
                    f"a schedule's values must be finite and at least 0, got {value} at step {step}."
                )
        return values
