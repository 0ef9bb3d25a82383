"""Normalisations by what was learned of means and variances; those by their own go by autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from composable_ebm.potential.operations.rule import Rule, Step, one
from composable_ebm.potential.trace import Unreadable, Value

__all__ = ["RULES", "affine_of"]


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


def _instance_norm(
    input: Value, running_mean: Tensor | None, use_input_stats: bool, **options: object
) -> Step:
    if use_input_stats and running_mean is not None:
        raise Unreadable("instance_norm in training counts the states it sees")
    raise NotImplementedError


RULES: dict[str, Rule] = {"batch_norm": _batch_norm, "instance_norm": _instance_norm}
