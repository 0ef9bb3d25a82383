"""Energies and the algebra that composes them.

An energy E defines a density up to a constant,

    p(x) = exp(-E(x)) / Z,      Z = ∫ exp(-E(x)) dx,

so adding energies multiplies densities, scaling an energy raises its density to a power, and no Z
is needed to sample the result. The symbols, once for all nodes:

    Eᵢ   energy of child i, in nats, shape (batch,)
    wᵢ   its coefficient: a number, or a tensor (batch,) with one value per row

Every node is a function of the energies of its *leaves* alone. That splits an evaluation in two:
the leaves turn `x` into numbers (all the work), `combine` turns those numbers into one (the
theory). Structure (which leaves, which nodes) is fixed when the expression is written;
coefficients are data, given at call time or taken from the expression.

`space` says what states are, `base` what an energy is, `nodes` what AND, OR and NOT of energies are,
`algebra` what the operators make of them, `checks` what energies are held to.

Reference:
    Hinton (2002), Training products of experts by minimizing contrastive divergence.
    Du, Li and Mordatch (2020), Compositional visual generation with energy based models,
    arXiv 2004.06030, sections 3.2 to 3.4.
"""

from composable_ebm.energy import algebra
from composable_ebm.energy.algebra import given, log_ratio, mixture, negate, ratio
from composable_ebm.energy.base import Energy, LeafEnergies, as_name
from composable_ebm.energy.carrier import NotCarriedError, carrier, satisfied, settled
from composable_ebm.energy.checks import (
    changed_states,
    independent,
    naming,
    one_per_state,
    require_values,
)
from composable_ebm.energy.gradient import slope, slopes, with_gradient
from composable_ebm.energy.nodes import Mixture, Not, Sum
from composable_ebm.energy.numbers import flat, known_by_gradient, soft_minimum
from composable_ebm.energy.space import Codec

__all__ = [
    "Codec",
    "Energy",
    "LeafEnergies",
    "Mixture",
    "Not",
    "NotCarriedError",
    "Sum",
    "as_name",
    "carrier",
    "changed_states",
    "flat",
    "given",
    "independent",
    "known_by_gradient",
    "log_ratio",
    "mixture",
    "naming",
    "negate",
    "one_per_state",
    "ratio",
    "require_values",
    "satisfied",
    "settled",
    "slope",
    "slopes",
    "soft_minimum",
    "with_gradient",
]

Energy.algebra = algebra
