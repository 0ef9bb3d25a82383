"""Which density of a composition carries samples, and what the rest says of them.

Bayes' rule splits a composition into a density that knows what pictures look like, and probabilities
of what is asked for:

    E(x) = E_c(x) - G(x),      G(x) = Σᵢ wᵢ log pᵢ(aᵢ | x)

    E_c   the carrier: the one density that is left when every value of an expert is written as
          E(x, a) = E(x) - log p(a | x), its marginal and its posterior
    G     what experts and classifiers say of x: of the order of a nat an attribute

`given(base, a, b)` is carried by base, `digit[3]` and `digit[3] | digit[8]` by digit["any"]. A plain
sum of two experts has two carriers: it counts p(x) twice, and no part of it is of the order of a nat.

The verdict of an expert is whether it thinks its value likelier than not, p(a | x) ≥ ½, or surer than that.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping

import torch
from torch import Tensor

from composable_ebm.energy.base import Energy, LeafEnergies
from composable_ebm.energy.nodes import Mixture, Not, Sum

AGAINST = 1e6
"""Energy of a value that an expert's verdict denies, in nats: as good as impossible."""

_TOLERANCE = 1e-5

__all__ = ["NotCarriedError", "carrier", "satisfied", "settled"]


class NotCarriedError(ValueError):
    """A composition that is not one density times probabilities; the message says why."""


def carrier(energy: Energy, coefficients: Tensor | None = None) -> Energy:
    """The density E_c that carries a composition.

    Args:
        energy: A composition.
        coefficients: Replaces its coefficients, (n,).
    Raises:
        NotCarriedError: If there is no such density, or nothing beside it, or it is not known at
            every noise level.
    Example:
        >>> carrier(given(face, smile, ~beard)) is face
        True
    """
    coefficients = energy.coefficients if coefficients is None else coefficients
    if coefficients.ndim > 1:
        raise NotCarriedError(f"the weights of {energy} differ from chain to chain")
    if not energy.has_value:
        raise NotCarriedError(
            f"{energy} is known only by its gradient, so that nothing can be weighed; correct it at each "
            "level instead, by a kernel that compares no energies such as Langevin"
        )
    left = {key: (e, w) for key, (e, w) in _densities(energy, coefficients).items() if abs(w) > _TOLERANCE}
    if len(left) != 1:
        names = " and ".join(f"{w:g}*{e}" for e, w in left.values()) or "no density at all"
        raise NotCarriedError(
            f"{energy} is not one density times probabilities: it counts {names}"
            + ("; given(base, a, b) counts p(x) once" if left else "")
        )
    ((found, weight),) = left.values()
    if abs(weight - 1) > _TOLERANCE:
        raise NotCarriedError(f"{energy} takes its density {found} to the power {weight:g}")
    if not found.noise_conditioned:
        raise NotCarriedError(f"{found} is not known at every noise level")
    if found.key == energy.key:
        raise NotCarriedError(f"{energy} asks for nothing beside its density")
    return found


def _densities(energy: Energy, coefficients: Tensor) -> dict[Hashable, tuple[Energy, float]]:
    """The densities that a composition counts, by key, and how often."""
    if isinstance(energy, Not) or energy.likelihood:
        return {}
    if isinstance(energy, Sum):
        own, blocks = energy.split(coefficients)
        counted: dict[Hashable, tuple[Energy, float]] = {}
        for term, block, weight in zip(energy.operands, blocks, own.tolist(), strict=True):
            for key, (density, count) in _densities(term, block).items():
                before = counted[key][1] if key in counted else 0.0
                counted[key] = density, before + weight * count
        return {key: pair for key, pair in counted.items() if abs(pair[1]) > _TOLERANCE}
    if isinstance(energy, Mixture):
        _, blocks = energy.split(coefficients)
        each = [_densities(c, block) for c, block in zip(energy.operands, blocks, strict=True)]
        alike = all(
            one.keys() == each[0].keys()
            and all(abs(one[key][1] - each[0][key][1]) <= _TOLERANCE for key in one)
            for one in each
        )
        return each[0] if alike else {energy.key: (energy, 1.0)}
    marginal = energy.marginal()
    density = energy if marginal is None else marginal
    return {density.key: (density, 1.0)}


def settled(
    energy: Energy, energies: LeafEnergies, doubts: Mapping[Hashable, float] = {}
) -> dict[Hashable, Tensor] | None:
    """The energies of leaves with every posterior replaced by its verdict: certain, or impossible.

    `energy.combine(settled(energy, energies), coefficients)` is E_c where the request is met, and
    larger by about `AGAINST` where it is not; in an OR of weights w, by -log w less.

    Args:
        energy: A composition.
        energies: Those of its leaves and of their marginals, by key, (batch,) each.
        doubts: 1 - p(a | x) up to which a verdict is yes, by the key of a leaf; a half unless given.
    Returns:
        None where no verdict can be given: an expert is divided by, or there is none.
    """
    against = _denied(energy)
    replaced: dict[Hashable, Tensor] = dict(energies)
    found = False
    for leaf in energy.leaves():
        marginal = leaf.marginal()
        if not leaf.likelihood and (marginal is None or marginal.key == leaf.key):
            continue
        if leaf.key in against:
            return None
        ground = torch.zeros_like(energies[leaf.key]) if marginal is None else energies[marginal.key]
        no = energies[leaf.key] - ground > -math.log1p(-doubts.get(leaf.key, 0.5))
        replaced[leaf.key] = ground + AGAINST * no
        found = True
    return replaced if found else None


def _denied(energy: Energy, sign: float = 1.0) -> set[Hashable]:
    """Leaves that are conditional, and divided by or inside a bounded NOT."""
    if isinstance(energy, Sum):
        weights = [float(torch.as_tensor(w).min()) for w in energy.weights]
        pairs = zip(energy.operands, weights, strict=True)
        return {key for term, w in pairs for key in _denied(term, sign * w)}
    if isinstance(energy, Not):
        return {leaf.key for leaf in energy.leaves()}
    if isinstance(energy, Mixture):
        return {key for component in energy.operands for key in _denied(component, sign)}
    return {leaf.key for leaf in energy.leaves()} if sign < 0 else set()


def satisfied(
    energy: Energy,
    energies: LeafEnergies,
    coefficients: Tensor,
    doubts: Mapping[Hashable, float] = {},
) -> Tensor | None:
    """Which states meet a composition by the verdicts of its experts, (batch,).

    An AND is met where all its terms are, an OR where one component is.

    Args:
        energy: A composition.
        energies: Those of its leaves and of their marginals, by key, (batch,) each.
        coefficients: Those of the composition, (n,) or (batch, n).
        doubts: Those of the leaves, see `settled`.
    Returns:
        None where no verdict can be given, see `settled`.
    """
    replaced = settled(energy, energies, doubts)
    if replaced is None:
        return None
    met: Mapping[Hashable, Tensor] = {key: _met(energies[key], value) for key, value in replaced.items()}
    difference = energy.combine(replaced, coefficients) - energy.combine(met, coefficients)
    return difference < 1e-3 * AGAINST


def _met(before: Tensor, after: Tensor) -> Tensor:
    """A leaf's energy if its verdict were yes."""
    return torch.where(after - before > 0.5 * AGAINST, after - AGAINST, after)
