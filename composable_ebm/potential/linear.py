"""Weighted sums of what networks give, without a graph: nearly all compositions are such sums.

The cotangents of the outputs are the coefficients, whatever the state, so they are made once and
the gradient is what the networks pull back. Of a step of four face experts at 16 chains autograd around
the networks was a twentieth; of the textbook network at 64, a tenth.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from types import EllipsisType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from composable_ebm.energy import Energy, Sum, naming
from composable_ebm.potential.packed import version_of

if TYPE_CHECKING:
    from composable_ebm.potential.plan import Group, Ready

__all__ = ["LinearPlan"]

Column = int | EllipsisType | None


class LinearPlan:
    """A weighted sum of columns of outputs, E = Σ cₖ outputs[iₖ, :, jₖ], whose gradient needs no graph.

    Args:
        composition: A leaf, or a Sum of leaves.
        groups: The networks that its leaves read, in each way that they may be evaluated together.
        columns: Which column each leaf takes.
    """

    def __init__(self, composition: Energy, groups: Sequence[Group], columns: dict[Hashable, Column]) -> None:
        self.composition = composition
        order = {leaf.key: k for k, leaf in enumerate(composition.leaves())}
        self.places = {
            group: [
                (i, columns[leaf.key], order[leaf.key])
                for i, (_, leaves) in enumerate(group.readers)
                for leaf in leaves
            ]
            for group in groups
        }
        self._made_for: tuple = ()
        self._cotangents: list[Tensor] = []
        self._coefficients: Tensor | None = None  # kept, so that its place is not taken by another

    @classmethod
    def of(cls, composition: Energy, groups: Sequence[Group]) -> LinearPlan | None:
        """The plan of a composition whose leaves all read these networks and is such a sum, or None."""
        terms = composition.operands if isinstance(composition, Sum) else (composition,)
        leaves = list(composition.leaves())
        columns = {leaf.key: _column(leaf) for leaf in leaves}
        simple = [leaf.key for leaf in leaves] == [term.key for term in terms]
        if not simple or any(column is None for column in columns.values()):
            return None
        return cls(composition, groups, columns)

    def __call__(
        self, x: Tensor, noise_level: Tensor | None, coefficients: Tensor, ready: Sequence[Ready]
    ) -> tuple[Tensor, Tensor] | None:
        """Energies and gradient, by what is ready; None where something is not, or that is no such sum."""
        if x.device.type != "cpu" or (coefficients.dtype != x.dtype and coefficients.numel()):
            return None
        if any(form is None for _, form in ready):
            return None
        evaluated = []
        with torch.no_grad():
            for group, form in ready:
                with naming(group.readers[0][1][0], self.composition):
                    evaluated.append((group, *form(x, group.heard(noise_level))))  # type: ignore[misc]
            cotangents = self._weighing([each[:2] for each in evaluated], coefficients, len(x))
            if cotangents is None:
                return None
            energy: Tensor | None = None
            gradient: Tensor | None = None
            for (group, outputs, pull_back), cotangent in zip(evaluated, cotangents, strict=True):
                part, slope = _but_batch(outputs * cotangent, group.single), pull_back(cotangent)
                energy = part if energy is None else energy + part
                gradient = slope if gradient is None else gradient + slope
        assert energy is not None
        assert gradient is not None
        return energy, gradient

    def _weighing(
        self, evaluated: Sequence[tuple[Group, Tensor]], coefficients: Tensor, batch: int
    ) -> list[Tensor] | None:
        """∂E/∂outputs of each group; it depends on the coefficients alone. None where outputs have other
        shapes than the columns need."""
        made_for = (version_of(coefficients), [(group, outputs.shape) for group, outputs in evaluated])
        if made_for == self._made_for:
            return self._cotangents
        weights = coefficients.movedim(-1, 0) if coefficients.shape[-1] else [1.0]
        cotangents = []
        for group, outputs in evaluated:
            whole = outputs[None] if group.single else outputs
            cotangent = torch.zeros_like(whole)
            for i, column, k in self.places[group]:
                if column is ... and whole.ndim == 3 and whole.shape[2] == 1:
                    column = 0
                if whole.ndim != (2 if column is ... else 3) or whole.shape[1] != batch:
                    return None
                target = cotangent[i] if column is ... else cotangent[i, :, column]
                target += weights[k]
            cotangents.append(cotangent[0] if group.single else cotangent)
        self._made_for, self._cotangents, self._coefficients = made_for, cotangents, coefficients
        return cotangents


def _column(leaf: Energy) -> Column:
    """The column a leaf takes, if its class says so where it says how it reads."""
    kinds = type(leaf).__mro__
    says, reads = (next(kind for kind in kinds if name in vars(kind)) for name in ("column", "read"))
    return leaf.column if says is reads and leaf.body() is not None else None


def _but_batch(values: Tensor, single: bool) -> Tensor:
    """Sums over all axes but the batch, the first one, or the second where networks come first."""
    if values.ndim == 1:
        return values
    return values.sum(1) if single else values.sum((0, 2))
