"""Hamiltonian Monte Carlo."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Self

from torch import Tensor

from composable_ebm.energy import flat
from composable_ebm.potential.potential import Potential
from composable_ebm.sampling.kernel import Dynamics, Info, Kernel, Noise, State, expand, metropolis

__all__ = ["HMC"]


@dataclass(frozen=True)
class HMC(Kernel):
    """Leapfrog steps of H(x, p) = E(x)/T + ‖p‖²/2 from a fresh momentum p = ξ, then accept by -ΔH:

        p ← p - (ε/2) g(x)/T,   x ← x + ε p,   p ← p - (ε/2) g(x)/T.

    With one leapfrog step it is `MALA` at η = ε²/(2T).

    Args:
        step_size: ε, in data units.
        temperature: T in exp(-E/T).
        num_leapfrog: Leapfrog steps, each one gradient.
        target_acceptance: Adapts ε during warm-up; 0.65 to 0.8 is usual.
    Reference:
        Neal (2011), MCMC using Hamiltonian dynamics, arXiv 1206.1901, section 5.2.
    """

    needs_energy: ClassVar[bool] = True

    num_leapfrog: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.num_leapfrog, int) or self.num_leapfrog < 1:
            raise ValueError(
                f"`num_leapfrog` must be a whole number of at least 1, got {self.num_leapfrog!r}."
            )

    @property
    def gradients_per_step(self) -> int:
        return self.num_leapfrog

    def scaled(self, factor: float) -> Self:
        # η = ε²/2, so the length ε goes with the root.
        return replace(self, step_size=self.step_size * math.sqrt(factor))

    def step(
        self, potential: Potential, state: State, noise: Noise, dynamics: Dynamics
    ) -> tuple[State, Info]:
        epsilon = expand(dynamics.step_size, state.x)
        force = -epsilon / (2 * expand(dynamics.temperature, state.x))
        start = noise.normal(state.x)
        here, momentum = state, start
        for _ in range(self.num_leapfrog):
            momentum = momentum + force * here.gradient
            x = here.x + epsilon * momentum
            here = State(x, *potential(x))
            momentum = momentum + force * here.gradient

        def hamiltonian(at: State, p: Tensor) -> Tensor:
            return at.energy / dynamics.temperature + flat(p).square().sum(1) / 2

        return metropolis(state, here, hamiltonian(state, start) - hamiltonian(here, momentum), noise)
