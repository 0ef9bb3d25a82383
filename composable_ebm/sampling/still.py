"""The kernel that moves nothing, which leaves the reverse diffusion by itself."""

from __future__ import annotations

from dataclasses import dataclass

from composable_ebm.potential.potential import Potential
from composable_ebm.sampling.kernel import Dynamics, Info, Kernel, Noise, State

__all__ = ["Still"]


@dataclass(frozen=True)
class Still(Kernel):
    """x ← x.

    Under a schedule that predicts, chains then move between noise levels alone, by one gradient a level:
    x ← x - σ(σ - σ') ∂E/∂x, which is DDIM at η = 0, and Euler's method on the probability flow. Nothing
    corrects summed scores, which are not the score of the diffused sum; put `Langevin` in its place for
    that. By itself it samples nothing.

    Example:
        >>> levels = Schedule(noise_level=karras(80.0, 0.02), predict=True)
        >>> out = sample(face, num_steps=30, sampler=Annealed(Still(), levels))
    Reference:
        Song, Meng and Ermon (2021), arXiv 2010.02502, eq. 13; Karras et al. (2022), arXiv 2206.00364,
        section 3.
    """

    step_size: float = 1.0

    @property
    def gradients_per_step(self) -> int:
        return 0

    def step(
        self, potential: Potential, state: State, noise: Noise, dynamics: Dynamics
    ) -> tuple[State, Info]:
        return state, Info()
