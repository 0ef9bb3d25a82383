"""Taught on latents: what the decoder sees of a few marks, handed on to the base's own hidden layer.

A number of a latent means little by itself, so that two dozen marks do not show which of them matter. Two
networks of the family know, and no label taught them. The decoder's last features φ are edges and shapes in
their places. There, each region r judges by how like the marks x_i pictures are, by a regression on s_i = ±1:

    l_r(x) = Σ_i α_i exp(-‖φ_r(x) - φ_r(x_i)‖²/d_r),      α = (K + λ n/n_±)⁻¹ s,       d_r the mean of ‖·‖²

What it says of a mark left out is s_i - α_i/[(K + λ n/n_±)⁻¹]_ii, with no other fit. Regions weigh by that:

    l   = c Σ_r a_r l_r,       a = softmax(-2 · squared error of r on marks left out)

A decoder is too slow to follow at each step of a chain, and knows no noise. So l labels pictures that nobody
has marked, and the hidden layer h of the base, which knows all noise levels, learns from those:

    E(x, y, σ) = E_base(x, σ) - log p(y | h(x, σ)),       p = softmax of a linear layer

by logistic regression on noisy copies, convex and solved by Newton's method. The density stays the base's.

Reference:
    Cawley and Talbot (2003), Efficient leave-one-out cross-validation of kernel Fisher discriminants, for α.
    Hinton, Vinyals and Dean (2015), arXiv 1503.02531, for a network that learns from what another says.
    Baranchuk et al. (2022), arXiv 2112.03126, for how much the features of denoisers know of labels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from composable_ebm.energy import Codec
from composable_ebm.experts.networks import ConfinedEnergy
from composable_ebm.experts.teach.copies import noisy_copies

PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)
SCALES = (1.0, 1.4, 2.0, 2.8, 4.0, 5.6, 8.0)
SHARPNESS = 2.0
SIDE = 4  # regions side by side; as many again stand half a region further
COPIES = 6  # noisy ones of each picture
RIDGE = 0.15  # of the hidden layer, in units of its spread
CHUNK = 128

__all__ = ["learned"]


@torch.no_grad()
def learned(
    base: ConfinedEnergy, codec: Codec, marks: Tensor, signs: Tensor, unmarked: Tensor, seed: int
) -> tuple[ConfinedEnergy, Tensor]:
    """The base with an attribute of two values, and which marks were told right while they were left out.

    Args:
        base: Of the family, without values.
        codec: Of its latents.
        marks: Latents, (n, *event).
        signs: 1 for those that have it, -1 for the others, (n,).
        unmarked: Latents of which nothing is known, (k, *event).
        seed: Seeds the noise of the copies.
    """
    x = torch.cat([marks, unmarked])
    seen = torch.cat([codec.features(part).float() for part in x.split(CHUNK)])
    judged = _judged(seen[: len(marks)], seen[len(marks) :], signs)
    likely = torch.cat([(signs + 1) / 2, judged.unmarked.sigmoid()])
    weight, bias = _head(base, x, likely, seed)
    taught = ConfinedEnergy(**{**base.options, "num_values": 2}).to(x)  # type: ignore[arg-type]
    taught.load_state_dict(base.state_dict(), strict=False, assign=True)  # the base's own weights, held once
    choose = taught.backbone.choose
    assert choose is not None
    choose.weight.copy_(torch.stack([-weight, weight]) / 2)
    choose.bias.copy_(torch.stack([-bias, bias]) / 2)
    return taught, judged.left_out * signs > 0


class _Judged(NamedTuple):
    """Logits of pictures nobody marked, (k,), and of each mark as if nobody had marked it, (n,)."""

    unmarked: Tensor
    left_out: Tensor


def _judged(marked: Tensor, unmarked: Tensor, signs: Tensor) -> _Judged:
    """What the regions of pictures, (n, channels, height, width) and (k, ...), say of them together."""
    mean, spread = unmarked.mean(0), unmarked.std(0)
    spread = spread + 0.1 * unmarked.std()
    marked, unmarked = (marked - mean) / spread, (unmarked - mean) / spread
    count = len(signs)
    share = torch.where(signs > 0, (signs > 0).sum(), (signs < 0).sum()) / count
    errors, said, left_out = [], [], []
    for at in _regions(*marked.shape[2:]):
        own, others = marked[at].flatten(1), unmarked[at].flatten(1)
        between = torch.cdist(others, own).square()
        typical = between.mean().clamp(min=1e-12)
        alike, near = (-torch.cdist(own, own).square() / typical).exp(), (-between / typical).exp()
        fits = []
        for penalty in PENALTIES:
            inverse = torch.linalg.inv(alike + torch.diag(penalty / (2 * share)))
            alpha = inverse @ signs
            fits.append((alpha, signs - alpha / inverse.diagonal()))
        alpha, alone = min(fits, key=lambda fit: float((fit[1] - signs).square().mean()))
        errors.append((alone - signs).square())
        said.append(near @ alpha)
        left_out.append(alone)
    error, alone = torch.stack(errors), torch.stack(left_out)
    total = error.sum(1)
    others_error = (total[:, None] - error) * count / (count - 1)  # a mark has no say in who judges it
    alone = ((-SHARPNESS * others_error).softmax(0) * alone).sum(0)
    whole = (-SHARPNESS * total).softmax(0) @ torch.stack(said)
    scale = min(SCALES, key=lambda c: float((F.softplus(-signs * c * alone) / share).mean()))
    return _Judged(scale * whole, alone)


def _regions(height: int, width: int) -> list[tuple[slice, slice, slice, slice]]:
    """Indices of the regions of pictures, (..., height, width)."""
    every = slice(None)
    cuts = []
    for length in (height, width):
        side = max(1, length // SIDE)
        cuts.append([slice(i, i + side) for i in range(0, length - side + 1, max(1, side // 2))])
    return [(every, every, down, across) for down in cuts[0] for across in cuts[1]]


def _head(base: ConfinedEnergy, x: Tensor, likely: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Weight (hidden,) and bias () of the logit that the hidden layer learns from labels in [0, 1]."""
    shown = [base.features(*copy) for copy in noisy_copies(x, base.noise_range, COPIES, seed)]
    hidden, likely = torch.cat(shown), likely.repeat(COPIES)
    mean, spread = hidden.mean(0), hidden.std(0)
    spread = spread + 0.1 * spread.mean()
    z = torch.cat([(hidden - mean) / spread, torch.ones_like(hidden[:, :1])], 1)
    yes, no = likely / likely.sum() / 2, (1 - likely) / (1 - likely).sum() / 2
    ridge = torch.full(z.shape[1:], RIDGE).to(z)
    ridge[-1] = 1e-6  # the offset is free
    weights = z.new_zeros(z.shape[1])
    for _ in range(8):
        found = (z @ weights).sigmoid()
        gradient = z.T @ ((yes + no) * found - yes) + ridge * weights
        curvature = (z * ((yes + no) * found * (1 - found))[:, None]).T @ z + torch.diag(ridge)
        weights = weights - torch.linalg.solve(curvature, gradient)
    weight = weights[:-1] / spread
    return weight, weights[-1] - weight @ mean
