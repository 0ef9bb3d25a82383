"""What each part of a recipe has to say about the current picture."""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

import torch
from torch import Tensor

from composable_ebm.energy import Energy, LeafEnergies, Mixture, Sum
from composable_ebm.experts import Expert
from composable_ebm.potential.plan import LeafPlan, fuse

__all__ = ["Term", "parts", "terms"]


class Term(NamedTuple):
    """One term of a recipe, averaged over the pictures.

    Attributes:
        name: Its text, without its weight.
        weight: Its weight.
        energy: Its energy in nats, weight left out; of a ratio of a value a to any, -log p(a | x).
        probability: p(a | x) of such a ratio; None for any other term.
    """

    name: str
    weight: float
    energy: float
    probability: float | None


def terms(
    energy: Energy, x: Tensor, noise_level: Tensor | None = None, plan: LeafPlan | None = None
) -> list[Term]:
    """The terms of `energy` at states `x`, a value and its marginal taken together as their ratio, and
    each expert of an OR by itself, named "or ...".

    Args:
        energy: A recipe.
        x: States, (batch, *event).
        noise_level: Noise that they carry, in data units.
        plan: How to evaluate the leaves, where that is known already.
    """
    with torch.no_grad():
        return _told(energy, (plan or fuse(energy, stack=False))(x, noise_level), x)


def _told(energy: Energy, leaves: LeafEnergies, x: Tensor, prefix: str = "") -> list[Term]:
    found = []
    for (asked, weight), *rest in parts(Sum([energy])):
        if not rest and isinstance(asked, Mixture) and len({_bodies(each) for each in asked.operands}) > 1:
            for component in asked.operands:
                found += _told(weight * component, leaves, x, "or ")
            continue
        said = asked.combine(leaves, asked.coefficients.to(x))
        likely = None
        if rest:
            marginal = rest[0][0]
            said = said - marginal.combine(leaves, marginal.coefficients.to(x))
            likely = float((-said).clamp(max=0).exp().mean())
        found.append(Term(f"{prefix}{asked}", weight, float(said.mean()), likely))
    return found


def parts(whole: Sum) -> list[list[tuple[Energy, float]]]:
    """The terms of a sum with their weights, means where rows differ: each by itself, but a value and
    its marginal, with opposite weights, together, the value first."""
    groups: dict[Hashable, list[tuple[Energy, float]]] = {}
    for term, weight in zip(whole.operands, whole.weights, strict=True):
        mean = float(torch.as_tensor(weight).mean())
        groups.setdefault(_bodies(term), []).append((term, mean))
    found = []
    for group in groups.values():
        if len(group) == 2 and abs(group[0][1] + group[1][1]) < 1e-6:
            found.append(sorted(group, key=lambda part: (_is_marginal(part[0]), -part[1])))
        else:
            found += [[part] for part in group]
    return found


def _bodies(term: Energy) -> Hashable:
    """The networks that it reads."""
    return frozenset(id(leaf.body()) if leaf.body() is not None else leaf.key for leaf in term.leaves())


def _is_marginal(term: Energy) -> bool:
    return isinstance(term, Expert) and term.value is None
