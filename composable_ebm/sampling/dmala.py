"""The discrete Metropolis-adjusted Langevin algorithm, for bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from composable_ebm.energy import Energy, flat, require_values
from composable_ebm.potential.potential import Potential
from composable_ebm.sampling.kernel import Dynamics, Info, Kernel, Noise, State, expand, metropolis

__all__ = ["DMALA"]


@dataclass(frozen=True)
class DMALA(Kernel):
    """All bits proposed at once, each flipped by what the gradient expects of the flip, then accepted
    so that exp(-E/T) over bits is exactly invariant:

        p(flip xᵢ) = σ(½ (2xᵢ - 1) gᵢ/T - 1/(2η))
        log α = -(E(y) - E(x))/T + log q(x|y) - log q(y|x)

    (2xᵢ - 1) gᵢ is the fall in E that a flip promises to first order, g being the gradient of E as a
    function of real x. So it samples any energy of bits that autograd can follow, sums with networks
    included, by one gradient a step; where conditionals have a closed form `Gibbs` mixes faster.

    Args:
        step_size: η > 0, squared distance that one bit may cost in nats: flips become rarer as η
            falls, by exp(-1/(2η)), and at η → ∞ each bit follows its gradient alone.
        temperature: T in exp(-E/T).
        target_acceptance: Adapts η during warm-up; 0.574, as for `MALA`, is a good value.
    Reference:
        Zhang, Liu and Liu (2022), A Langevin-like sampler for discrete distributions, arXiv
        2206.09914, eq. 4 and algorithm 1; Grathwohl et al. (2021), Oops I took a gradient, arXiv
        2102.04509, and Zanella (2020), arXiv 1711.07424, for the square root that is the ½.
    """

    needs_energy: ClassVar[bool] = True

    def check(self, energy: Energy) -> None:
        if energy.binary:
            require_values("DMALA accepts steps by differences of energy", [energy])
        else:
            fitting = "MALA" if energy.has_value else "Langevin"
            raise ValueError(
                f"DMALA flips bits, and the states of {energy} are real: use {fitting}(step_size=0.01), or "
                f"ask it about bits: on_bits({energy})."
            )

    def step(
        self, potential: Potential, state: State, noise: Noise, dynamics: Dynamics
    ) -> tuple[State, Info]:
        flips = noise.uniforms(state.x) < self._odds(state, dynamics).sigmoid()
        if potential.mask is not None:
            flips = flips & potential.mask.bool()
        y = torch.where(flips, 1 - state.x, state.x)
        proposal = State(y, *potential(y))

        def log_q(start: State) -> Tensor:
            odds = self._odds(start, dynamics)
            each = F.logsigmoid(torch.where(flips, odds, -odds))
            if potential.mask is not None:
                each = each * potential.mask
            return flat(each).sum(1)

        log_alpha = (state.energy - proposal.energy) / dynamics.temperature + log_q(proposal) - log_q(state)
        return metropolis(state, proposal, log_alpha, noise)

    @staticmethod
    def _odds(state: State, dynamics: Dynamics) -> Tensor:
        """Log odds of a flip, (batch, *event)."""
        promise = (2 * state.x - 1) * state.gradient / expand(dynamics.temperature, state.x)
        return promise / 2 - expand(1 / (2 * dynamics.step_size), state.x)
