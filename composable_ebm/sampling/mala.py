"""The Metropolis-adjusted Langevin algorithm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from composable_ebm.energy import flat
from composable_ebm.potential.potential import Potential
from composable_ebm.sampling.kernel import Dynamics, Info, Kernel, Noise, State, expand, metropolis

__all__ = ["MALA"]


@dataclass(frozen=True)
class MALA(Kernel):
    """A Langevin step y = x - η g(x) + √(2ηT) ξ, accepted so that exp(-E/T) is exactly invariant:

        log α = -(E(y) - E(x))/T + log q(x|y) - log q(y|x),
        log q(y|x) = -‖y - x + η g(x)‖²/(4ηT).

    Without the accept step it is `Langevin(step_size, temperature)`.

    Args:
        step_size: η, in squared data units per nat.
        temperature: T in exp(-E/T).
        target_acceptance: Adapts η during warm-up; 0.574 is optimal in high dimension.
    Reference:
        Roberts and Tweedie (1996); Roberts and Rosenthal (1998) for 0.574.
    """

    needs_energy: ClassVar[bool] = True

    def step(
        self, potential: Potential, state: State, noise: Noise, dynamics: Dynamics
    ) -> tuple[State, Info]:
        eta, temperature = dynamics.step_size, dynamics.temperature
        xi = (2 * eta * temperature).sqrt()
        y = state.x - expand(eta, state.x) * state.gradient + expand(xi, state.x) * noise.normal(state.x)
        proposal = State(y, *potential(y))

        def log_q(to: State, start: State) -> Tensor:
            residual = to.x - start.x + expand(eta, start.x) * start.gradient
            return -flat(residual).square().sum(1) / (4 * eta * temperature)

        log_alpha = (
            (state.energy - proposal.energy) / temperature + log_q(state, proposal) - log_q(proposal, state)
        )
        return metropolis(state, proposal, log_alpha, noise)
