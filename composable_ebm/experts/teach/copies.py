"""Copies of states under noise of random levels, which a lesson's expert is to tell apart as well."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

__all__ = ["noisy_copies"]


def noisy_copies(
    x: Tensor, noise_range: Sequence[float], copies: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Copies of states (n, *event), each under noise of a level of its own, even in log σ, and its levels."""
    generator = torch.Generator().manual_seed(seed)
    low, high = map(math.log, noise_range)
    for _ in range(copies):
        level = (low + (high - low) * torch.rand(len(x), generator=generator)).exp().to(x)
        noise = torch.randn(x.shape, generator=generator).to(x)
        yield x + level.reshape(-1, *[1] * (x.ndim - 1)) * noise, level
