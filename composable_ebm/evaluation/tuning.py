"""Weights chosen on a validation set: samples of other seeds, seen by the second judge.

One batch tries all weights at once: every chain asks for all attributes, each at a weight of its own,
drawn from a few. An attribute's success at a weight is then an average over the weights of the others
(a factorial design), at the cost of one row of the table. The smallest weight within one standard
error of the best is chosen, since larger ones make pictures less varied.

Reference:
    Breiman et al. (1984), Classification and regression trees, section 3.4.3, for the rule of one
    standard error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from composable_ebm.evaluation.composition import compose, draw
from composable_ebm.evaluation.judge import Judge, see
from composable_ebm.evaluation.task import Task, requests

WEIGHTS = (1.0, 1.5, 2.0, 3.0, 4.5, 7.0, 10.0)
SEED = 7_000  # far from the seeds of the table

__all__ = ["choose", "tune"]


def tune(task: Task, judge: Judge, samples: int) -> dict:
    """A weight for each expert.

    Args:
        task: What to tune.
        judge: Another one than the table's.
        samples: Chains in all.
    Returns:
        `weights` by attribute, and `curves`: attribute -> share right at each of the weights tried.
    """
    generator = torch.Generator().manual_seed(SEED)
    asked = requests(task.askable, max(task.sizes), samples, generator)
    tried = [
        {n: WEIGHTS[int(torch.randint(len(WEIGHTS), (), generator=generator))] for n in request}
        for request in asked
    ]
    expressions = [
        compose("tuned", request, task.terms, task.base, weights)
        for request, weights in zip(asked, tried, strict=True)
    ]
    x, seconds, _ = draw(expressions, generator)
    seen = see(judge, task.family, x)
    weights, curves = {}, {}
    for name in task.terms:
        members = [i for i, request in enumerate(asked) if name in request]
        if not members:
            continue
        wanted = torch.tensor([asked[i][name] for i in members])
        at = torch.tensor([tried[i][name] for i in members])
        weights[name], curves[name] = choose(at, seen[name][members] == wanted)
    return {"weights": weights, "tried": list(WEIGHTS), "curves": curves, "seconds": round(seconds, 1)}


def choose(at: Tensor, correct: Tensor, tried: Sequence[float] = WEIGHTS) -> tuple[float, list[float | None]]:
    """The smallest weight within one standard error of the best, and the share right at each.

    Args:
        at: Weight of each sample, (n,).
        correct: Whether it was right, (n,).
        tried: Weights to choose from, rising.
    """
    shares: Mapping[float, float] = {
        w: float(correct[at == w].float().mean()) for w in tried if bool((at == w).any())
    }
    best = max(shares, key=lambda w: shares[w])
    # Laplace's rule keeps the error of a perfect score above zero.
    count = int((at == best).sum())
    p = (shares[best] * count + 1) / (count + 2)
    enough = shares[best] - math.sqrt(p * (1 - p) / count)
    chosen = next(w for w in tried if w in shares and shares[w] >= enough)
    return chosen, [round(shares[w], 4) if w in shares else None for w in tried]
