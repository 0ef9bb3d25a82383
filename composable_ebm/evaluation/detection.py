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
        "data against noise" (uniform), "against Gaussian noise" (with the mean and spread of each pixel)
        and "against upside-down data", by the marginal energy of the base, or else of each expert;
        "<attribute> by log ratio", log p(value | x) = E(x) - E(x, value), and "<attribute> by energy",
        E(x, value) alone: each value against the others, averaged.
    """
    index = torch.arange(min(LIMIT, len(data)))
    x = data.batch(index)
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(x.shape, generator=generator) * 2 - 1
    spread = torch.randn(x.shape, generator=generator)
    alike = (x.mean(0) + x.std(0) * spread).clamp(-1, 1)
    strangers = {"noise": noise, "Gaussian noise": alike, "upside-down data": x.flip(2)}
    found = {}
    for name, expert in experts.items() if base is None else {"base": base}.items():
        marginal = expert["any"]
        own = -marginal(x)
        for stranger, states in strangers.items():
            found[f"data against {stranger}, {name}"] = auroc(own, -marginal(states))
    for name, expert in experts.items():
        if name not in data.labels:
            continue
        labels = data.labels[name][index]
        energies = torch.stack([expert[value](x) for value in expert.card.values], dim=1)
        for words, scores in (
            ("log ratio", expert["any"](x)[:, None] - energies),
            ("energy", -energies),
        ):
            values = []
            for position in range(len(expert.card.values)):
                has, lacks = labels == position, (labels >= 0) & (labels != position)
                if has.any() and lacks.any():
                    values.append(auroc(scores[has, position], scores[lacks, position]))
            if values:
                found[f"{name} by {words}"] = sum(values) / len(values)
    return {name: round(value, 4) for name, value in found.items()}
