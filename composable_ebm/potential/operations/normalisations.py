"""Normalisations: of a row by its own mean and variance, or by what was learned of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from composable_ebm.potential.operations.rule import Pullback, Rule, Step, one
from composable_ebm.potential.trace import Unreadable, Value

__all__ = ["RULES", "affine_of"]

aten = torch.ops.aten


def affine_of(
    weight: Tensor | None, bias: Tensor | None, mean: Tensor, variance: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Scale and shift of each channel of a batch normalisation that does not learn."""
    scale = (variance + eps).rsqrt()
    scale = scale if weight is None else scale * weight
    shift = -mean * scale
    return scale, shift if bias is None else shift + bias


def _batch_norm(
    input: Value,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Step:
    if training or running_mean is None or running_var is None:
        raise Unreadable("batch_norm in training couples the chains of a batch")
    shape = (-1, *[1] * (len(input.shape) - 2))
    scale, shift = (t.reshape(shape) for t in affine_of(weight, bias, running_mean, running_var, eps))
    return one(lambda x: torch.addcmul(shift, x, scale), lambda g, x, y: g * scale)


def _group_norm(
    input: Value,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    cudnn_enabled: bool = True,
) -> Step:
    batch, channels, *sides = input.shape
    area = 1
    for side in sides:
        area *= side
    sizes = (batch, channels, area, num_groups)

    def step(x: Tensor) -> tuple[Tensor, Pullback]:
        # Its backward pass wants the memory format of the cotangent to be that of x.
        form = torch.channels_last if x.ndim == 4 else torch.contiguous_format
        if x.ndim != 4 or not x.is_contiguous(memory_format=torch.channels_last):
            form, x = torch.contiguous_format, x.contiguous()
        y, mean, inverse = aten.native_group_norm(x, weight, bias, *sizes, eps)

        def pull(g: Tensor) -> Tensor:
            g = g.contiguous(memory_format=form)
            mask = [True, False, False]
            return aten.native_group_norm_backward(g, x, mean, inverse, weight, *sizes, mask)[0]

        return y, pull

    return step


def _instance_norm(
    input: Value,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Step:
    if not use_input_stats:
        return _batch_norm(
            input, weight, bias, running_mean, running_var, False, momentum, eps, cudnn_enabled
        )
    if running_mean is not None:
        raise Unreadable("instance_norm in training counts the states it sees")
    return _group_norm(input, input.shape[1], weight, bias, eps)


def _layer_norm(
    input: Value,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    cudnn_enable: bool = True,
) -> Step:
    shape = list(normalized_shape)

    def step(x: Tensor) -> tuple[Tensor, Pullback]:
        x = x.contiguous()
        y, mean, inverse = aten.native_layer_norm(x, shape, weight, bias, eps)
        mask = [True, False, False]
        return y, lambda g: aten.native_layer_norm_backward(
            g.contiguous(), x, shape, mean, inverse, weight, bias, mask
        )[0]

    return step


RULES: dict[str, Rule] = {
    "batch_norm": _batch_norm,
    "group_norm": _group_norm,
    "instance_norm": _instance_norm,
    "layer_norm": _layer_norm,
}
