"""Gibbs sampling: each unit from its exact distribution given the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Self

import torch
from torch import Tensor

from composable_ebm.energy import Energy, Sum, flat
from composable_ebm.energy.conditionals import Conditionals
from composable_ebm.potential.potential import Potential
from composable_ebm.sampling.dmala import DMALA
from composable_ebm.sampling.kernel import Dynamics, Info, Kernel, Noise, State

RELAXED_STEP = 0.2
"""Step size of the `DMALA` that stands in for it, of which an RBM of digits accepts 57 %."""

__all__ = ["Gibbs"]


@dataclass(frozen=True)
class Gibbs(Kernel):
    """One sweep: the hidden units given the states, then the states given the hidden units.

        nⱼ ~ Binomial(w/T, σ(aⱼ)),   a = c + xW            of each term, w its coefficient
        η = Σ (w/T)(b + Cx) + W n                          summed over terms
        xᵢ ~ Bernoulli(σ(ηᵢ)) for bits, N(ηᵢ/λᵢ, 1/λᵢ) for reals

    in the symbols of `composable_ebm.energy.conditionals`. Units without a coupling are drawn together, as a
    block; units of a coupling in turn, group by group. There is no step size, every draw is taken,
    and exp(-E/T) is exactly invariant.

    It samples an energy that tells its conditionals, and any sum of such energies: hidden units
    stand side by side. A term with summed-out hidden units needs a whole w/T ≥ 0, as 2*rbm is an RBM
    that has each hidden unit twice, and half a hidden unit is none. All else is refused, and offered
    `DMALA`, which is also what takes its place where no sampler was asked for.

    The energy in a trace is that of the state that a sweep starts from.

    Args:
        temperature: T in exp(-E/T).
    Reference:
        Geman and Geman (1984), Stochastic relaxation, Gibbs distributions, and the Bayesian
        restoration of images; Ackley, Hinton and Sejnowski (1985), A learning algorithm for
        Boltzmann machines; Hinton (2002) for blocks.
    """

    step_size: float = field(default=1.0, init=False, repr=False)
    target_acceptance: float | None = field(default=None, init=False, repr=False)

    @property
    def gradients_per_step(self) -> int:
        return 0

    @property
    def energy_is_current(self) -> bool:
        return False

    def scaled(self, factor: float) -> Self:
        return self

    def check(self, energy: Energy) -> None:
        for term in _terms(energy):
            if term.conditionals() is None:
                raise ValueError(
                    f"Gibbs draws from conditional distributions, and those of {term} have no closed form; "
                    + (
                        "use the relaxation DMALA(step_size=0.2), which needs only its gradient."
                        if energy.binary
                        else "use a kernel that follows its gradient, such as "
                        f"{'MALA' if energy.has_value else 'Langevin'}(step_size=0.01)."
                    )
                )

    def suited(self, energy: Energy, coefficients: Tensor) -> Kernel:
        """This kernel, or the relaxation `DMALA` for an energy of bits that it would refuse."""
        if not energy.binary:
            return self
        relaxed = DMALA(RELAXED_STEP, self.temperature)
        if any(term.conditionals() is None for term in _terms(energy)):
            return relaxed
        parts = _parts(energy, coefficients, coefficients.new_full((), self.temperature))
        whole = all(bool(_is_whole(weight).all()) for part, weight in parts if part.hidden)
        return self if whole else relaxed

    def init(self, potential: Potential, x: Tensor, noise: Noise) -> State:
        parts = _parts(potential.composition, potential.coefficients, x.new_full((), self.temperature))
        for term, (conditionals, weight) in zip(_terms(potential.composition), parts, strict=True):
            if conditionals.hidden and not bool(_is_whole(weight).all()):
                raise ValueError(
                    f"Gibbs needs a whole number of each hidden unit, and {term} has summed-out hidden units "
                    f"and weight/temperature {_show(weight)}: use whole weights and temperature 1, or the "
                    "relaxation DMALA(step_size=0.2)."
                )
        return State(x, x.new_zeros(len(x)), torch.zeros_like(x))

    @torch.no_grad()
    def step(
        self, potential: Potential, state: State, noise: Noise, dynamics: Dynamics
    ) -> tuple[State, Info]:
        parts = _parts(potential.composition, potential.coefficients, dynamics.temperature)
        x = flat(state.x)
        energy, eta = x.new_zeros(len(x)), x.new_zeros(())
        precision: Tensor | float = 0.0
        for part, weight in parts:
            column = weight[:, None] if weight.ndim else weight
            fields = part.hidden_fields(x) if part.weight is not None else None
            term = weight * part.energy(x, fields)
            eta = eta + column * part.field
            if fields is not None:
                assert part.weight is not None
                # A weight that was moved to no whole number freezes its chains: loud, without a wait.
                term = torch.where(_is_whole(weight), term, torch.nan)
                count = weight.round().clamp(min=0)
                on = noise.binomial(count, fields.sigmoid().nan_to_num(0.0))
                eta = torch.addmm(eta, on, part.weight.T)
            if part.precision is not None:
                precision = precision + column * part.precision
            energy = energy + term
        mask = potential.mask
        free = None if mask is None else flat(torch.broadcast_to(mask, state.x.shape)).bool()
        if potential.composition.binary:
            if isinstance(precision, Tensor):
                eta = eta - precision / 2  # for bits x² is x
            drawn = _drawn_bits(x, eta, parts, noise, free)
        else:
            drawn = eta / precision + noise.normal(x) * precision**-0.5
        if free is not None:
            drawn = torch.where(free, drawn, x)
        return State(drawn.reshape(state.x.shape), energy * dynamics.temperature, state.gradient), Info()


def _drawn_bits(
    x: Tensor,
    eta: Tensor,
    parts: Sequence[tuple[Conditionals, Tensor]],
    noise: Noise,
    free: Tensor | None,
) -> Tensor:
    """Bits (batch, size) given the hidden units, where `free`; η are their fields but for couplings."""
    eta = eta.expand_as(x)
    coupled = [(part, weight) for part, weight in parts if part.coupling is not None]
    if not coupled:
        return noise.bits(eta.sigmoid())
    u, old, x = noise.uniforms(x), x, x.clone()
    for group in _groups(tuple(part.groups for part, _ in coupled), x.device):
        local = eta[:, group]
        for part, weight in coupled:
            assert part.coupling is not None
            local = local + (weight[:, None] if weight.ndim else weight) * (x @ part.coupling[:, group])
        drawn = (u[:, group] < local.sigmoid()).to(x.dtype)
        x[:, group] = drawn if free is None else torch.where(free[:, group], drawn, old[:, group])
    return x


def _terms(energy: Energy) -> Sequence[Energy]:
    return energy.operands if isinstance(energy, Sum) else (energy,)


def _parts(energy: Energy, coefficients: Tensor, temperature: Tensor) -> list[tuple[Conditionals, Tensor]]:
    """The conditionals of each term, and its coefficient over the temperature, () or (batch,)."""
    if not isinstance(energy, Sum):
        return [(_told(energy), 1 / temperature)]
    if len(coefficients) == 1 and coefficients.ndim == 2:
        coefficients = coefficients[0]
    return [(_told(term), coefficients[..., i] / temperature) for i, term in enumerate(energy.operands)]


def _told(term: Energy) -> Conditionals:
    found = term.conditionals()
    if found is None:
        raise ValueError(f"the conditionals of {term} have no closed form.")
    return found


def _is_whole(weight: Tensor) -> Tensor:
    return ((weight - weight.round()).abs() < 1e-4) & (weight > -1e-4)


def _show(weight: Tensor) -> str:
    values = weight.unique().tolist()
    return ", ".join(f"{v:.6g}" for v in values[:4])


@lru_cache(maxsize=64)
def _groups(labels: tuple[tuple[int, ...], ...], device: torch.device) -> tuple[Tensor, ...]:
    """Units that no coupling connects, as indices; a coupling's labels tell which those are."""
    members: dict[tuple[int, ...], list[int]] = {}
    for unit, key in enumerate(zip(*labels, strict=True)):
        members.setdefault(key, []).append(unit)
    return tuple(torch.tensor(group, device=device) for group in members.values())
