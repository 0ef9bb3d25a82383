"""Sums, means and their like over axes, and pooling."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from composable_ebm.potential.operations.rule import Rule, Step, axes_of, one
from composable_ebm.potential.trace import Value

__all__ = ["RULES"]

aten = torch.ops.aten
Axes = int | Sequence[int] | None


def _kept(tensor: Tensor, axes: Sequence[int], keepdim: bool) -> Tensor:
    """With the axes that were reduced as axes of size 1."""
    if not keepdim:
        for axis in sorted(axes):
            tensor = tensor.unsqueeze(axis)
    return tensor


def _sum(self: Value, dim: Axes = None, keepdim: bool = False, dtype: torch.dtype | None = None) -> Step:
    axes = axes_of(dim, len(self.shape))
    return one(
        lambda x: x.sum(axes, keepdim, dtype=dtype),
        lambda g, x, y: _kept(g, axes, keepdim).to(x.dtype).expand(x.shape),
    )


def _mean(self: Value, dim: Axes = None, keepdim: bool = False, dtype: torch.dtype | None = None) -> Step:
    axes = axes_of(dim, len(self.shape))
    count = 1
    for axis in axes:
        count *= self.shape[axis]
    return one(
        lambda x: x.mean(axes, keepdim, dtype=dtype),
        lambda g, x, y: (_kept(g, axes, keepdim) / count).to(x.dtype).expand(x.shape),
    )


def _logsumexp(self: Value, dim: Axes, keepdim: bool = False) -> Step:
    axes = axes_of(dim, len(self.shape))
    return one(
        lambda x: x.logsumexp(axes, keepdim),
        lambda g, x, y: _kept(g, axes, keepdim) * (x - _kept(y, axes, keepdim)).exp(),
    )


def _softmax(self: Value, dim: int, dtype: torch.dtype | None = None) -> Step:
    return one(
        lambda x: torch.softmax(x, dim, dtype=dtype),
        lambda g, x, y: aten._softmax_backward_data(g, y, dim, y.dtype).to(x.dtype),
    )


def _log_softmax(self: Value, dim: int, dtype: torch.dtype | None = None) -> Step:
    return one(
        lambda x: torch.log_softmax(x, dim, dtype=dtype),
        lambda g, x, y: aten._log_softmax_backward_data(g, y, dim, y.dtype).to(x.dtype),
    )


def _average_pooling(
    self: Value,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> Step:
    options = (kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
    return one(
        lambda x: aten.avg_pool2d(x, *options), lambda g, x, y: aten.avg_pool2d_backward(g, x, *options)
    )


RULES: dict[str, Rule] = {
    "sum": _sum,
    "mean": _mean,
    "logsumexp": _logsumexp,
    "softmax": _softmax,
    "log_softmax": _log_softmax,
    "avg_pool2d": _average_pooling,
}
