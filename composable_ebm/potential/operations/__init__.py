"""Operations with their gradients by hand: one rule each, by the name of the operation in ATen.

A rule takes the arguments of the operation as they were traced (a `Value` for each tensor that
changes from call to call, constants as they are) and makes a step: from those tensors, in order, to the
result and the function that pulls cotangents of the result back to cotangents of each of them. What it is
not for it leaves, by `NotImplementedError`, to autograd through this operation alone, where all others
go. So a rule is worth its lines where autograd's own work on an operation shows: in what shipped experts and
ordinary networks are made of.
"""

from __future__ import annotations

from composable_ebm.potential.operations.normalisations import RULES as normalisations
from composable_ebm.potential.operations.pointwise import RULES as pointwise
from composable_ebm.potential.operations.products import RULES as products
from composable_ebm.potential.operations.reductions import RULES as reductions
from composable_ebm.potential.operations.rule import Pullback, Rule, Step, by_autograd
from composable_ebm.potential.operations.shapes import RULES as shapes

__all__ = ["RULES", "Pullback", "Rule", "Step", "by_autograd", "stays_whole"]

WHOLE = {
    *("adaptive_avg_pool2d", "upsample_nearest2d", "max_pool2d", "selu", "celu", "log_sigmoid"),
    *("conv1d", "conv3d", "conv_transpose2d", "einsum"),
}
"""Operations without a rule that are not taken apart: C knows them, or their parts take longer."""

RULES: dict[str, Rule] = pointwise | shapes | reductions | products | normalisations


def stays_whole(name: str) -> bool:
    """Whether an operation is one step, though PyTorch makes it of others."""
    return name in RULES or name in WHOLE
