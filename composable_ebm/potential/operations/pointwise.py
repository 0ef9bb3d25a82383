"""Operations on each element, of one tensor or of two that are broadcast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from composable_ebm.potential.operations.rule import Pullback, Rule, Step, fitted, one, sides
from composable_ebm.potential.trace import Value

__all__ = ["RULES"]

aten = torch.ops.aten


def _simple(
    forward: Callable[[Tensor], Tensor], backward: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Rule:
    return lambda self: one(forward, backward)


def _leaky_relu(self: Value, negative_slope: float) -> Step:
    return one(
        lambda x: F.leaky_relu(x, negative_slope),
        lambda g, x, y: aten.leaky_relu_backward(g, x, negative_slope, False),
    )


def _softplus(self: Value, beta: float, threshold: float) -> Step:
    if beta == 1 and threshold >= 20 and self.dtype == torch.float32:
        # Four times as fast: its own kernel is not vectorised.
        return one(
            lambda x: x.abs().neg_().exp_().add_(1).log_().add_(x.clamp(min=0)),
            lambda g, x, y: g * torch.sigmoid(x),
        )
    return one(
        lambda x: aten.softplus(x, beta, threshold),
        lambda g, x, y: aten.softplus_backward(g, x, beta, threshold),
    )


def _gelu(self: Value, approximate: str) -> Step:
    return one(
        lambda x: aten.gelu(x, approximate=approximate),
        lambda g, x, y: aten.gelu_backward(g, x, approximate=approximate),
    )


def _pow(self: Value, exponent: float) -> Step:
    if exponent != 2:
        raise NotImplementedError
    return one(torch.square, lambda g, x, y: 2 * x * g)


def _add(self: Any, other: Any, alpha: float = 1, sign: int = 1) -> Step:
    factor = sign * alpha

    def both(a: Any, b: Any) -> tuple[Tensor, Pullback]:
        def pull(g: Tensor) -> tuple[Tensor | None, Tensor | None]:
            first = fitted(g, a.shape) if isinstance(a, Tensor) else None
            if not isinstance(b, Tensor):
                return first, None
            second = fitted(g, b.shape)
            return first, second if factor == 1 else second * factor

        return a + b if factor == 1 else a - b if factor == -1 else a + factor * b, pull

    return sides(self, other, both)


def _subtract(self: Any, other: Any, alpha: float = 1) -> Step:
    return _add(self, other, alpha, -1)


def _multiply(self: Any, other: Any) -> Step:
    if self is other:
        return one(torch.square, lambda g, x, y: 2 * x * g)

    live = [isinstance(side, Value) and side.live for side in (self, other)]

    def both(a: Any, b: Any) -> tuple[Tensor, Pullback]:
        return a * b, lambda g: (
            fitted(g * b, a.shape) if live[0] else None,
            fitted(g * a, b.shape) if live[1] else None,
        )

    return sides(self, other, both)


def _divide(self: Any, other: Any, rounding_mode: str | None = None) -> Step:
    if rounding_mode is not None:
        raise NotImplementedError
    live = [isinstance(side, Value) and side.live for side in (self, other)]

    def both(a: Any, b: Any) -> tuple[Tensor, Pullback]:
        y = a / b
        return y, lambda g: (
            fitted(g / b, a.shape) if live[0] else None,
            fitted(-g * y / b, b.shape) if live[1] else None,
        )

    return sides(self, other, both)


def _maximum(self: Any, other: Any) -> Step:
    def both(a: Any, b: Any) -> tuple[Tensor, Pullback]:
        def pull(g: Tensor) -> tuple[Tensor, Tensor]:
            first = (a > b).to(g.dtype) + (a == b).to(g.dtype) / 2
            return fitted(g * first, a.shape), fitted(g * (1 - first), b.shape)

        return torch.maximum(a, b), pull

    return sides(self, other, both)


RULES: dict[str, Rule] = {
    "silu": _simple(F.silu, lambda g, x, y: aten.silu_backward(g, x)),
    "relu": _simple(torch.relu, lambda g, x, y: aten.threshold_backward(g, y, 0)),
    "tanh": _simple(torch.tanh, lambda g, x, y: aten.tanh_backward(g, y)),
    "sigmoid": _simple(torch.sigmoid, lambda g, x, y: aten.sigmoid_backward(g, y)),
    "leaky_relu": _leaky_relu,
    "softplus": _softplus,
    "gelu": _gelu,
    "exp": _simple(torch.exp, lambda g, x, y: g * y),
    "log": _simple(torch.log, lambda g, x, y: g / x),
    "sqrt": _simple(torch.sqrt, lambda g, x, y: g / (2 * y)),
    "rsqrt": _simple(torch.rsqrt, lambda g, x, y: g * y**3 / -2),
    "neg": _simple(torch.neg, lambda g, x, y: -g),
    "pow": _pow,
    "add": _add,
    "sub": _subtract,
    "mul": _multiply,
    "div": _divide,
    "maximum": _maximum,
}
