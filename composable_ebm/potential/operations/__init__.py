"""Operations with their gradients by hand: one rule each, by the name of the operation in ATen.

A rule takes the arguments of the operation as they were traced (a `Value` for each tensor that
changes from call to call, constants as they are) and makes a step: from those tensors, in order, to the
result and the function that pulls cotangents of the result back to cotangents of each of them.
"""

from __future__ import annotations

from composable_ebm.potential.operations.normalisations import RULES as normalisations
from composable_ebm.potential.operations.pointwise import RULES as pointwise
from composable_ebm.potential.operations.products import RULES as products
from composable_ebm.potential.operations.reductions import RULES as reductions
from composable_ebm.potential.operations.rule import Pullback, Rule, Step
from composable_ebm.potential.operations.shapes import RULES as shapes

__all__ = ["RULES", "Pullback", "Rule", "Step"]

RULES: dict[str, Rule] = pointwise | shapes | reductions | products | normalisations
