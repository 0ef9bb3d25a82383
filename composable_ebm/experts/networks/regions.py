"""What a few pictures can tell of an attribute: where in the picture it shows, and how, at every noise level.

Most of what one may ask for shows in one place (glasses, a smile) and moves along the few directions in which
pictures vary there. Those are known before anything is learned, as the Gaussian N(μ, C) of a family's base:

    z(x, σ)    = √e U (x_r - μ_r)/(e + σ²),             with U, e the leading directions of C in a region r
    l(x, σ)[y] = Σ_r (wᵀz + zᵀQz + b ē),                w, Q, b of r and y; ē = mean of e/(e + σ²)
    outputs[y] = -log p(y | x, σ),                      p = softmax(l)

z is what a linear discriminant sees of noisy data: it shrinks where noise hides a direction, and with it the
logits l, so that p is even where nothing can be known. Beside its own region nothing of the picture counts,
which is why a dozen pictures suffice.

Reference:
    Hastie, Tibshirani and Friedman (2009), The Elements of Statistical Learning, sections 4.3 and 18.3, for
    discriminants in few directions where pictures are fewer than pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from composable_ebm.experts.networks.sized import Sized

__all__ = ["RegionClassifier"]

BALL = 3.0  # lengths of z, in units of typical ones, within which it stays


class RegionClassifier(Sized):
    """Quadratic discriminants of a few regions, added up; (batch, values) in nats. See `experts.teach`.

    Args:
        event_shape: Shape of one state.
        num_values: Values of the attribute.
        regions: How many regions.
        components: Leading directions in each.
        squares: How many of them enter as squares and products too.
        noise_range: Smallest and largest noise level, in data units; without one given, the smallest.
    """

    adds_to_base = True
    """Its outputs are probabilities, and no density: an expert of it is one on top of a base."""

    def __init__(
        self,
        event_shape: Sequence[int],
        num_values: int = 2,
        regions: int = 16,
        components: int = 12,
        squares: int = 6,
        noise_range: Sequence[float] = (0.02, 10.0),
    ) -> None:
        super().__init__()
        self.made_with(locals())
        low, high = noise_range
        self.noise_range = (float(low), float(high))
        self.sides = (regions, components)
        size, self.squares = math.prod(event_shape), squares
        products = squares * (squares + 1) // 2
        self.mean: Tensor
        self.spread: Tensor
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("spread", torch.ones(regions, components))  # √e
        self.look = nn.Linear(size, regions * components, bias=False)  # U, zero beside the region
        self.weight = nn.Parameter(torch.zeros(num_values, regions, components + products + 1))  # w, Q, b

    def features(self, x: Tensor, noise_level: Tensor) -> Tensor:
        """z, its products and ē of each region, (batch, regions, features), at levels () or (batch,)."""
        sigma = noise_level.to(x.dtype).clamp(*self.noise_range).reshape(-1, 1, 1)
        variance = self.spread.square()
        kept = variance / (variance + sigma.square())
        z = self.look(x.flatten(1) - self.mean).view(-1, *self.sides) * (kept / self.spread)
        z = z * (1 + z.square().mean(2, keepdim=True) / BALL**2).rsqrt()
        first = z[:, :, : self.squares]
        products = [first[:, :, i:] * first[:, :, i : i + 1] for i in range(self.squares)]
        total = kept.mean(2, keepdim=True).expand(len(x), -1, -1)
        return torch.cat([z, torch.cat(products, 2) / 2, total], 2)

    def forward(self, x: Tensor, noise_level: Tensor | None = None) -> Tensor:
        """-log p(y | x, σ) of each value, (batch, num_values), of states (batch, *event)."""
        sigma = x.new_full((), self.noise_range[0]) if noise_level is None else noise_level
        features = self.features(x, sigma).flatten(1)
        return -F.linear(features, self.weight.flatten(1)).log_softmax(1)
