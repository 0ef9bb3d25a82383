"""Unadjusted Langevin dynamics (ULA), and the short-run recipe of the EBM literature."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from composable_ebm.potential.potential import Potential
from composable_ebm.sampling.kernel import Dynamics, Info, Kernel, Noise, State, expand

__all__ = ["Langevin"]


@dataclass(frozen=True)
class Langevin(Kernel):
    """x ← x - η g(x) + √(2ηT) ξ.

    Not adjusted: at precision p its stationary variance is T/(p(1 - ηp/2)), which tends to the
    exact T/p as η → 0. Use `MALA` where that matters.

    With `noise_scale` s the noise is decoupled from the step, x ← x - η g(x) + s ξ, the short-run
    recipe that most image EBMs are trained with. It is Langevin dynamics at T = s²/(2η), which is
    what `implied_temperature` reports: 1.25e-6 for the textbook's η = 10, s = 0.005.

    Args:
        step_size: η, in squared data units per nat.
        noise_scale: s, in data units; None couples it to η and T.
        grad_clip: Largest absolute value of each element of g, in nats per data unit.
        clamp: (low, high) that states are kept between: what steps over is set on the wall. States pile up
            there, so that near a wall the samples are not those of exp(-E).
        reflect: (low, high) that states are kept between by mirrors, which leave exp(-E) on the box invariant
            as η → 0: what steps over is as far inside the wall as it would be outside.
        noise_first: Adds the noise (and clamps) before the gradient is taken, as the short-run
            recipes do: y = x + s ξ, x ← y - η g(y).
    Raises:
        ValueError: If a setting is out of range, or both temperature and noise_scale are given.
    Reference:
        Roberts and Tweedie (1996), Exponential convergence of Langevin distributions;
        Lépingle (1995), Euler scheme for reflected stochastic differential equations, for mirrors;
        Nijkamp et al. (2019), arXiv 1904.09770, for short runs; Du and Mordatch (2019),
        arXiv 1903.08689, eq. 1, whose λ is 2η.
    """

    noise_scale: float | None = None
    grad_clip: float | None = None
    clamp: tuple[float, float] | None = None
    reflect: tuple[float, float] | None = None
    noise_first: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.noise_scale is not None:
            if not 0 <= self.noise_scale < math.inf:
                raise ValueError(f"`noise_scale` must be at least 0 and finite, got {self.noise_scale}.")
            if self.temperature != 1:
                raise ValueError(
                    "give a temperature (noise √(2ηT)) or a noise_scale (then T = s²/(2η)), not both."
                )
        if self.grad_clip is not None and not self.grad_clip > 0:
            raise ValueError(f"`grad_clip` must be positive, got {self.grad_clip}.")
        for name in ("clamp", "reflect"):
            if (walls := getattr(self, name)) is not None:
                object.__setattr__(self, name, walls := tuple(map(float, walls)))
                if len(walls) != 2 or not walls[0] < walls[1]:
                    raise ValueError(f"`{name}` must be (low, high) with low < high, got {walls}.")
        if self.clamp is not None and self.reflect is not None:
            raise ValueError("give `clamp` or `reflect`, not both.")
        if self.target_acceptance is not None:
            raise ValueError("Langevin accepts every step and has no target_acceptance; use MALA.")

    @property
    def energy_is_current(self) -> bool:
        return not self.noise_first

    @property
    def implied_temperature(self) -> float:
        if self.noise_scale is None:
            return self.temperature
        return self.noise_scale**2 / (2 * self.step_size)

    def scaled(self, factor: float) -> Self:
        # The temperature is part of what was calibrated, so decoupled noise scales with √η.
        noise = None if self.noise_scale is None else self.noise_scale * math.sqrt(factor)
        return replace(self, step_size=self.step_size * factor, noise_scale=noise)

    def dynamics(self, x: Tensor) -> Dynamics:
        noise = None if self.noise_scale is None else x.new_full((), self.noise_scale)
        return super().dynamics(x)._replace(noise_scale=noise)

    def init(self, potential: Potential, x: Tensor, noise: Noise) -> State:
        if self.noise_first:  # the gradient at x itself is never used
            return State(x, x.new_zeros(x.shape[0]), torch.zeros_like(x))
        return super().init(potential, x, noise)

    def step(
        self, potential: Potential, state: State, noise: Noise, dynamics: Dynamics
    ) -> tuple[State, Info]:
        scale = dynamics.noise_scale
        if scale is None:
            scale = (2 * dynamics.step_size * dynamics.temperature).sqrt()
        # As few passes over the states as may be: at 64 images one more is a tenth of a step.
        kick = noise.normal(state.x)
        if self.noise_first:
            y = self._keep_(torch.addcmul(state.x, kick, expand(scale, kick)))
            energy, gradient = potential(y)
            return State(self._keep_(self._down(y, gradient, dynamics)), energy, gradient), Info()
        x = self._down(state.x, state.gradient, dynamics).addcmul_(kick, expand(scale, kick))
        x = self._keep_(x)
        return State(x, *potential(x)), Info()

    def _down(self, x: Tensor, gradient: Tensor, dynamics: Dynamics) -> Tensor:
        """x - η g, a new tensor."""
        if self.grad_clip is not None:
            gradient = gradient.clamp(-self.grad_clip, self.grad_clip)
        return torch.addcmul(x, gradient, expand(dynamics.step_size, x), value=-1)

    def _keep_(self, x: Tensor) -> Tensor:
        if self.clamp is not None:
            return x.clamp_(*self.clamp)
        if self.reflect is None:
            return x
        low, high = self.reflect
        width = high - low
        return x.sub_(low + width).remainder_(2 * width).sub_(width).abs_().add_(low)
