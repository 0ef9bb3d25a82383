"""Underdamped (kinetic) Langevin dynamics, splitting scheme BAOAB."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Self

import torch

from composable_ebm.potential.potential import Potential
from composable_ebm.sampling.kernel import Dynamics, Info, Kernel, Noise, State, expand

__all__ = ["UnderdampedLangevin"]


@dataclass(frozen=True)
class UnderdampedLangevin(Kernel):
    """Langevin dynamics with momentum: dx = p dt, dp = -g dt - γ p dt + √(2γT) dW.

    One step of length h, each part solved exactly:

        B  p ← p - (h/2) g(x)
        A  x ← x + (h/2) p
        O  p ← e^(-γh) p + √(T (1 - e^(-2γh))) ξ
        A  x ← x + (h/2) p
        B  p ← p - (h/2) g(x)

    Not adjusted, yet the variance of x is exactly T/p at precision p for every stable h, which is
    why this order of the parts is chosen. At γ → ∞ it is Langevin with η = h²/2, each step taking
    the mean of its own noise and the last step's, (ξₙ + ξₙ₋₁)/2, which is what removes the bias.

    Args:
        step_size: h, in data units (unit mass).
        temperature: T in exp(-E/T).
        friction: γ > 0, per unit of time.
    Reference:
        Leimkuhler and Matthews (2013), Rational construction of stochastic numerical methods for
        molecular sampling, arXiv 1203.5428.
    """

    friction: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.friction < math.inf:
            raise ValueError(f"`friction` must be positive and finite, got {self.friction!r}.")
        if self.target_acceptance is not None:
            raise ValueError("UnderdampedLangevin accepts every step and has no target_acceptance; use HMC.")

    def init(self, potential: Potential, x: torch.Tensor, noise: Noise) -> State:
        momentum = math.sqrt(self.temperature) * noise.normal(x)
        return super().init(potential, x, noise)._replace(momentum=momentum)

    def scaled(self, factor: float) -> Self:
        # η = h²/2, so the length h goes with the root.
        return replace(self, step_size=self.step_size * math.sqrt(factor))

    def step(
        self, potential: Potential, state: State, noise: Noise, dynamics: Dynamics
    ) -> tuple[State, Info]:
        half = expand(dynamics.step_size, state.x) / 2
        keep = torch.exp(-2 * self.friction * half)
        kick = (expand(dynamics.temperature, state.x) * (1 - keep.square())).sqrt()
        assert state.momentum is not None
        momentum = state.momentum - half * state.gradient
        x = state.x + half * momentum
        momentum = keep * momentum + kick * noise.normal(x)
        x = x + half * momentum
        energy, gradient = potential(x)
        return State(x, energy, gradient, momentum - half * gradient), Info()
