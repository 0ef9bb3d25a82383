"""Several compositions as one potential, each on rows of its own.

    E(x)[row] = Σₜ w[row, t] Eₜ(x[row]),     t over the terms of all compositions

Terms that differ only in the coefficients inside them, as an OR of other weights does, are one term,
whose coefficients differ from row to row.

A row is evaluated only by networks that its own composition names: what it does not ask for costs
nothing, and cannot reach it, not even as 0 · ∞. On a CUDA device all rows go through all networks,
so that those of one architecture are one batched pass; there a term with weight 0 adds exactly 0 as
long as it is finite.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from composable_ebm.energy import Energy, Mixture, Not, Sum
from composable_ebm.energy.weights import Weight, coefficient_type, stack_weights
from composable_ebm.potential.plan import Plan
from composable_ebm.potential.potential import Part, Potential, Tally

__all__ = ["Plans", "as_one_batch"]


class Plans:
    """Plans of sums of terms, made once: moving a weight or joining a batch makes none. For one thread.

    Args:
        capacity: How many are kept; those not used for longest are dropped.
    Attributes:
        made: How many were made.
    """

    def __init__(self, capacity: int = 32) -> None:
        self.capacity = capacity
        self.made = 0
        self._plans: OrderedDict[Hashable, Plan] = OrderedDict()

    def potential(self, energy: Energy, like: Tensor, mask: Tensor | None = None) -> Potential:
        """The potential of one composition, with its coefficients, for a batch like `like`."""
        own = kinds_of(energy)
        terms = {kind: term for kind, (term, _) in own.items()}
        whole = Sum(list(terms.values()))  # of these terms, with the coefficients inside them, too
        rows = _on(like, coefficient_rows(terms, [own], [len(like)]))
        part = Part(whole, self._plan(terms, like.device.type != "cpu"))
        return Potential.of_parts([part], (None, mask, rows), lambda: (whole, rows))

    def potential_of_rows(
        self,
        energies: Sequence[Energy],
        sizes: Sequence[int],
        like: Tensor,
        mask: Tensor | None = None,
        tallies: Sequence[Tally] = (),
    ) -> Potential:
        """The potential of a batch whose blocks of rows have compositions of their own.

        Args:
            energies: One for each block.
            sizes: Rows of each block.
            like: A state, for device and dtype.
            mask: 1 where states may move.
            tallies: Count gradients.
        """
        stack = like.device.type != "cpu"
        expressions = [kinds_of(energy) for energy in energies]
        parts, coefficients = [], []
        for terms, readers in _shared_out(expressions, stack):
            plan = self._plan(terms, stack)
            name = tuple(sizes), readers
            parts.append(Part(plan.composition, plan, _rows(readers, sizes, like.device), name))
            own, counts = [expressions[i] for i in readers], [sizes[i] for i in readers]
            coefficients.append(_on(like, coefficient_rows(terms, own, counts)))

        def whole() -> tuple[Energy, Tensor]:
            together, rows = as_one_batch(energies)
            return together, _on(like, rows.repeat_interleave(torch.tensor(sizes), dim=0))

        return Potential.of_parts(parts, (None, mask, *coefficients), whole, tallies)

    def _plan(self, terms: Mapping[Any, Energy], stack: bool) -> Plan:
        key = (stack, *terms)
        if key not in self._plans:
            self._plans[key] = Plan(Sum(list(terms.values())), stack)
            self.made += 1
            if len(self._plans) > self.capacity:
                self._plans.popitem(last=False)
        self._plans.move_to_end(key)
        return self._plans[key]


def _on(like: Tensor, coefficients: Tensor) -> Tensor:
    return coefficients.to(device=like.device, dtype=coefficient_type(like))


def _rows(readers: Sequence[int], sizes: Sequence[int], device: torch.device) -> slice | Tensor | None:
    """The rows of some blocks: None for all, a slice where they lie together, else their indices."""
    if len(readers) == len(sizes):
        return None
    ends = torch.tensor(sizes).cumsum(0).tolist()
    if readers[-1] - readers[0] + 1 == len(readers):
        return slice(ends[readers[0]] - sizes[readers[0]], ends[readers[-1]])
    index = torch.cat([torch.arange(ends[i] - sizes[i], ends[i]) for i in readers])
    return index.to(device)


def as_one_batch(expressions: Sequence[Energy]) -> tuple[Sum, Tensor]:
    """Several compositions as one: a sum over all their terms, and a row of coefficients for each.

    Args:
        expressions: Compositions of one image space, whose weights are numbers.
    Returns:
        The sum, and coefficients (expressions, n) that make row i equal expression i.
    Raises:
        ValueError: If the weights of an expression differ from chain to chain.
    """
    for expression in expressions:
        if expression.coefficients.ndim > 1:
            raise ValueError(
                f"the weights of {expression} differ from chain to chain; here an expression is one row."
            )
    parts = [terms_of(expression) for expression in expressions]
    whole = Sum(list({key: term for each in parts for key, (term, _) in each.items()}.values()))
    terms = {term.key: term for term in whole.operands}
    return whole, coefficient_rows(terms, parts, [1] * len(expressions))


def terms_of(energy: Energy) -> dict[Hashable, tuple[Energy, Weight]]:
    """The terms of a composition and their weights, by key."""
    if isinstance(energy, Sum):
        return {term.key: (term, w) for term, w in zip(energy.operands, energy.weights, strict=True)}
    return {energy.key: (energy, 1.0)}


class Kind(NamedTuple):
    """What terms of several compositions are known by, whatever the coefficients inside them.

    Attributes:
        structure: See `structure_of`.
        repeat: How many terms of this structure come before it in its composition.
    """

    structure: Hashable
    repeat: int


def kinds_of(energy: Energy) -> dict[Kind, tuple[Energy, Weight]]:
    """The terms of a composition and their weights, by kind."""
    found: dict[Kind, tuple[Energy, Weight]] = {}
    seen: Counter[Hashable] = Counter()
    for term, weight in terms_of(energy).values():
        structure = structure_of(term)
        found[Kind(structure, seen[structure])] = term, weight
        seen[structure] += 1
    return found


def structure_of(energy: Energy) -> Hashable:
    """Equal for energies that are equal under equal coefficients."""
    if isinstance(energy, (Sum, Mixture, Not)):
        return type(energy), *map(structure_of, energy.operands)
    return energy.key


def coefficient_rows(
    terms: Mapping[Any, Energy],
    expressions: Sequence[Mapping[Any, tuple[Energy, Weight]]],
    sizes: Sequence[int],
) -> Tensor:
    """Coefficients of the sum of `terms` under which each block of rows has its own expression.

    Terms of an expression that are not among `terms` are left out.

    Args:
        terms: The terms of the sum, by key.
        expressions: The terms of one for each block and their weights, by the same keys.
        sizes: Rows of each block.
    Returns:
        float64, (Σ sizes, n).
    """
    blocks = []
    for own, size in zip(expressions, sizes, strict=True):
        found = {key: own.get(key, (term, 0.0)) for key, term in terms.items()}
        outer = stack_weights([weight for _, weight in found.values()])
        inner = [term.coefficients for term, _ in found.values() if term.num_coefficients]
        blocks.append(torch.cat([part.cpu().expand(size, -1) for part in (outer, *inner)], dim=1))
    return torch.cat(blocks)


def _shared_out(
    expressions: Sequence[Mapping[Kind, tuple[Energy, Weight]]], stack: bool
) -> list[tuple[dict[Kind, Energy], tuple[int, ...]]]:
    """The terms of all expressions, those that the same expressions need together, and who needs them.

    Terms that read one network go together, so that it is evaluated once; those of one structure do
    not, since a sum would merge them if their coefficients were equal too.
    """
    terms: dict[Kind, Energy] = {}
    readers: dict[Hashable, set[int]] = {}  # of each source
    for i, expression in enumerate(expressions):
        for kind, (term, _) in expression.items():
            terms.setdefault(kind, term)
            readers.setdefault(_source(term, stack), set()).add(i)
    shares: dict[Hashable, tuple[dict[Kind, Energy], tuple[int, ...]]] = {}
    for kind, term in terms.items():
        who = tuple(sorted(readers[_source(term, stack)]))
        shares.setdefault((who, kind.repeat), ({}, who))[0][kind] = term
    return list(shares.values())


def _source(term: Energy, stack: bool) -> Hashable:
    """What is evaluated to know a term: its network, where it has just one, or else the term itself."""
    bodies = {id(body) if (body := leaf.body()) is not None else None for leaf in term.leaves()}
    if None in bodies or (len(bodies) > 1 and not stack):
        return structure_of(term)
    return "networks" if stack else bodies.pop()
