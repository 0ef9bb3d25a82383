"""Schedules: how temperature, noise level and step size move along a chain.

A curve maps progress t in [0, 1] to a value. A `Schedule` names the curves of one run, and turns
them into one value per step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise

__all__ = [
    "Curve",
    "Schedule",
    "constant",
    "cosine",
    "geometric",
    "hold_then",
    "karras",
    "linear",
    "through",
]

_BETWEEN: dict[str, Callable[[float, float, float], float]] = {
    "linear": lambda a, b, t: a + t * (b - a),
    "geometric": lambda a, b, t: a * (b / a) ** t,
    "cosine": lambda a, b, t: b + (a - b) * 0.5 * (1 + math.cos(math.pi * t)),
    "karras": lambda a, b, t: (a ** (1 / 7) + t * (b ** (1 / 7) - a ** (1 / 7))) ** 7,
}


@dataclass(frozen=True, repr=False)
class Curve:
    """A value for each t in [0, 1]: given at knots, interpolated between them.

    Args:
        knots: (t, value), the t rising from 0 to 1.
        between: "linear"; "geometric", equal ratios; "cosine", flat at both ends of a piece; or
            "karras", noise levels that crowd at the low end (arXiv 2206.00364, eq. 5, ρ = 7).
    Raises:
        ValueError: If the knots do not rise from 0 to 1, or values are not positive where ratios
            are taken.
    """

    knots: Sequence[tuple[float, float]]
    between: str = "geometric"

    def __post_init__(self) -> None:
        object.__setattr__(self, "knots", tuple((float(t), float(value)) for t, value in self.knots))
        times = [t for t, _ in self.knots]
        if len(times) < 2 or times[0] != 0 or times[-1] != 1 or sorted(set(times)) != times:
            raise ValueError(f"the times of the knots must rise from 0 to 1, got {times}.")
        if self.between not in _BETWEEN:
            raise ValueError(f"`between` must be one of {', '.join(_BETWEEN)}, got {self.between!r}.")
        if self.between == "geometric" and not all(value > 0 for _, value in self.knots):
            raise ValueError(f"a geometric curve needs positive values, got {self.knots}; use linear.")

    def __call__(self, t: float) -> float:
        pieces = list(pairwise(self.knots))
        (start, a), (stop, b) = next((p for p in pieces if t <= p[1][0]), pieces[-1])
        return _BETWEEN[self.between](a, b, (t - start) / (stop - start))

    def __repr__(self) -> str:
        values = [f"{value:g}" for _, value in self.knots]
        if len(values) == 2:
            return f"{self.between}({', '.join(values)})"
        knots = ", ".join(f"({t:g}, {value})" for (t, _), value in zip(self.knots, values, strict=True))
        return f"through({knots}, between={self.between!r})"


def constant(value: float) -> Curve:
    """The same value throughout."""
    return linear(value, value)


def linear(start: float, stop: float) -> Curve:
    """start + t (stop - start)."""
    return Curve(((0, start), (1, stop)), "linear")


def geometric(start: float, stop: float) -> Curve:
    """start (stop/start)^t: equal ratios between levels. Both ends must be positive."""
    return Curve(((0, start), (1, stop)), "geometric")


def cosine(start: float, stop: float) -> Curve:
    """stop + (start - stop)(1 + cos πt)/2: flat at both ends."""
    return Curve(((0, start), (1, stop)), "cosine")


def karras(start: float, stop: float) -> Curve:
    """Noise levels that crowd at the low end, see `Curve`."""
    return Curve(((0, start), (1, stop)), "karras")


def through(*knots: tuple[float, float], between: str = "geometric") -> Curve:
    """Through the given points (t, value): slow where a chain needs time.

    Example:
        >>> noise = through((0, 1.0), (0.1, 0.06), (0.9, 0.02), (1, 0.002))
    """
    return Curve(knots, between)


def hold_then(curve: Curve, share: float) -> Curve:
    """The first value of `curve` for `share` of the run, then the whole curve in what is left."""
    if not 0 <= share < 1:
        raise ValueError(f"`share` must be in [0, 1), got {share}.")
    if share == 0:
        return curve
    later = tuple((share + (1 - share) * t, value) for t, value in curve.knots)
    return Curve(((0.0, curve(0.0)), *later), curve.between)


@dataclass(frozen=True)
class Schedule:
    """The curves that one annealed run follows; a curve may be any function of t.

    Args:
        temperature: Multiplies the kernel's temperature T in exp(-E/T).
        noise_level: Standard deviation given to noise-conditioned energies, in data units.
        step_scale: Multiplies the step size, and the noise of a decoupled Langevin step.
        noise_power: Step sizes are in units of σ^noise_power at noise level σ: 2 for Langevin and
            MALA, whose step is a variance, 1 for HMC, whose step is a length, 0 for neither.
        predict: Between noise levels σ > σ' chains move along the reverse diffusion,
            x ← x - σ(σ - σ') ∂E/∂x, and from the last level to 0: a predictor, with the kernel as
            corrector (Song et al. 2021, arXiv 2011.13456, section 4.2; the step is DDIM's).
        num_levels: How many distinct values; None is one per step. The steps of a run are shared
            out evenly between the levels.
    """

    temperature: Callable[[float], float] | None = None
    noise_level: Callable[[float], float] | None = None
    step_scale: Callable[[float], float] | None = None
    noise_power: float = 0.0
    predict: bool = False
    num_levels: int | None = None

    def __post_init__(self) -> None:
        if self.noise_level is None and (self.noise_power or self.predict):
            raise ValueError("`noise_power` and `predict` need a `noise_level` curve.")
        if self.num_levels is not None and self.num_levels < 1:
            raise ValueError(f"`num_levels` must be at least 1, got {self.num_levels}.")

    def __str__(self) -> str:
        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return ", ".join(f"{name} {value}" for name, value in given.items())

    def _count(self, num_steps: int) -> int:
        # No more levels than steps, so that every run ends at the end of its curves.
        return min(self.num_levels or num_steps, num_steps)

    def levels(self, num_steps: int) -> list[int]:
        """The level of each step, 0 to num_levels - 1, never falling."""
        count = self._count(num_steps)
        return [min(count - 1, step * count // num_steps) for step in range(num_steps)]

    def values(self, curve: Callable[[float], float] | None, num_steps: int) -> list[float] | None:
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
