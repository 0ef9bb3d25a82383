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


def _relu(self: Value) -> Step:
    return one(torch.relu, lambda g, x, y: aten.threshold_backward(g, y, 0))


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


def _elu(self: Value, alpha: float, scale: float, input_scale: float) -> Step:
    return one(
        lambda x: aten.elu(x, alpha, scale, input_scale),
        lambda g, x, y: aten.elu_backward(g, alpha, scale, input_scale, False, x),
    )


def _hardtanh(self: Value, min_val: float, max_val: float) -> Step:
    return one(
        lambda x: aten.hardtanh(x, min_val, max_val),
        lambda g, x, y: aten.hardtanh_backward(g, x, min_val, max_val),
    )


def _log_sigmoid(self: Value) -> Step:
    return one(F.logsigmoid, lambda g, x, y: g * torch.sigmoid(-x))


def _clamp(self: Value, min: object = None, max: object = None) -> Step:
    def backward(g: Tensor, x: Tensor, y: Tensor) -> Tensor:
        inside = x >= min if min is not None else None  # type: ignore[operator]
        if max is not None:
            below = x <= max  # type: ignore[operator]
            inside = below if inside is None else inside & below
        return g if inside is None else g * inside

    return one(lambda x: x.clamp(min, max), backward)  # type: ignore[call-overload]


def _pow(self: Value, exponent: float) -> Step:
    if isinstance(exponent, (Value, Tensor)) or not isinstance(self, Value):
        return sides(self, exponent, _power)
    if exponent == 2:
        return one(torch.square, lambda g, x, y: 2 * x * g)
    return one(lambda x: x**exponent, lambda g, x, y: g * (exponent * x ** (exponent - 1)))


def _power(a: Any, b: Any) -> tuple[Tensor, Pullback]:
    y = torch.pow(a, b)

    def pull(g: Tensor) -> tuple[Tensor | None, Tensor | None]:
        first = fitted(g * b * torch.pow(a, b - 1), a.shape) if isinstance(a, Tensor) else None
        logs = a.log() if isinstance(a, Tensor) else torch.as_tensor(a, dtype=y.dtype).log()
        return first, fitted(g * y * logs, b.shape) if isinstance(b, Tensor) else None

    return y, pull


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


def _subtract_from(self: Any, other: Any, alpha: float = 1) -> Step:
    if alpha != 1:
        raise NotImplementedError
    return sides(self, other, lambda a, b: (b - a, lambda g: (fitted(-g, a.shape), fitted(g, _shape(b)))))


def _shape(thing: object) -> torch.Size:
    return thing.shape if isinstance(thing, Tensor) else torch.Size()


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


def _extreme(larger: bool) -> Rule:
    def rule(self: Any, other: Any) -> Step:
        def both(a: Any, b: Any) -> tuple[Tensor, Pullback]:
            y = torch.maximum(a, b) if larger else torch.minimum(a, b)

            def pull(g: Tensor) -> tuple[Tensor, Tensor]:
                first = (a > b if larger else a < b).to(g.dtype) + (a == b).to(g.dtype) / 2
                return fitted(g * first, a.shape), fitted(g * (1 - first), b.shape)

            return y, pull

        return sides(self, other, both)

    return rule


def _where(condition: Any, self: Any, other: Any) -> Step:
    changing = [isinstance(each, Value) for each in (condition, self, other)]
    constants = [condition, self, other]

    def step(*inputs: Tensor) -> tuple[Tensor, Pullback]:
        given = iter(inputs)
        which, a, b = (
            next(given) if changes else constant
            for changes, constant in zip(changing, constants, strict=True)
        )
        zero = torch.zeros((), dtype=torch.result_type(a, b))

        def pull(g: Tensor) -> Any:
            parts = (
                None,
                fitted(torch.where(which, g, zero), _shape(a)),
                fitted(torch.where(which, zero, g), _shape(b)),
            )
            kept = tuple(part for part, changes in zip(parts, changing, strict=True) if changes)
            return kept if len(kept) > 1 else kept[0]

        return torch.where(which, a, b), pull

    return step


RULES: dict[str, Rule] = {
    "silu": _simple(F.silu, lambda g, x, y: aten.silu_backward(g, x)),
    "relu": _relu,
    "tanh": _simple(torch.tanh, lambda g, x, y: aten.tanh_backward(g, y)),
    "sigmoid": _simple(torch.sigmoid, lambda g, x, y: aten.sigmoid_backward(g, y)),
    "mish": _simple(F.mish, lambda g, x, y: aten.mish_backward(g, x)),
    "hardswish": _simple(F.hardswish, lambda g, x, y: aten.hardswish_backward(g, x)),
    "hardsigmoid": _simple(F.hardsigmoid, lambda g, x, y: aten.hardsigmoid_backward(g, x)),
    "relu6": lambda self: _hardtanh(self, 0.0, 6.0),
    "leaky_relu": _leaky_relu,
    "softplus": _softplus,
    "gelu": _gelu,
    "elu": _elu,
    "selu": lambda self: _elu(self, 1.6732632423543772, 1.0507009873554805, 1.0),
    "celu": lambda self, alpha: _elu(self, alpha, 1.0, 1.0 / alpha),
    "hardtanh": _hardtanh,
    "log_sigmoid": _log_sigmoid,
    "clamp": _clamp,
    "clamp_min": _clamp,
    "clamp_max": lambda self, max: _clamp(self, None, max),
    "exp": _simple(torch.exp, lambda g, x, y: g * y),
    "expm1": _simple(torch.expm1, lambda g, x, y: g * (y + 1)),
    "log": _simple(torch.log, lambda g, x, y: g / x),
    "log1p": _simple(torch.log1p, lambda g, x, y: g / (x + 1)),
    "sqrt": _simple(torch.sqrt, lambda g, x, y: g / (2 * y)),
    "rsqrt": _simple(torch.rsqrt, lambda g, x, y: g * y**3 / -2),
    "square": _simple(torch.square, lambda g, x, y: 2 * x * g),
    "reciprocal": _simple(torch.reciprocal, lambda g, x, y: -g * y.square()),
    "abs": _simple(torch.abs, lambda g, x, y: g * x.sgn()),
    "neg": _simple(torch.neg, lambda g, x, y: -g),
    "sin": _simple(torch.sin, lambda g, x, y: g * x.cos()),
    "cos": _simple(torch.cos, lambda g, x, y: -g * x.sin()),
    "atan": _simple(torch.atan, lambda g, x, y: g / (1 + x.square())),
    "erf": _simple(torch.erf, lambda g, x, y: g * 1.1283791670955126 * (-x.square()).exp()),
    "pow": _pow,
    "add": _add,
    "sub": _subtract,
    "subtract": _subtract,
    "rsub": _subtract_from,
    "mul": _multiply,
    "multiply": _multiply,
    "div": _divide,
    "divide": _divide,
    "true_divide": _divide,
    "maximum": _extreme(True),
    "minimum": _extreme(False),
    "where": _where,
}
