"""Coefficients of terms: numbers, or tensors with one value for each row of a batch."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

Weight = float | Tensor

__all__ = [
    "Weight",
    "as_tensor",
    "as_weight",
    "coefficient_type",
    "format_weight",
    "is_weight",
    "stack_weights",
    "weight_key",
    "weight_on",
]


def is_weight(value: object) -> bool:
    """Whether an operator may take `value` as a coefficient: a real number, or a tensor or an array
    () or (batch,)."""
    value = as_tensor(value)
    return (isinstance(value, Real) and not isinstance(value, bool)) or (
        isinstance(value, Tensor) and value.ndim <= 1 and not value.is_complex()
    )


def as_weight(value: object) -> Weight:
    """A finite number, or the tensor itself; an array as a tensor, or as a number if it is one.

    Raises:
        TypeError: If it is neither a number nor a tensor () or (batch,).
        ValueError: If it is not finite.
    """
    value = as_tensor(value)
    if not is_weight(value):
        shape = f" of shape {tuple(value.shape)}" if isinstance(value, Tensor) else ""
        raise TypeError(
            f"a weight is a number or a tensor of shape () or (batch,), got {type(value).__name__}{shape}."
        )
    if isinstance(value, Tensor):
        return value
    weight = float(value)  # type: ignore[arg-type]
    if not math.isfinite(weight):
        raise ValueError(f"a weight must be finite, got {weight}.")
    return weight


def as_tensor(value: Any) -> Any:
    """An array of NumPy as a tensor, one without axes as a number, and all else as it is."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "iuf":
        return torch.from_numpy(value.copy()) if value.ndim else value.item()
    return value


def coefficient_type(x: Tensor) -> torch.dtype:
    """The floating type of coefficients for states `x`: in 16 bits a weight of 0.3 is off by a thousandth."""
    return torch.promote_types(x.dtype, torch.float32)


def stack_weights(weights: Sequence[Weight]) -> Tensor:
    """Numbers and tensors () or (batch,) -> float64 (n,) or (batch, n)."""
    tensors = [torch.as_tensor(w, dtype=torch.float64) for w in weights]
    device = next((t.device for t, w in zip(tensors, weights, strict=True) if isinstance(w, Tensor)), None)
    if device is not None:
        tensors = [t.to(device) for t in tensors]
    return torch.stack(torch.broadcast_tensors(*tensors), dim=-1)


def weight_on(weight: Weight, x: Tensor) -> Weight:
    """The weight with the dtype and device of `x`."""
    return weight.to(x) if isinstance(weight, Tensor) else weight


def weight_key(weight: Weight) -> Hashable:
    """Equal for equal numbers, and for one and the same tensor."""
    return id(weight) if isinstance(weight, Tensor) else weight


def format_weight(weight: Weight) -> str:
    """The shortest text that reads back as the same number, or as the same numbers, one a row."""
    if isinstance(weight, Tensor):
        if weight.ndim:
            return f"[{', '.join(map(format_weight, weight.tolist()))}]"
        weight = float(weight)
    short = f"{weight:g}"
    return short if float(short) == weight else repr(weight)
