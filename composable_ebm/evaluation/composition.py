"""How well experts compose: accuracy and diversity for 1, 2, ... attributes asked for at once.

Each row asks for k attributes, a random subset with random values for every chain, so presence and
absence are asked for alike. All requests on one subset run as one batch: one structure, a row of
coefficients for each chain. Samples are drawn from noise with the settings stored in the experts.
"""

from __future__ import annotations

import functools
import itertools
import operator
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from composable_ebm.data import LabelledImages
from composable_ebm.energy import Energy, Sum, ratio
from composable_ebm.evaluation.judge import Judge, see
from composable_ebm.evaluation.metrics import (
    entropy,
    frechet_distance,
    nearest_distance,
    precision_recall,
    wilson_interval,
)
from composable_ebm.experts.expert import Expert, given
from composable_ebm.sampling.sample import calibrated_sampler, sample

FORMS = ("sum", "ratio", "base ratio")

__all__ = ["FORMS", "Request", "as_one_batch", "compose", "evaluate_row", "requests"]

Request = Mapping[str, int]
"""attribute -> position of the value asked for."""


def compose(
    form: str,
    request: Request,
    experts: Mapping[str, Expert],
    base: Expert | None,
    weight: float | None = None,
) -> Energy:
    """The composition that asks for `request`.

    "sum" is Σ Eᵢ(x, aᵢ). "ratio" is `given`, which counts p(x) once; without a base expert the last
    attribute asked for brings p(x) along. "base ratio" is base + Σ wᵢ (Eᵢ(x, aᵢ) - E_base(x)).

    Args:
        form: One of `FORMS`.
        request: What to ask for.
        experts: Attribute -> its expert.
        base: The expert of p(x), if the family has one.
        weight: w of the ratios, the same for all; what each was calibrated with unless given.
    """
    chosen = {name: experts[name][experts[name].card.values[value]] for name, value in request.items()}
    if form == "sum":
        return functools.reduce(operator.add, chosen.values())
    if form == "base ratio" and base is not None:
        strengths = [e.card.weight if weight is None else weight for e in chosen.values()]
        return sum((w * ratio(e, base) for w, e in zip(strengths, chosen.values(), strict=True)), base)
    if form != "ratio":
        raise ValueError(f"`form` must be one of {', '.join(FORMS)} (the last with a base), got {form!r}.")
    if base is None:
        *others, carrier = chosen.values()
        return given(carrier, *others, weight=weight)
    return given(base, *chosen.values(), weight=weight)


def as_one_batch(expressions: Sequence[Energy]) -> tuple[Energy, Tensor]:
    """Several compositions as one: a sum over all their terms, and a row of coefficients for each.

    Returns:
        The sum, and coefficients (expressions, terms) that make row i equal expression i.
    """
    parts = [
        list(zip(e.operands, e.weights, strict=True)) if isinstance(e, Sum) else [(e, 1.0)]
        for e in expressions
    ]
    terms = {term.key: term for part in parts for term, _ in part}
    if any(term.num_coefficients for term in terms.values()):
        raise ValueError(
            "only sums of experts run as one batch; a mixture or negation has coefficients of its own."
        )
    place = {key: i for i, key in enumerate(terms)}
    coefficients = torch.zeros(len(expressions), len(terms), dtype=torch.float64)
    for row, part in enumerate(parts):
        for term, weight in part:
            coefficients[row, place[term.key]] = weight
    return Sum(list(terms.values())), coefficients


def requests(
    values: Mapping[str, int], size: int, count: int, generator: torch.Generator
) -> dict[tuple[str, ...], list[Request]]:
    """`count` random requests of `size` attributes, by the subset they ask for.

    Args:
        values: Attribute -> how many values it has.
        size: Attributes asked for at once.
        count: Requests in all, shared out evenly over the subsets.
        generator: Draws the values.
    """
    subsets = list(itertools.combinations(values, size))
    grouped: dict[tuple[str, ...], list[Request]] = {}
    for i, subset in enumerate(subsets):
        share = count * (i + 1) // len(subsets) - count * i // len(subsets)
        drawn = {n: torch.randint(values[n], (share,), generator=generator).tolist() for n in subset}
        if share:
            grouped[subset] = [{n: drawn[n][row] for n in subset} for row in range(share)]
    return grouped


@dataclass(frozen=True)
class Row:
    """Samples of one row of the table, with what was asked of each."""

    samples: Tensor
    requests: list[Request]
    seconds: float
    evaluations: int


def sample_row(
    form: str,
    size: int,
    count: int,
    experts: Mapping[str, Expert],
    base: Expert | None,
    weight: float | None,
    seed: int,
) -> Row:
    """Draws `count` samples, each for a request of `size` attributes."""
    generator = torch.Generator().manual_seed(seed)
    counts = {name: len(expert.card.values) for name, expert in experts.items()}
    samples, asked, seconds, evaluations = [], [], 0.0, 0
    for group in requests(counts, size, count, generator).values():
        expressions = [compose(form, request, experts, base, weight) for request in group]
        structure, coefficients = as_one_batch(expressions)
        sampler, num_steps = calibrated_sampler(expressions[0])
        start = time.perf_counter()
        out = sample(
            structure,
            num_chains=len(group),
            num_steps=num_steps,
            sampler=sampler,
            coefficients=coefficients,
            generator=generator,
            on_divergence="report",
        )
        seconds += time.perf_counter() - start
        evaluations = out.evaluations
        samples.append(out.samples)
        asked += group
    return Row(torch.cat(samples), asked, seconds, evaluations)


