"""`composable-ebm evaluate FAMILY`: the table and the plot of a family of experts."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm.auto import tqdm

from composable_ebm.data import load_data
from composable_ebm.evaluation.composition import FORMS, ceiling, evaluate_row, neighbours, sample_row
from composable_ebm.evaluation.detection import detection
from composable_ebm.evaluation.judge import KINDS, load_judge
from composable_ebm.experts.card import Card
from composable_ebm.experts.catalogue import cards, load_expert
from composable_ebm.experts.checkpoint import write_atomic
from composable_ebm.experts.expert import Expert
from composable_ebm.plotting import BLUE, GREEN, GREY, INK, ORANGE, figure, save_figure

# Attributes whose experts are composed, in order; others of the family are left out.
ATTRIBUTES = {
    "digits": ("digit", "thick", "slanted"),
    "faces": ("smile", "glasses", "beard", "curly", "grey_hair"),
}
BASE = "image"

__all__ = ["Evaluation", "evaluate_family"]


@dataclass(frozen=True)
class Evaluation:
    """What to evaluate.

    Args:
        family: Family of experts; its data set has the same name.
        forms: Ways to compose, see `composition.FORMS`.
        weight: Weight of every ratio; what each expert was calibrated with unless given.
        samples: Samples of each row.
        seeds: Seeds; rows are repeated for each.
        sizes: Numbers of attributes asked for at once; all unless given.
        judges: Kinds of judges; the first one's features measure distances.
        root: Folder of the data.
        cache: Where judges are kept.
    """

    family: str
    forms: tuple[str, ...] = FORMS[:2]
    weight: float | None = None
    samples: int = 1000
    seeds: tuple[int, ...] = (0,)
    sizes: tuple[int, ...] = ()
    judges: tuple[str, ...] = KINDS
    root: str = ""
    cache: str = "runs/judges"


def evaluate_family(evaluation: Evaluation, out: str | Path) -> dict:
    """Evaluates a family and writes the results as JSON, and a plot beside it.

    Args:
        evaluation: What to evaluate.
        out: A .json file; the plot has the same name and ends in .png.
    Returns:
        The content of the file.
    Raises:
        ValueError: If the family has no experts to compose.
    """
    experts, base = family_experts(evaluation.family)
    root = evaluation.root or None
    train = load_data(evaluation.family, "train", root)
    held_out = load_data(evaluation.family, "validation", root)
    judged = {kind: load_judge(evaluation.family, kind, root, evaluation.cache) for kind in evaluation.judges}
    judges = {kind: judge for kind, (judge, _) in judged.items()}
    attributes = list(experts)
    result: dict = {
        "family": evaluation.family,
        "experts": {name: e.card.weights["sha256"][:12] for name, e in experts.items()},
        "settings": {
            "weight": evaluation.weight,
            "samples": evaluation.samples,
            "seeds": list(evaluation.seeds),
        },
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "threads": torch.get_num_threads(),
        "judges": {
            kind: {k: round(v, 4) for k, v in accuracy.items()} for kind, (_, accuracy) in judged.items()
        },
        "ceiling": ceiling(next(iter(judges.values())), evaluation.family, held_out, attributes),
        "floor": _floor(experts),
        "rows": [],
    }
    sizes = evaluation.sizes or tuple(range(1, len(attributes) + 1))
    plan = [(f, k, s) for f in evaluation.forms for k in sizes for s in evaluation.seeds]
    for form, size, seed in tqdm(plan, desc=f"evaluate {evaluation.family}", dynamic_ncols=True):
        row = sample_row(form, size, evaluation.samples, experts, base, evaluation.weight, seed)
        found = evaluate_row(row, evaluation.family, judges, held_out)
        result["rows"].append({"form": form, "attributes_asked": size, "seed": seed, **found})
    result["nearest_training_image"] = neighbours(row.samples, train, held_out)
    result["detection"] = detection(experts, base, held_out)
    out = Path(out)
    write_atomic(out, (json.dumps(result, indent=1) + "\n").encode())
    plot(result, out.with_suffix(".png"))
    return result


def family_experts(family: str) -> tuple[dict[str, Expert], Expert | None]:
    """The experts to compose, by attribute, and the expert of p(x) if there is one."""
    known: dict[str, Card] = {n: c for n, c in cards()[0].items() if c.family == family}
    by_attribute = {card.attribute: name for name, card in known.items()}
    wanted = ATTRIBUTES.get(family, tuple(a for a in by_attribute if a != BASE))
    found = {a: load_expert(by_attribute[a]) for a in wanted if a in by_attribute}
    if not found:
        there = ", ".join(sorted({name.split("/")[0] for name in cards()[0]})) or "none"
        raise ValueError(f"the family {family!r} has no experts to compose; families with experts: {there}.")
    return found, load_expert(by_attribute[BASE]) if BASE in by_attribute else None


def table(result: dict) -> str:
    """The accuracies as text: a row for each form, a column for each number of attributes."""
    sizes = sorted({row["attributes_asked"] for row in result["rows"]})
    judge = next(iter(result["judges"]))
    lines = ["form    " + "".join(f"{k:>8}" for k in sizes)]
    for form in dict.fromkeys(row["form"] for row in result["rows"]):
        lines.append(f"{form:<8}" + "".join(f"{100 * a:8.1f}" for a in _curve(result, form, judge, sizes)))
    for name in ("ceiling", "floor"):
        lines.append(f"{name:<8}" + "".join(f"{100 * result[name][str(k)]:8.1f}" for k in sizes))
    return "\n".join(lines)


def plot(result: dict, path: Path) -> None:
    """Accuracy against the number of attributes, with the ceiling and the floor."""
    sizes = sorted({row["attributes_asked"] for row in result["rows"]})
    judge = next(iter(result["judges"]))
    fig, axes = figure(1, 1, width=6.0, height=3.6)
    axis = axes[0, 0]
    for form, colour in zip(
        dict.fromkeys(r["form"] for r in result["rows"]), (ORANGE, BLUE, GREEN), strict=False
    ):
        heights = [100 * a for a in _curve(result, form, judge, sizes)]
        axis.plot(sizes, heights, marker="o", color=colour, label=form)
    axis.plot(sizes, [100 * result["ceiling"][str(k)] for k in sizes], color=INK, ls=":", label="real images")
    axis.plot(sizes, [100 * result["floor"][str(k)] for k in sizes], color=GREY, ls="--", label="chance")
    axis.set(
        xlabel="attributes asked for at once", ylabel="all of them right, %", ylim=(0, 102), xticks=sizes
    )
    axis.set_title(f"Composing {result['family']} experts")
    axis.legend()
    save_figure(fig, path)


def _curve(result: dict, form: str, judge: str, sizes: Sequence[int]) -> list[float]:
    means = []
    for size in sizes:
        rows = [r for r in result["rows"] if r["form"] == form and r["attributes_asked"] == size]
        means.append(sum(r[f"accuracy_{judge}"]["value"] for r in rows) / len(rows))
    return means


def _floor(experts: dict[str, Expert]) -> dict[str, float]:
    """Accuracy of guessing, for the first k attributes averaged over subsets of equal size."""
    chances = [1 / len(e.card.values) for e in experts.values()]
    floor = {}
    elementary = [1.0] + [0.0] * len(chances)
    for chance in chances:
        for k in range(len(chances), 0, -1):
            elementary[k] += elementary[k - 1] * chance
    count = 1.0
    for k in range(1, len(chances) + 1):
        count = count * (len(chances) - k + 1) / k
        floor[str(k)] = round(elementary[k] / count, 4)
    return floor
