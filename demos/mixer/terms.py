"""What each part of a recipe has to say about the current picture."""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

import torch
from torch import Tensor

from composable_ebm.energy import Energy, Sum
from composable_ebm.sampling.fusion import LeafPlan, fuse

__all__ = ["Term", "terms"]


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
    """The terms of `energy` at states `x`, a value and its marginal taken together as their ratio.

    Args:
        energy: A recipe.
        x: States, (batch, *event).
        noise_level: Noise that they carry, in data units.
        plan: How to evaluate the leaves, where that is known already.
    """
    whole = Sum([energy])
    with torch.no_grad():
        leaves = (plan or fuse(energy, stack=False))(x, noise_level)
        parts = [
            (term, float(torch.as_tensor(weight).mean()), term.combine(leaves, term.coefficients.to(x)))
            for term, weight in zip(whole.operands, whole.weights, strict=True)
        ]
    groups: dict[Hashable, list[tuple[Energy, float, Tensor]]] = {}
    for part in parts:
        bodies = {id(leaf.body()) if leaf.body() is not None else leaf.key for leaf in part[0].leaves()}
        groups.setdefault(frozenset(bodies), []).append(part)
    found = []
    for group in groups.values():
        if len(group) == 2 and abs(group[0][1] + group[1][1]) < 1e-6:
            (asked, weight, own), (_, _, marginal) = sorted(group, key=lambda part: -part[1])
            information = own - marginal
            likely = float((-information).clamp(max=0).exp().mean())
            found.append(Term(str(asked), weight, float(information.mean()), likely))
        else:
            found += [Term(str(term), weight, float(own.mean()), None) for term, weight, own in group]
    return found
