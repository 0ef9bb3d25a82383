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

from composable_ebm.energy import Energy, given, ratio
from composable_ebm.evaluation.task import Request, Task
from composable_ebm.experts.expert import Expert
from composable_ebm.sampling.engine import Engine
from composable_ebm.sampling.particles import Particles
from composable_ebm.sampling.request import calibrated_sampler, calibrated_steps

FORMS = ("ratio", "chains", "weight 3", "sum", "base ratio")

UNWEIGHED = ("chains", "weight 3")
"""Forms whose chains carry no weights."""
TASTE = 3.0
MOST_CHAINS = 512
"""Chains that step together."""

__all__ = ["FORMS", "Row", "compose", "draw", "sample_row"]


def compose(
    form: str,
    request: Request,
    terms: Mapping[str, Mapping[int, Expert]],
    base: Expert | None,
    weight: float | None = None,
) -> Energy:
    """The composition that asks for `request`.

    "sum" is Σ Eᵢ(x, aᵢ). "ratio" is `given`, which counts p(x) once; without a base expert the last
    attribute asked for brings p(x) along. "chains" and "weight 3" are the same composition for chains
    without weights (see `sample_row`), the latter at weight 3. "base ratio" is
    base + Σ wᵢ (Eᵢ(x, aᵢ) - E_base(x)), the formula of composable diffusion.

    Args:
        form: One of `FORMS`.
        request: What to ask for.
        terms: Attribute -> value -> its expert.
        base: The expert of p(x), if the family has one.
        weight: w of the ratios; what each was calibrated with unless given.
    """
    chosen = {name: terms[name][value] for name, value in request.items()}
    if form == "sum":
        return functools.reduce(operator.add, chosen.values())

    weight = TASTE if form == "weight 3" else weight
    if form == "base ratio" and base is not None:
        own = {n: e.given_weight if weight is None else weight for n, e in chosen.items()}
        return sum((own[n] * ratio(e, base) for n, e in chosen.items()), base)
    if form not in ("ratio", *UNWEIGHED):
        raise ValueError(
            f"`form` must be one of {', '.join(FORMS)} (base ratio only with a base), got {form!r}."
        )
    others = list(chosen.values())
    ground: Energy = others.pop() if base is None else base
    return given(ground, *others, weight=weight)


@dataclass(frozen=True)
class Row:
    """Samples of one row of the table, with what was asked of each.

    Attributes:
        samples: As pictures, (batch, *image).
        requests: What was asked of each.
        seconds: Wall time of the chains.
        evaluations: Gradient evaluations of the composition per chain.
    """

    samples: Tensor
    requests: list[Request]
    seconds: float
    evaluations: int


def draw(
    expressions: Sequence[Energy], generator: torch.Generator, weighed: bool = True
) -> tuple[Tensor, float, int]:
    """One sample of each composition, from noise by the settings stored in the experts.

    Equal compositions are one request, and all requests run on one engine.

    Args:
        expressions: One for each sample.
        generator: Draws the seeds of the requests.
        weighed: Whether chains may be particles.
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
            sampler, _ = calibrated_sampler(expressions[members[0]])
            if isinstance(sampler, Particles) and not weighed:
                sampler = sampler.plain
            for part in range(0, len(members), MOST_CHAINS // 2):
                own = members[part : part + MOST_CHAINS // 2]
                run = engine.submit(
                    expressions[own[0]],
                    num_chains=len(own),
                    num_steps=calibrated_steps(expressions[own[0]]),
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
    weight: float | None,
    seed: int,
) -> Row:
    """Draws one sample for each request."""
    expressions = [compose(form, request, task.terms, task.base, weight) for request in asked]
    generator = torch.Generator().manual_seed(seed)
    samples, seconds, evaluations = draw(expressions, generator, weighed=form not in UNWEIGHED)
    return Row(expressions[0].images(samples), list(asked), seconds, evaluations)
