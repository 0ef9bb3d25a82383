"""How experts are composed, and samples of a row of the table: chains of many requests at once.

Each row asks for k attributes, a random subset with random values for every chain, so presence and
absence are asked for alike. All requests on one set of networks run as one batch: one structure, a
row of coefficients for each chain. Samples are drawn from noise with the settings stored in the experts.
"""

from __future__ import annotations

import functools
import operator
import time
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from composable_ebm.energy import Energy, ratio
from composable_ebm.evaluation.task import Request, Task
from composable_ebm.experts.expert import Expert, given
from composable_ebm.sampling.block import Sampler
from composable_ebm.sampling.engine import Engine

FORMS = ("ratio", "weight 1", "sum", "base ratio", "tuned")

MOST_CHAINS = 512
"""Chains that step together."""

__all__ = ["FORMS", "Row", "compose", "draw", "sample_row"]


def compose(
    form: str,
    request: Request,
    terms: Mapping[str, Mapping[int, Expert]],
    base: Expert | None,
    weights: Mapping[str, float] | float | None = None,
) -> Energy:
    """The composition that asks for `request`.

    "sum" is Σ Eᵢ(x, aᵢ). "ratio" is `given`, which counts p(x) once; without a base expert the last
    attribute asked for brings p(x) along. "base ratio" is base + Σ wᵢ (Eᵢ(x, aᵢ) - E_base(x)), the
    formula of composable diffusion. "weight 1" is "ratio" as Bayes' rule has it, "tuned" is "ratio" at
    weights chosen on other seeds.

    Args:
        form: One of `FORMS`.
        request: What to ask for.
        terms: Attribute -> value -> its expert.
        base: The expert of p(x), if the family has one.
        weights: w of the ratios, one for all or by attribute; what each was calibrated with unless given.
    """
    chosen = {name: terms[name][value] for name, value in request.items()}
    if form == "sum":
        return functools.reduce(operator.add, chosen.values())

    def strength(name: str) -> float:
        if form == "weight 1":
            return 1.0
        if weights is None:
            return chosen[name].card.weight
        return weights[name] if isinstance(weights, Mapping) else weights

    if form == "base ratio" and base is not None:
        return sum((strength(n) * ratio(e, base) for n, e in chosen.items()), base)
    if form not in ("ratio", "weight 1", "tuned"):
        raise ValueError(
            f"`form` must be one of {', '.join(FORMS)} (base ratio only with a base), got {form!r}."
        )
    others = list(chosen)
    energy: Energy = chosen[others.pop()] if base is None else base
    for name in others:
        energy = given(energy, chosen[name], weight=strength(name))
    return energy


@dataclass(frozen=True)
class Row:
    """Samples of one row of the table, with what was asked of each.

    Attributes:
        samples: (batch, *event).
        requests: What was asked of each.
        seconds: Wall time of the chains.
        evaluations: Gradient evaluations of the composition per chain.
    """

    samples: Tensor
    requests: list[Request]
    seconds: float
    evaluations: int


def draw(
    expressions: Sequence[Energy], generator: torch.Generator, sampler: Sampler | None = None
) -> tuple[Tensor, float, int]:
    """One sample of each composition, from noise by the settings stored in the experts.

    Equal compositions are one request, and all requests run on one engine.

    Args:
        expressions: One for each sample.
        generator: Draws the seeds of the requests.
        sampler: In place of the stored one.
    Returns:
        Samples (expressions, *event), seconds, and gradient evaluations per sample.
    """
    groups: dict[Hashable, list[int]] = {}
    for i, expression in enumerate(expressions):
        groups.setdefault(expression.key, []).append(i)
    start, taken = time.perf_counter(), 0
    found: list[tuple[int, Tensor]] = []
    with Engine(max_batch=MOST_CHAINS) as engine:
        runs = []
        for members in groups.values():
            for part in range(0, len(members), MOST_CHAINS // 2):
                own = members[part : part + MOST_CHAINS // 2]
                run = engine.submit(
                    expressions[own[0]],
                    num_chains=len(own),
                    seed=int(torch.randint(2**31, (), generator=generator)),
                    sampler=sampler,
                    on_divergence="report",
                )
                runs.append((own, run))
        for own, run in runs:
            out = run.result()
            found += zip(own, out.samples, strict=True)
            rows = len(own) if out.weighted is None else len(out.weighted.states)
            taken += out.evaluations * rows
    samples = torch.stack([x for _, x in sorted(found, key=lambda pair: pair[0])])
    return samples, time.perf_counter() - start, round(taken / len(expressions))


def sample_row(
    form: str,
    asked: Sequence[Request],
    task: Task,
    weights: Mapping[str, float] | float | None,
    seed: int,
) -> Row:
    """Draws one sample for each request."""
    expressions = [compose(form, request, task.terms, task.base, weights) for request in asked]
    samples, seconds, evaluations = draw(expressions, torch.Generator().manual_seed(seed))
    return Row(samples, list(asked), seconds, evaluations)
