"""The parts of a composition: what each has to say about pictures, alone, and at another weight.

A part is a term of a sum, or a value of an expert together with what it is divided by, as in
`2*ratio(smile, smile[any])`. An OR of several is a group of parts. Everything here reads the composition
itself, so that how its recipe is written does not matter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from composable_ebm.energy import Energy, LeafEnergies, Mixture, Not, Sum
from composable_ebm.energy.carrier import satisfied
from composable_ebm.experts import Expert
from composable_ebm.pipelines import Pipeline, Prompt
from composable_ebm.pipelines.prompts import Without
from composable_ebm.potential.plan import Plan

__all__ = ["Part", "Term", "alone", "left_out", "named", "parts", "reweighted", "terms", "with_marginals"]


class Part(NamedTuple):
    """A part of a composition.

    Attributes:
        asked: What is asked for: an expert at a value, its complement, or any other energy.
        weight: How strongly, a mean where rows differ.
        against: What it is divided by, if anything.
        group: The OR it stands in, counted from 1; 0 beside all others.
    """

    asked: Energy
    weight: float
    against: Energy | None = None
    group: int = 0

    @property
    def name(self) -> str:
        """Its text in a recipe, without its weight and what it is divided by."""
        left = left_out(self.asked)
        return str(self.asked) if left is None else f"~{left}"

    @property
    def energy(self) -> Energy:
        """The part without its weight."""
        return self.asked if self.against is None else Sum([self.asked, self.against], [1.0, -1.0])

    @property
    def whole(self) -> Energy:
        """The part with its weight."""
        return Sum([self.energy], [self.weight])


class Term(NamedTuple):
    """What one part says, averaged over the pictures.

    Attributes:
        name: Of the part.
        weight: Its weight.
        energy: Its energy in nats, weight left out; of a ratio of a value a to any, -log p(a | x). Not a
            number where it has none.
        probability: p(a | x), where the part is of an expert that knows other values.
        group: The OR it stands in; 0 beside all others.
    """

    name: str
    weight: float
    energy: float
    probability: float | None
    group: int = 0


def parts(energy: Energy) -> list[Part]:
    """The parts of a composition: a value and its marginal, with opposite weights, together, and each
    expert of an OR by itself."""
    found: list[Part] = []
    count = 0
    for part in _divided(Sum([energy])):
        if isinstance(part.asked, Mixture) and part.against is None and _chosen(part.asked) is None:
            count += 1
            for component in part.asked.operands:
                found += [
                    each._replace(weight=part.weight * each.weight, group=count)
                    for each in _divided(Sum([component]))
                ]
        else:
            found.append(part)
    return found


def _divided(whole: Sum) -> list[Part]:
    """The terms of a sum, each with its share of the marginal that it is divided by."""
    standing, counted = _on_a_base(whole)
    found = []
    groups: dict[Hashable, list[tuple[Energy, float]]] = {}
    for term, weight in counted:
        key = term.key if _is_or(term) else _bodies(term)
        groups.setdefault(key, []).append((term, weight))
    for group in groups.values():
        marginals = [pair for pair in group if _is_marginal(pair[0])]
        values = [pair for pair in group if not _is_marginal(pair[0])]
        balanced = abs(sum(weight for _, weight in group)) < 1e-6
        if len(marginals) == 1 and values and balanced and marginals[0][1] < 0:
            found += [Part(term, weight, marginals[0][0]) for term, weight in values]
        elif len(group) == 2 and balanced:
            (asked, weight), (against, _) = sorted(group, key=lambda pair: -pair[1])
            found.append(Part(asked, weight, against))
        else:
            found += [Part(term, weight) for term, weight in group]
    return found + standing


def _on_a_base(whole: Sum) -> tuple[list[Part], list[tuple[Energy, float]]]:
    """The terms that stand on a base, each divided by it, and all others, with as much of the base as that
    takes: E(x, y) = E_base(x) - log p(y | x), so that -2*base + 3*smile is base + 3*ratio(smile, base)."""
    found: list[Part] = []
    others: dict[Hashable, tuple[Energy, float]] = {}
    for term, weight in zip(whole.operands, whole.weights, strict=True):
        amount = float(torch.as_tensor(weight).mean())
        if (base := _stands_on(term)) is not None:
            negated = amount < 0 and isinstance(term, Prompt)
            found.append(Part(~term if negated else term, abs(amount) if negated else amount, base))
            term = base
        others[term.key] = term, amount + others.get(term.key, (term, 0.0))[1]
    used = {part.against.key for part in found if part.against is not None}
    return found, [pair for key, pair in others.items() if key not in used or abs(pair[1]) > 1e-6]


def _stands_on(term: Energy) -> Energy | None:
    """What a term adds an attribute or a prompt to, where that stands still."""
    if isinstance(term, Prompt):
        return term.pipeline
    chosen = _chosen(term)
    return None if chosen is None else chosen[0].base


def _is_or(term: Energy) -> bool:
    """Whether it is an OR of parts that are each divided by something already."""
    return isinstance(term, Mixture) and any(isinstance(each, Sum) for each in term.operands)


def _bodies(term: Energy) -> Hashable:
    """The networks that it reads."""
    return frozenset(id(leaf.body()) if leaf.body() is not None else leaf.key for leaf in term.leaves())


def _is_marginal(term: Energy) -> bool:
    return isinstance(term, Expert) and term.value is None


def _chosen(energy: Energy) -> tuple[Expert, frozenset[int]] | None:
    """An expert, and which of its values are asked for."""
    if isinstance(energy, Expert):
        known = len(energy.card.values) > 1 and energy.value is not None
        return (energy, frozenset([energy.value or 0])) if known else None
    if not isinstance(energy, Mixture):
        return None
    members = [_chosen(each) if isinstance(each, Expert) else None for each in energy.operands]
    chosen = [each for each in members if each is not None]
    if len(chosen) != len(members) or len({id(expert.network) for expert, _ in chosen}) != 1:
        return None
    return chosen[0][0], frozenset().union(*(values for _, values in chosen))


def named(energy: Energy) -> list[Expert | Pipeline | Prompt] | None:
    """What a composition names; None where that is anything else than experts and prompts."""
    if isinstance(energy, (Expert, Pipeline, Prompt)):
        return [energy]
    if not isinstance(energy, (Sum, Mixture, Not)):
        return None
    inner = [named(each) for each in energy.operands]
    return None if None in inner else [each for many in inner for each in many or ()]


def left_out(energy: Energy) -> Expert | Prompt | None:
    """The expert at the one value that a mixture of all its others leaves out, as in `~digit[3]`, or the
    prompt that is not wanted."""
    if isinstance(energy, Without):
        return energy.prompt
    if not isinstance(energy, Mixture) or (chosen := _chosen(energy)) is None:
        return None
    expert, values = chosen
    left = set(range(len(expert.card.values))) - values
    return expert[expert.card.values[left.pop()]] if len(left) == 1 and len(values) > 1 else None


# -- what they say ------------------------------------------------------------------------------------------


def terms(
    energy: Energy, x: Tensor, noise_level: Tensor | None = None, plan: Plan | None = None
) -> tuple[list[Term], Tensor | None]:
    """What each part of `energy` says at states `x`, and which of them meet it by the experts' verdicts.

    Args:
        energy: A composition.
        x: States, (batch, *event).
        noise_level: Noise that they carry, in data units.
        plan: How to evaluate the leaves of `with_marginals(energy)`, where that is known already.
    """
    found = []
    with torch.no_grad():
        leaves = (plan or Plan(with_marginals(energy)))(x, noise_level)
        for part in parts(energy):
            said, likely = _value(part.asked, leaves, x), None
            marginal = part.asked.marginal() if part.weight > 0 and _chosen(part.asked) else None
            if marginal is not None:
                likely = float((_value(marginal, leaves, x) - said).clamp(max=0).exp().mean())
            if part.against is not None:
                said = said - _value(part.against, leaves, x)
            valued = all(leaf.has_value for leaf in part.asked.leaves())
            energy_of = float(said.mean()) if valued else math.nan  # prompts are known by their score
            found.append(Term(part.name, part.weight, energy_of, likely, part.group))
        return found, satisfied(energy, leaves, energy.coefficients.to(x))


def with_marginals(energy: Energy) -> Energy:
    """The composition, with the marginals that it takes to say how likely its parts are."""
    marginals = [marginal for leaf in energy.leaves() if (marginal := leaf.marginal()) is not None]
    return Sum([energy, *marginals]) if marginals else energy


def _value(energy: Energy, leaves: LeafEnergies, x: Tensor) -> Tensor:
    return energy.combine(leaves, energy.coefficients.to(x))


# -- at other weights, and alone ----------------------------------------------------------------------------


def reweighted(energy: Energy, weights: Mapping[str, float]) -> Energy:
    """The composition with other weights of some parts, by name; a weight below zero asks a binary expert
    for its other value."""
    return _rebuilt(Sum([energy]), weights)


def _rebuilt(whole: Sum, weights: Mapping[str, float]) -> Energy:
    terms, amounts = [], []
    for part in _divided(whole):
        asked, amount = part.asked, weights.get(part.name, part.weight)
        if isinstance(asked, Mixture) and part.against is None and _chosen(asked) is None:
            inner = [_rebuilt(Sum([each]), weights) for each in asked.operands]
            asked, amount = Mixture(inner, asked.weights, asked.log_z), part.weight
        elif amount < 0 < part.weight and isinstance(asked, Expert) and len(asked.card.values) == 2:
            asked, amount = ~asked, -amount
        terms.append(asked)
        amounts.append(amount)
        if part.against is not None:
            terms.append(part.against)
            amounts.append(-amount)
    return Sum(terms, amounts)


def alone(energy: Energy, is_base: Callable[[Energy], bool]) -> list[tuple[str, Energy]]:
    """Every part by itself, beside the p(x) that all share where there is one: (name, energy)."""
    found = parts(energy)
    base = [part.asked for part in found if is_base(part.asked)]
    return [
        (part.name, Sum([*base, part.energy], [*[1.0] * len(base), part.weight]))
        for part in found
        if not is_base(part.asked)
    ]
