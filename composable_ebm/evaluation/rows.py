"""What the table says of one row: accuracy with its interval, seen and held out, and diversity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from composable_ebm.data import LabelledImages
from composable_ebm.energy import Codec
from composable_ebm.evaluation.composition import Row
from composable_ebm.evaluation.diversity import diversity, marginals
from composable_ebm.evaluation.judge import Judge, see
from composable_ebm.evaluation.metrics import wilson_interval
from composable_ebm.evaluation.task import Request, Task, requests

BOUND_IMAGES = 1000

__all__ = ["bounds", "evaluate_row", "proportion", "right"]


def evaluate_row(
    row: Row,
    task: Task,
    judges: Mapping[str, Judge],
    pool: LabelledImages,
    train: LabelledImages,
) -> dict:
    """What a table says of one row.

    Args:
        row: The samples.
        task: What they were asked for.
        judges: Name -> judge; the first one's features are used for distances.
        pool: Held-out images to compare with.
        train: Images that the experts learnt from.
    Returns:
        Accuracies with 95 % intervals, over all requests and over those seen and held out in training
        apart; accuracy of each attribute; marginals of attributes nobody asked for; diversity; and the
        seconds that 64 samples take.
    """
    found: dict = {
        "samples": len(row.samples),
        "seconds": round(row.seconds, 1),
        "seconds_per_64": round(64 * row.seconds / len(row.samples), 2),
        "evaluations": row.evaluations,
    }
    held_out = torch.tensor([task.is_held_out(request) for request in row.requests])
    for name, judge in judges.items():
        correct = right(see(judge, task.family, row.samples), row.requests)
        found[f"accuracy_{name}"] = proportion(correct)
        if held_out.any():
            found[f"seen_{name}"] = proportion(correct[~held_out])
            found[f"held_out_{name}"] = proportion(correct[held_out])
    first = next(iter(judges.values()))
    seen = see(first, task.family, row.samples)
    found["attributes"] = {}
    for attribute in dict.fromkeys(name for request in row.requests for name in request):
        members = [i for i, request in enumerate(row.requests) if attribute in request]
        wanted = torch.tensor([row.requests[i][attribute] for i in members])
        found["attributes"][attribute] = round(float((seen[attribute][members] == wanted).float().mean()), 4)
    found["free"] = marginals(seen, row.requests, first, pool, task.reported(pool))
    found.update(diversity(row.samples, row.requests, first, pool, train))
    return found


def bounds(
    judge: Judge, task: Task, pool: LabelledImages, codec: Codec | None = None
) -> tuple[dict[str, float], dict[str, float]]:
    """What real images score, by number of attributes: the ceiling, and the floor.

    The ceiling asks of each image for attributes that it has: what a perfect model would score under
    this judge. The floor asks at random: what a model would score that does not listen.

    Args:
        judge: Sees attributes.
        task: What can be asked for.
        pool: Held-out images.
        codec: Where given, images are seen as they come back from it: what perfect latents would score.
    """
    generator = torch.Generator().manual_seed(0)
    index = torch.randperm(len(pool), generator=generator)[:BOUND_IMAGES]
    images = pool.select(index)
    parts = [images.batch(part) for part in torch.arange(len(images)).split(250)]
    x = torch.cat(parts if codec is None else [codec.reconstruct(part) for part in parts])
    seen = see(judge, task.family, x)
    ceiling, floor = {}, {}
    for size in task.sizes:
        blind = requests(task.askable, size, len(images), generator)
        blind = [blind[i] for i in torch.randperm(len(blind), generator=generator).tolist()]
        floor[str(size)] = round(float(right(seen, blind).float().mean()), 4)
        asked, members = [], []
        for i in range(len(images)):
            has = {n: int(images.labels[n][i]) for n in task.terms}
            true = [n for n, value in has.items() if value in task.terms[n]]
            if len(true) >= size:
                chosen = torch.randperm(len(true), generator=generator)[:size].tolist()
                asked.append({true[j]: has[true[j]] for j in chosen})
                members.append(i)
        if members:
            own = {name: labels[members] for name, labels in seen.items()}
            ceiling[str(size)] = round(float(right(own, asked).float().mean()), 4)
    return ceiling, floor


def right(seen: Mapping[str, Tensor], asked: Sequence[Request]) -> Tensor:
    """Which samples show everything that was asked of them, (batch,)."""
    return torch.tensor(
        [all(int(seen[n][i]) == v for n, v in request.items()) for i, request in enumerate(asked)]
    )


def proportion(correct: Tensor) -> dict:
    """A share with its 95 % interval (Wilson) and the number of samples."""
    low, high = wilson_interval(int(correct.sum()), len(correct))
    value = float(correct.float().mean()) if len(correct) else float("nan")
    return {"value": round(value, 4), "low": round(low, 4), "high": round(high, 4), "samples": len(correct)}
