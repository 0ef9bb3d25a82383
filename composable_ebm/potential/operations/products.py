"""Linear layers, matrix products and convolutions, with weights in the layouts that a CPU reads fastest.

linear layers             the weight kept in oneDNN's own layout, for both directions
convolution of stride 1   input gradient as a convolution with the flipped kernel
of few channels           strided ones as space to depth and a convolution of stride 1, both ways
other convolutions        oneDNN's own input gradient, channels last
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from composable_ebm.potential.operations.rule import Pullback, Rule, Step, fitted, once, one, sides
from composable_ebm.potential.operations.shapes import RULES as SHAPES
from composable_ebm.potential.packed import PackedLinear
from composable_ebm.potential.trace import Unreadable, Value

__all__ = ["RULES"]

aten = torch.ops.aten
WORTH_PACKING = 1 << 19
"""From so many multiplications on a product is worth oneDNN's call, which takes 10 us longer."""
FEW_CHANNELS = 16
"""Up to this many channels after space to depth, it is faster than the strided convolution (CPU)."""


def _linear(input: Value, weight: Any, bias: Any = None) -> Step:
    if isinstance(weight, Value) or isinstance(bias, Value):
        raise NotImplementedError
    rows = input.shape.numel() // max(input.shape[-1], 1)
    if rows * weight.numel() >= WORTH_PACKING:
        return once("linear", (weight, bias), lambda: _Linear(weight, bias))

    def pull(g: Tensor) -> Tensor:
        return g @ weight

    return lambda x: (F.linear(x, weight, bias), pull)


