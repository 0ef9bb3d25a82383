"""Energies as detectors: how well they rank what they should tell apart."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from composable_ebm.data import LabelledImages
from composable_ebm.experts.expert import Expert

LIMIT = 1000

__all__ = ["auroc", "detection"]


def auroc(positive: Tensor, negative: Tensor) -> float:
    """Probability that a positive scores above a negative, ties counted half (Mann-Whitney U)."""
    scores = torch.cat([positive, negative]).double()
    _, inverse, counts = scores.unique(return_inverse=True, return_counts=True)
    ranks = (counts.cumsum(0) - (counts - 1) / 2)[inverse]
    n, m = len(positive), len(negative)
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * m))


@torch.no_grad()
def detection(experts: Mapping[str, Expert], base: Expert | None, data: LabelledImages) -> dict[str, float]:
    """AUROC of each expert's energies on held-out images.

    Returns:
        "data against noise" by the marginal energy of the base, or else of each expert;
        "<attribute>" by log p(value | x) = E(x) - E(x, value), each value against the others, averaged.
    """
    index = torch.arange(min(LIMIT, len(data)))
    x = data.batch(index)
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(x.shape, generator=generator) * 2 - 1
    found = {}
    for name, expert in experts.items() if base is None else {"base": base}.items():
        marginal = expert["any"]
        found[f"data against noise, {name}"] = auroc(-marginal(x), -marginal(noise))
    for name, expert in experts.items():
        labels = data.labels[name][index]
        scores = []
        for position, value in enumerate(expert.card.values):
            has, lacks = x[labels == position], x[(labels >= 0) & (labels != position)]
            if not len(has) or not len(lacks):
                continue
            ratio = expert["any"] - expert[value]
            scores.append(auroc(ratio(has), ratio(lacks)))
        if scores:
            found[name] = sum(scores) / len(scores)
    return {name: round(value, 4) for name, value in found.items()}
