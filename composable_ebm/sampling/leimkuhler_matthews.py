"""Langevin dynamics with averaged noise, the method of Leimkuhler and Matthews."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from composable_ebm.energy import flat
from composable_ebm.potential.potential import Potential
from composable_ebm.sampling.kernel import Dynamics, Info, Kernel, Noise, State, expand

__all__ = ["LeimkuhlerMatthews"]


@dataclass(frozen=True)
class LeimkuhlerMatthews(Kernel):
    """x ← x - η g(x) + √(ηT/2) (ξₙ + ξₙ₋₁): Langevin with the mean of a step's own noise and the last's.

    As cheap as `Langevin` and not adjusted either, yet at precision p the variance is exactly T/p for
    every stable step, ηp < 2, where that of `Langevin` is T/(p(1 - ηp/2)). So along an annealing, where
    p runs from 1/σ² in directions that are nothing but noise down to that of the data, no direction is
    too wide. It is `UnderdampedLangevin` at friction → ∞, with η = h²/2.

    Where data are far wider than the noise along a few axes, as faces are in how bright they are, the engine
    gives it longer steps there: the same dynamics in another metric, with as exact a variance.

    Args:
        step_size: η, in squared data units per nat.
        temperature: T in exp(-E/T).
    Raises:
        ValueError: If a setting is out of range, or a `target_acceptance` is given.
    Reference:
        Leimkuhler and Matthews (2013), Rational construction of stochastic numerical methods for
        molecular sampling, arXiv 1203.5428.
    """

    along_axes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target_acceptance is not None:
            raise ValueError("LeimkuhlerMatthews accepts every step and has no target_acceptance; use MALA.")

    def init(self, potential: Potential, x: Tensor, noise: Noise) -> State:
        # What the state carries beside itself is the last noise.
        return super().init(potential, x, noise)._replace(momentum=noise.normal(x))

    def step(
        self, potential: Potential, state: State, noise: Noise, dynamics: Dynamics
    ) -> tuple[State, Info]:
        x, last, fresh = state.x, state.momentum, noise.normal(state.x)
        assert last is not None
        step_size = expand(dynamics.step_size, x)
        scale = (dynamics.step_size * dynamics.temperature / 2).sqrt()
        drift, kick = step_size * state.gradient, (last + fresh).mul_(expand(scale, x))
        more = _along_axes(drift, kick, dynamics)
        x = (x - drift).add_(kick)
        x = x if more is None else x.add_(more)
        return State(x, *potential(x), fresh), Info()


def _along_axes(drift: Tensor, kick: Tensor, dynamics: Dynamics) -> Tensor | None:
    """What a step goes further along the axes, (batch, *event); None without any.

    In the metric M = 1 + Σ (η_a/η - 1) a aᵀ the drift is M g, and the noise has covariance M.
    """
    if dynamics.axes is None or dynamics.steps is None:
        return None
    longer = dynamics.steps / dynamics.step_size[..., None]
    parts = torch.cat([flat(drift), flat(kick)]) @ dynamics.axes.T
    down, up = parts.chunk(2)
    return ((up * (longer.sqrt() - 1) - down * (longer - 1)) @ dynamics.axes).reshape(drift.shape)