def evaluate_row(row: Row, data_name: str, judges: Mapping[str, Judge], reference: LabelledImages) -> dict:
    """What a table says of one row.

    Args:
        row: The samples.
        data_name: Data set the judges know.
        judges: Name -> judge; the first one's features are used for distances.
        reference: Held-out data: for marginals, `fid_attr`, precision and recall.
    Returns:
        Accuracies with confidence intervals, marginals of attributes nobody asked for, and
        diversity, as plain numbers.
    """
    first = next(iter(judges.values()))
    found: dict = {
        "samples": len(row.samples),
        "seconds": round(row.seconds, 1),
        "evaluations": row.evaluations,
    }
    for name, judge in judges.items():
        correct = right(see(judge, data_name, row.samples), row.requests)
        found[f"accuracy_{name}"] = _proportion(correct)
    seen = see(first, data_name, row.samples)
    found["attributes"] = {}
    for attribute in {name for request in row.requests for name in request}:
        rows = [i for i, request in enumerate(row.requests) if attribute in request]
        correct = right(
            {attribute: seen[attribute][rows]}, [{attribute: row.requests[i][attribute]} for i in rows]
        )
        found["attributes"][attribute] = round(float(correct.float().mean()), 4)
    found["free"] = {}
    for attribute, names in reference.values.items():
        rows = [i for i, request in enumerate(row.requests) if attribute not in request]
        if rows:
            found["free"][attribute] = _marginal(
                seen[attribute][rows], reference.labels[attribute], len(names)
            )
    generator = torch.Generator().manual_seed(0)
    index = torch.randperm(len(reference), generator=generator)[: max(1000, len(row.samples))]
    data = reference.batch(index)
    real, fake = first.features(data), first.features(row.samples)
    half = len(real) // 2
    found["fid_attr"] = round(frechet_distance(fake, real), 3)
    found["fid_attr_real"] = round(frechet_distance(real[:half], real[half:]), 3)
    found["precision"], found["recall"] = (round(v, 4) for v in precision_recall(real, fake))
    distances = torch.cdist(row.samples.flatten(1), row.samples.flatten(1)).fill_diagonal_(float("inf"))
    found["duplicates"] = round(float((distances.min(dim=1).values < 1.0).float().mean()), 4)
    return found


def neighbours(samples: Tensor, train: LabelledImages, held_out: LabelledImages, limit: int = 256) -> dict:
    """Distance of samples to their nearest training image, beside that of held-out data."""
    reference = train.batch(torch.arange(len(train)))
    own = held_out.batch(torch.arange(min(limit, len(held_out))))
    ours, theirs = nearest_distance(samples[:limit], reference), nearest_distance(own, reference)
    return {
        "samples_median": round(float(ours.median()), 3),
        "samples_min": round(float(ours.min()), 3),
        "heldout_median": round(float(theirs.median()), 3),
        "heldout_min": round(float(theirs.min()), 3),
    }


def ceiling(
    judge: Judge, data_name: str, data: LabelledImages, attributes: Sequence[str]
) -> dict[str, float]:
    """Share of real images whose first k attributes the judge all sees right: what a perfect model scores."""
    labelled = torch.stack([data.labels[name] >= 0 for name in attributes]).all(dim=0)
    known = data.select(labelled)
    seen = see(judge, data_name, known.batch(torch.arange(len(known))))
    hits = torch.stack([seen[name] == known.labels[name] for name in attributes])
    return {
        str(k): round(float(hits[:k].all(dim=0).float().mean()), 4) for k in range(1, len(attributes) + 1)
    }


def right(seen: Mapping[str, Tensor], asked: Sequence[Request]) -> Tensor:
    """Which samples show everything that was asked of them, (batch,)."""
    return torch.tensor(
        [all(int(seen[n][i]) == v for n, v in request.items()) for i, request in enumerate(asked)]
    )


def _proportion(correct: Tensor) -> dict[str, float]:
    low, high = wilson_interval(int(correct.sum()), len(correct))
    return {"value": round(float(correct.float().mean()), 4), "low": round(low, 4), "high": round(high, 4)}


def _marginal(seen: Tensor, data: Tensor, values: int) -> dict:
    def shares(labels: Tensor) -> Tensor:
        counts = torch.bincount(labels[labels >= 0], minlength=values).double()
        return counts / counts.sum()

    ours, theirs = shares(seen), shares(data)
    return {
        "shares": [round(float(s), 4) for s in ours],
        "largest_difference": round(float((ours - theirs).abs().max()), 4),
        "entropy": round(entropy(ours), 4),
        "entropy_data": round(entropy(theirs), 4),
    }