def _attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Step:
    """softmax(q kᵀ · scale) v, the three of them from the states."""
    changing = all(isinstance(each, Value) for each in (query, key, value))
    if dropout_p:
        raise Unreadable("scaled_dot_product_attention draws random numbers")
    if attn_mask is not None or is_causal or enable_gqa or not changing:
        raise NotImplementedError
    factor = query.shape[-1] ** -0.5 if scale is None else scale

    def step(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Pullback]:
        weights = torch.softmax(q @ k.mT * factor, dim=-1)

        def pull(g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            by_scores = aten._softmax_backward_data(g @ v.mT, weights, -1, weights.dtype) * factor
            return by_scores @ k, by_scores.mT @ q, weights.mT @ g

        return weights @ v, pull

    return step


class _Linear:
    """A product with a large constant matrix; the way back is packed when it is first gone."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight = weight
        self.forward = PackedLinear(weight, bias)
        self.backward: PackedLinear | None = None

    def __call__(self, x: Tensor) -> tuple[Tensor, Pullback]:
        return self.forward(x), self.pull

    def pull(self, g: Tensor) -> Tensor:
        if self.backward is None:
            self.backward = PackedLinear(self.weight.T)
        return self.backward(g)


def _matmul(self: Any, other: Any) -> Step:
    shapes = [len(side.shape) for side in (self, other)]
    if isinstance(self, Value) and not isinstance(other, Value) and shapes[1] == 2:
        return _linear(self, other.T)
    if isinstance(self, Value) and not isinstance(other, Value) and shapes[1] == 1:
        return one(lambda x: x @ other, lambda g, x, y: g[..., None] * other)
    if min(shapes) < 2:
        raise NotImplementedError
    live = [isinstance(side, Value) and side.live for side in (self, other)]

    def product(a: Tensor, b: Tensor) -> tuple[Tensor, Pullback]:
        return a @ b, lambda g: (
            fitted(g @ b.mT, a.shape) if live[0] else None,
            fitted(a.mT @ g, b.shape) if live[1] else None,
        )

    return sides(self, other, product)


def _add_product(self: Any, mat1: Any, mat2: Any, beta: float = 1, alpha: float = 1) -> Step:
    if isinstance(self, Value) or isinstance(mat2, Value) or (beta, alpha) != (1, 1) or self.ndim != 1:
        raise NotImplementedError
    return _linear(mat1, mat2.T, self)


def _convolution(
    input: Value,
    weight: Any,
    bias: Any = None,
    stride: Sequence[int] = (1,),
    padding: Sequence[int] | str = (0,),
    dilation: Sequence[int] = (1,),
    groups: int = 1,
) -> Step:
    if isinstance(weight, Value) or isinstance(bias, Value) or isinstance(padding, str):
        raise NotImplementedError
    plain = _plain_convolution(weight, bias, stride, padding, dilation, groups)
    sides = {*zip(weight.shape[2:], stride, padding, strict=True)}
    if {*dilation, groups} != {1} or len(sides) > 1 or padding[0] >= weight.shape[2]:
        return plain
    if stride[0] == 1:
        return _unit_convolution(weight, bias, padding[0])
    return _in_blocks(input, weight, bias, stride[0], padding[0]) or plain


def _unit_convolution(weight: Tensor, bias: Tensor | None, padding: int) -> Step:
    """A convolution of stride 1; its input gradient is one with the flipped kernel."""
    flipped = once("flipped", (weight,), lambda: _channels_last(weight.flip(2, 3).transpose(0, 1)))
    weight = once("channels last", (weight,), lambda: _channels_last(weight))
    opposite = weight.shape[-1] - 1 - padding

    def pull(g: Tensor) -> Tensor:
        return F.conv2d(_channels_last(g), flipped, padding=opposite)

    return lambda x: (F.conv2d(_channels_last(x), weight, bias, padding=padding), pull)


def _plain_convolution(
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Step:
    weight = once("channels last", (weight,), lambda: _channels_last(weight))
    sizes = (stride, padding, dilation, False, [0] * len(stride), groups)

    def step(x: Tensor) -> tuple[Tensor, Pullback]:
        x = _channels_last(x)
        y = aten.convolution(x, weight, bias, *sizes)
        mask = [True, False, False]
        return y, lambda g: aten.convolution_backward(_channels_last(g), x, weight, None, *sizes, mask)[0]

    return step


def _in_blocks(input: Value, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> Step | None:
    """A strided convolution of few channels on blocks of stride² pixels, or None where they do not fit.

    s (o + u) + a = s o + t - padding: tap t reads place a of the block u away from the output's.
    """
    kernel, channels = weight.shape[-1], weight.shape[1]
    first, last = -padding // stride, (kernel - 1 - padding) // stride
    # The two agree where each block of the image gives one output.
    outputs = [(side + 2 * padding - kernel) // stride + 1 for side in input.shape[2:]]
    fits = all(side == stride * count for side, count in zip(input.shape[2:], outputs, strict=True))
    if channels * stride**2 > FEW_CHANNELS or first != -last or not fits:
        return None
    size = last - first + 1
    blocked = weight.new_zeros(len(weight), channels, stride, stride, size, size)
    for t in range(kernel):
        for s in range(kernel):
            (u, a), (v, b) = divmod(t - padding, stride), divmod(s - padding, stride)
            blocked[:, :, a, b, u - first, v - first] = weight[:, :, t, s]
    inner = _unit_convolution(blocked.flatten(1, 3), bias, last)
    unshuffle = SHAPES["pixel_unshuffle"](input, stride)

    def step(x: Tensor) -> tuple[Tensor, Pullback]:
        blocks, restore = unshuffle(x)
        y, pull = inner(blocks)
        return y, lambda g: restore(pull(g))

    return step


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


RULES: dict[str, Rule] = {
    "linear": _linear,
    "matmul": _matmul,
    "scaled_dot_product_attention": _attention,
    "mm": lambda self, mat2: _matmul(self, mat2),
    "bmm": lambda self, mat2: _matmul(self, mat2),
    "addmm": _add_product,
    "mv": lambda self, vec: _matmul(self, vec),
    "conv2d": _convolution,
}
