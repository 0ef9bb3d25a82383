"""Gradients of energies by their states, by autograd. Nobody else takes them.

An energy of a batch has one number a state that knows of no other state, so the gradient of their sum holds
the gradient of each,

    ∂(Σⱼ E(xⱼ))/∂xᵢ = ∂E(xᵢ)/∂xᵢ,

in one backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["pulled_back", "slope", "slopes", "with_gradient"]


def slope(energies: Tensor, x: Tensor, *, learn: bool = False) -> Tensor:
    """∂E/∂x, shape of `x`, zero where nothing depends on it.

    Args:
        energies: (batch,), computed from `x`; of more axes their sum over all but the first is meant.
        x: States that require a gradient, (batch, *event).
        learn: Keeps the graph, so that what is made of the gradient can be differentiated again.
    """
    # The sum, since cotangents that are given load sympy, a third of a second of a cold start.
    (gradient,) = torch.autograd.grad(energies.sum(), x, create_graph=learn, allow_unused=True)
    return torch.zeros_like(x) if gradient is None else gradient


def slopes(energies: Tensor, inputs: Sequence[Tensor]) -> list[Tensor | None]:
    """∂E/∂ of each of several inputs, shape of each; None for those that nothing depends on.

    Args:
        energies: (batch,), computed from inputs that require a gradient, and from others perhaps.
        inputs: Tensors whose rows are those of the states.
    """
    return pulled_back(None, energies.sum(), inputs)


def pulled_back(cotangent: Tensor | None, outputs: Tensor, inputs: Sequence[Tensor]) -> list[Tensor | None]:
    """Σ cotangent ∂outputs/∂input of each of several inputs; None for those that nothing depends on."""
    wanted = [each for each in inputs if each.requires_grad]
    found = iter(torch.autograd.grad(outputs, wanted, cotangent, allow_unused=True))
    return [next(found) if each.requires_grad else None for each in inputs]


def with_gradient(energy: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor | None]:
    """E(x) and ∂E/∂x without a graph; None for a gradient where the energy does not depend on `x`.

    Args:
        energy: x -> energies, (batch,).
        x: States, (batch, *event).
    """
    if not torch.is_grad_enabled():
        with torch.enable_grad():
            return with_gradient(energy, x)
    x = x.detach().requires_grad_()
    energies = energy(x)
    gradient = slope(energies, x) if energies.requires_grad else None
    return energies.detach(), gradient
