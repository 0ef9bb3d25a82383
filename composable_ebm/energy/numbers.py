"""Numbers of states: rows, the energy of an OR, and energies of which only the gradient is known."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["flat", "known_by_gradient", "soft_minimum"]


def soft_minimum(energies: Tensor) -> Tensor:
    """-log Σ exp(-Eᵢ) over the last axis, shape (...): the energy of an OR.

    The derivative of logsumexp is exp(logits - result), which loses digits to the size of the result:
    at 10,000 nats it is wrong by 1e-3. Around the least energy it is exact.
    """
    logits = -energies
    top = logits.detach().amax(dim=-1, keepdim=True).clamp(min=torch.finfo(logits.dtype).min)
    return -(torch.logsumexp(logits - top, dim=-1) + top[..., 0])


def known_by_gradient(x: Tensor, gradient: Tensor, value: Tensor | float = 0.0) -> Tensor:
    """Numbers (batch,) whose gradient at `x` is `gradient`, for energies known by their score alone:

        E(x) = value + ⟨gradient, x - x₀⟩,    x₀ = x without its graph.

    Sums, weights and ratios of them then have the right score, by the same backward pass as every
    other energy. An energy that returns them says `has_value = False`.

    Args:
        x: States, shape (batch, *event).
        gradient: -score at `x`, the same shape; it may depend on parameters, but not on `x` through
            autograd: take it at `x.detach()`.
        value: The number itself, (batch,), where something is known of it.
    """
    return value + flat(gradient * (x - x.detach())).sum(1)


def flat(x: Tensor) -> Tensor:
    """States (batch, *event) as rows of numbers, (batch, size); numbers (batch,) as rows of one."""
    return x.flatten(1) if x.ndim > 1 else x[:, None]
