"""Whether samples are as varied as real images of the same requests.

Every comparison is with real images that satisfy the very requests of the samples, one for one, and in
equal numbers: for each request two different held-out images, a first and a second reference. So a
distance of samples to the first stands beside that of the second to the first, at the same size.
Both shrink as more are compared, and their ratio grows where samples differ from data: ratios are
comparable only between equal numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from composable_ebm.data import LabelledImages
from composable_ebm.data.combinations import satisfying
from composable_ebm.evaluation.judge import Judge
from composable_ebm.evaluation.metrics import entropy, frechet_distance, nearest_distance, precision_recall
from composable_ebm.evaluation.task import Request

FEWEST = 50
NEIGHBOURS = 256
DUPLICATE = 1.0  # distance in units of [-1, 1], over all pixels, below which two samples are one

__all__ = ["diversity", "marginals", "matched"]


def matched(
    asked: Sequence[Request], pool: LabelledImages, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Two real images for each request that has them, of one half of the pool and of the other.

    No image serves a request twice. It may serve several: if it served once in all, late requests would be
    compared with what others have left over, in which attributes have other shares.

    Args:
        asked: Requests.
        pool: Real images with labels.
        generator: Chooses among them.
    Returns:
        Positions of the requests that found both, and of their first and second images, (n,) each.
    """
    rows: dict[tuple, list[int]] = {}
    for i, request in enumerate(asked):
        rows.setdefault(tuple(sorted(request.items())), []).append(i)
    halves = torch.randperm(len(pool), generator=generator).chunk(2)
    found: list[tuple[int, int, int]] = []
    for key, places in sorted(rows.items()):
        fitting = satisfying(dict(key), pool)
        there = (half[fitting[half]] for half in halves)
        first, second = (x[torch.randperm(len(x), generator=generator)].tolist() for x in there)
        found += zip(places, first, second, strict=False)  # as many as there are of all three
    columns = torch.tensor(sorted(found), dtype=torch.int64).reshape(-1, 3)
    return columns[:, 0], columns[:, 1], columns[:, 2]


def diversity(
    samples: Tensor,
    asked: Sequence[Request],
    judge: Judge,
    pool: LabelledImages,
    train: LabelledImages | None = None,
) -> dict:
    """Distance, precision and recall in a judge's features, nearest training images, duplicates.

    Args:
        samples: (batch, *event).
        asked: What was asked of each.
        judge: Its features measure.
        pool: Held-out images with labels.
        train: Images that the experts learnt from; without them nearest neighbours are left out.
    Returns:
        `fid_attr` of samples, the mean over both references; `fid_attr_real` between the references;
        `fid_attr_ratio`; `compared`, how many of each; precision and recall, and those of real images;
        nearest training images; `duplicates`, the share of samples that have a copy among the others.
        Distances are left out where fewer than 50 requests find two real images.
    """
    found: dict = {"duplicates": round(_duplicates(samples), 4)}
    rows, first, second = matched(asked, pool, torch.Generator().manual_seed(0))
    found["compared"] = len(rows)
    if len(rows) < FEWEST:
        return found
    fake = judge.features(samples[rows])
    one, other = (judge.features(pool.batch(index)) for index in (first, second))
    real = frechet_distance(one, other)
    distance = (frechet_distance(fake, one) + frechet_distance(fake, other)) / 2
    found["fid_attr"], found["fid_attr_real"] = round(distance, 3), round(real, 3)
    found["fid_attr_ratio"] = round(distance / real, 3)
    for name, features in (("", fake), ("_real", other)):
        precision, recall = precision_recall(one, features)
        found[f"precision{name}"], found[f"recall{name}"] = round(precision, 4), round(recall, 4)
    if train is not None:
        found["nearest_training_image"] = {
            name: _quantiles(_nearest(x[:NEIGHBOURS], train))
            for name, x in (("samples", samples[rows]), ("held_out", pool.batch(first)))
        }
    return found


def marginals(
    seen: Mapping[str, Tensor],
    asked: Sequence[Request],
    judge: Judge,
    pool: LabelledImages,
    names: Sequence[str],
) -> dict[str, dict]:
    """Shares of the values of attributes that nobody asked for, beside those of matched real images.

    Args:
        seen: Attribute -> label of each sample.
        asked: What was asked of each.
        judge: Says of real images without a label what it says of samples: which of eight colours grey
            hair has, for instance.
        pool: Held-out images with labels.
        names: Attributes to report.
    """
    rows, first, second = matched(asked, pool, torch.Generator().manual_seed(0))
    found = {}
    for name in names:
        free = torch.tensor([name not in asked[i] for i in rows.tolist()], dtype=torch.bool)
        if int(free.sum()) < FEWEST or name not in seen:
            continue
        index = torch.cat([first[free], second[free]])
        real = pool.labels[name][index].clone()
        if (bare := real < 0).any():
            real[bare] = judge.labels(pool.batch(index[bare]))[name]
        ours, theirs = (_shares(labels, len(pool.values[name])) for labels in (seen[name][rows[free]], real))
        found[name] = {
            "shares": [round(float(s), 4) for s in ours],
            "shares_data": [round(float(s), 4) for s in theirs],
            "largest_difference": round(float((ours - theirs).abs().max()), 4),
            "entropy": round(entropy(ours), 4),
            "entropy_data": round(entropy(theirs), 4),
        }
    return found


def _shares(labels: Tensor, values: int) -> Tensor:
    counts = torch.bincount(labels[labels >= 0], minlength=values).double()
    return counts / counts.sum()


def _duplicates(samples: Tensor) -> float:
    flat = samples.flatten(1)
    closest = torch.cdist(flat, flat).fill_diagonal_(float("inf")).min(dim=1).values
    return float((closest < DUPLICATE).float().mean())


def _nearest(x: Tensor, train: LabelledImages) -> Tensor:
    """Distance of each image to its nearest in a data set, which is seen as floats part by part, (n,)."""
    parts = torch.arange(len(train)).split(4096)
    return torch.stack([nearest_distance(x, train.batch(index)) for index in parts]).amin(0)


def _quantiles(distances: Tensor) -> dict[str, float]:
    return {"median": round(float(distances.median()), 3), "least": round(float(distances.min()), 3)}
