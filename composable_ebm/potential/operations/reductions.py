"""Sums, means and their like over axes, and pooling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from composable_ebm.potential.operations.rule import Pullback, Rule, Step, axes_of, one
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


def _extreme(larger: bool) -> Rule:
    def rule(self: Value, dim: Axes = None, keepdim: bool = False) -> Step:
        axes = axes_of(dim, len(self.shape))

        def backward(g: Tensor, x: Tensor, y: Tensor) -> Tensor:
            among = x == _kept(y, axes, keepdim)
            return _kept(g, axes, keepdim) * among / among.sum(axes, keepdim=True)

        return one(lambda x: (torch.amax if larger else torch.amin)(x, axes, keepdim), backward)

    return rule


def _variance(root: bool) -> Rule:
    def rule(
        self: Value, dim: Axes = None, unbiased: bool = True, correction: Any = None, keepdim: bool = False
    ) -> Step:
        axes = axes_of(dim, len(self.shape))
        less = (1 if unbiased else 0) if correction is None else correction
        count = 1
        for axis in axes:
            count *= self.shape[axis]

        def step(x: Tensor) -> tuple[Tensor, Pullback]:
            d = x - x.mean(axes, keepdim=True)
            variance = d.square().sum(axes, keepdim=keepdim) / (count - less)
            y = variance.sqrt() if root else variance

            def pull(g: Tensor) -> Tensor:
                g = g / y if root else 2 * g
                return _kept(g, axes, keepdim) * d / (count - less)

            return y, pull

        return step

    return rule


def _norm(
    self: Value, ord: float = 2, dim: Axes = None, keepdim: bool = False, dtype: torch.dtype | None = None
) -> Step:
    if ord != 2 or dtype is not None:
        raise NotImplementedError
    axes = axes_of(dim, len(self.shape))

    def backward(g: Tensor, x: Tensor, y: Tensor) -> Tensor:
        size = _kept(y, axes, keepdim)
        return torch.where(size > 0, _kept(g, axes, keepdim) * x / size, torch.zeros((), dtype=x.dtype))

    return one(lambda x: torch.linalg.vector_norm(x, 2, axes, keepdim), backward)


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


def _adaptive_pooling(self: Value, output_size: Sequence[int]) -> Step:
    if list(output_size) == [1, 1]:
        return _mean(self, (-2, -1), True)
    return one(
        lambda x: aten._adaptive_avg_pool2d(x, output_size),
        lambda g, x, y: aten._adaptive_avg_pool2d_backward(g.contiguous(), x),
    )


def _max_pooling(
    self: Value,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> Step:
    options = (kernel_size, stride or kernel_size, padding, dilation, ceil_mode)

    def step(x: Tensor) -> tuple[Tensor, Pullback]:
        y, places = aten.max_pool2d_with_indices(x, *options)
        return y, lambda g: aten.max_pool2d_with_indices_backward(g, x, *options, places)

    return step


def _nearest(self: Value, **options: Any) -> Step:
    height, width = self.shape[-2:]
    factors = options.get("scale_factors") or [1, 1]
    size = options.get("output_size") or [int(height * factors[0]), int(width * factors[1])]
    if size[0] % height or size[1] % width or len(self.shape) != 4:
        raise NotImplementedError
    whole = list(self.shape)

    def backward(g: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return aten.upsample_nearest2d_backward(g, size, whole)

    return one(lambda x: aten.upsample_nearest2d(x, size), backward)


RULES: dict[str, Rule] = {
    "sum": _sum,
    "mean": _mean,
    "logsumexp": _logsumexp,
    "softmax": _softmax,
    "log_softmax": _log_softmax,
    "amax": _extreme(True),
    "amin": _extreme(False),
    "max": lambda self: _extreme(True)(self),
    "min": lambda self: _extreme(False)(self),
    "var": _variance(False),
    "std": _variance(True),
    "linalg_vector_norm": _norm,
    "avg_pool2d": _average_pooling,
    "adaptive_avg_pool2d": _adaptive_pooling,
    "max_pool2d": _max_pooling,
    "upsample_nearest2d": lambda input=None, self=None, **options: _nearest(
        input if self is None else self, **options
    ),
}
