"""The potential of a composition: states, coefficients, noise level, mask -> energies and gradients.

    E(x)[row] = Σₜ w[row, t] Eₜ(x[row]),     t over the terms, of one composition or of several

A potential is a value: it changes nothing of itself, and `at` gives the same energies at other
coefficients, another noise level or mask. All such values share one plan of how their terms are evaluated,
with the weights in their layouts, so a chain moves a slider or a noise level by naming it.

Where several compositions share a batch, each on rows of its own, the terms that the same rows ask
for are a *part*: a row is evaluated only by networks that its own composition names, see `rows`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from composable_ebm.energy import Energy, Sum, independent
from composable_ebm.potential.plan import Plan

__all__ = ["Inputs", "Part", "Potential", "Tally"]

Inputs = tuple[Tensor | None, ...]
"""What a potential reads beside states: noise level, mask, and the coefficients of each part."""

_AS_IT_IS: Any = object()


@dataclass
class Tally:
    """Counts gradients, for reports."""

    gradients: int = 0


class Part(NamedTuple):
    """Terms that are evaluated at the same rows.

    Attributes:
        composition: What they make up, at coefficients of its own.
        plan: How its leaves are evaluated.
        rows: None for all, a slice where they lie together, else their indices.
        name: Equal where the rows are.
    """

    composition: Energy
    plan: Plan
    rows: slice | Tensor | None = None
    name: Hashable = None


class Potential:
    """x, (batch, *event) -> E(x), (batch,), and ∂E/∂x, shape of `x`.

    Args:
        composition: Any energy.
        coefficients: Shape (n,) or (batch, n); those of the expression unless given.
        noise_level: Noise that states carry, () or (batch,), in data units; None for none.
        mask: 1 where states may move, 0 where they are held; broadcasts over states. The gradient
            is zero where they are held, so kernels sample the free part given the rest.
        stack: Runs networks of one architecture as one batched pass; on CUDA devices unless given.
        tallies: Count the gradients that it takes.
    Example:
        >>> potential = Potential(smile + glasses)
        >>> energy, gradient = potential.at(noise_level=torch.tensor(0.5))(x)
    """

    def __init__(
        self,
        composition: Energy,
        coefficients: Tensor | None = None,
        *,
        noise_level: Tensor | None = None,
        mask: Tensor | None = None,
        stack: bool | None = None,
        tallies: Sequence[Tally] = (),
    ) -> None:
        if stack is None:
            stack = any(parameter.is_cuda for parameter in composition.parameters())
        part = Part(composition, Plan(composition, stack))
        given = composition.coefficients if coefficients is None else coefficients
        self._set([part], (noise_level, mask, given), tallies, lambda: (composition, given))

    @classmethod
    def of_parts(
        cls,
        parts: Sequence[Part],
        inputs: Inputs,
        whole: Callable[[], tuple[Energy, Tensor]],
        tallies: Sequence[Tally] = (),
    ) -> Self:
        """A potential of terms that are planned already; see `rows`.

        Args:
            parts: The terms, by who asks for them.
            inputs: See `Inputs`.
            whole: Gives all of it as one composition and its coefficients, for those who ask.
            tallies: Count the gradients that it takes.
        """
        potential = cls.__new__(cls)
        potential._set(parts, inputs, tallies, whole)
        return potential

    def _set(self, parts, inputs, tallies, whole) -> None:
        self.parts: list[Part] = list(parts)
        self.inputs: Inputs = inputs
        self.tallies: tuple[Tally, ...] = tuple(tallies)
        self._whole: Callable[[], tuple[Energy, Tensor]] = whole

    # -- other values of the same potential ----------------------------------------------------------

    def at(
        self,
        *,
        coefficients: Tensor = _AS_IT_IS,
        noise_level: Tensor | None = _AS_IT_IS,
        mask: Tensor | None = _AS_IT_IS,
    ) -> Self:
        """The same energies at other coefficients (of one composition), noise level or mask."""
        level, held, *own = self.inputs
        level = level if noise_level is _AS_IT_IS else noise_level
        held = held if mask is _AS_IT_IS else mask
        if coefficients is _AS_IT_IS:
            return self._with((level, held, *own))
        (part,) = self.parts
        other = self._with((level, held, coefficients))
        other._whole = lambda: (part.composition, coefficients)
        return other

    def reading(self, inputs: Inputs) -> Self:
        """The same energies at these `inputs`, for a step that is captured: it counts nothing."""
        other = self._with(inputs)
        other.tallies = ()
        return other

    def _with(self, inputs: Inputs) -> Self:
        other = type(self).__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.inputs = inputs
        return other

    # -- evaluation ----------------------------------------------------------------------------------

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """E(x) and ∂E/∂x.

        Raises:
            ValueError: If the energy does not depend on `x`.
        """
        for tally in self.tallies:
            tally.gradients += 1
        level, mask, *coefficients = self.inputs
        if len(self.parts) == 1 and self.parts[0].rows is None:
            (part,), (own,) = self.parts, coefficients
            energy, gradient = part.plan.gradient(x, level, part.composition, own)  # type: ignore[arg-type]
            if gradient is None:
                raise ValueError(independent(part.composition))
        else:
            energy, gradient = self._by_parts(x, level, coefficients)  # type: ignore[arg-type]
        return energy, gradient if mask is None else gradient * mask

    def _by_parts(
        self, x: Tensor, level: Tensor | None, coefficients: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        gradient = torch.zeros_like(x)
        energy: Tensor | None = None
        for part, own in zip(self.parts, coefficients, strict=True):
            rows = part.rows
            at = level if rows is None or level is None or not level.ndim else level[rows]
            states = x if rows is None else x[rows]
            said, slope = part.plan.gradient(states, at, part.composition, own)
            energy = said.new_zeros(len(x)) if energy is None else energy
            # A part of a composition may be constant: the whole has been checked.
            for total, addend in ((energy, said), (gradient, slope)):
                if addend is None:
                    continue
                if isinstance(rows, Tensor):
                    total.index_add_(0, rows, addend)
                else:
                    total[slice(None) if rows is None else rows] += addend
        assert energy is not None
        return energy, gradient

    def energy(self, x: Tensor) -> Tensor:
        """E(x), shape (batch,), without gradient, of one composition."""
        (part,) = self.parts
        level, _, coefficients = self.inputs
        assert coefficients is not None
        with torch.no_grad():
            return part.composition.combine(part.plan(x, level), coefficients)

    # -- what it is made of --------------------------------------------------------------------------

    @property
    def composition(self) -> Energy:
        """What is evaluated; of several compositions the sum over all their terms."""
        return self._whole()[0]

    @property
    def coefficients(self) -> Tensor:
        """Those of the composition, (n,) or (batch, n)."""
        return self._whole()[1]

    @property
    def noise_level(self) -> Tensor | None:
        """Noise that states carry, () or (batch,)."""
        return self.inputs[0]

    @property
    def mask(self) -> Tensor | None:
        """1 where states may move, 0 where they are held; None if all may."""
        return self.inputs[1]

    @property
    def plan(self) -> Plan:
        """How the leaves of one composition are evaluated."""
        (part,) = self.parts
        return part.plan

    def describe(self) -> str:
        """One line for reports: which networks, and by which path they were last evaluated."""
        return "; ".join(part.plan.describe() for part in self.parts)

    @cached_property
    def structure(self) -> Hashable:
        """Equal for potentials that differ in the values of their inputs and the weights of terms only."""
        return tuple((_terms(part.composition), part.plan.structure, part.name) for part in self.parts)

    @property
    def copies_weights(self) -> bool:
        """Whether it works on copies of weights, so that a captured step must see them change."""
        return any(part.plan.copies_weights for part in self.parts)


def _terms(composition: Energy) -> Hashable:
    """A composition up to the weights of its terms."""
    terms = composition.operands if isinstance(composition, Sum) else ()
    return (type(composition), *(term.key for term in terms)) if terms else composition.key
