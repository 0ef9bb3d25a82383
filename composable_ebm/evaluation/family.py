"""`composable-ebm evaluate FAMILY`: everything that is measured of a family of experts, in one file.

Each part is written down as soon as it is done, so that an evaluation that was stopped goes on where it
stood; what was kept is thrown away when the whole is finished, or when experts or settings change.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from tqdm.auto import tqdm

from composable_ebm.data import LabelledImages, load_data
from composable_ebm.evaluation.agreement import agreement, stability
from composable_ebm.evaluation.choice import alternatives, negation
from composable_ebm.evaluation.composition import FORMS, sample_row
from composable_ebm.evaluation.detection import detection
from composable_ebm.evaluation.judge import KINDS, Judge, load_judge
from composable_ebm.evaluation.report import plot, plot_agreement
from composable_ebm.evaluation.rivals import RIVALS, Missing, sample_rival
from composable_ebm.evaluation.rows import bounds, evaluate_row
from composable_ebm.evaluation.task import Task, requests, task_of
from composable_ebm.files import write_atomic

PARTS = ("rows", "negation", "alternatives", "detection", "agreement", "stability")
ALONE = ("agreement", "stability")  # done for each expert by itself
REQUEST_SEED = 40_000
PER_REQUEST = 50
"""Samples of each request in a row."""

__all__ = ["PARTS", "Evaluation", "evaluate_family"]


@dataclass(frozen=True)
class Evaluation:
    """What to evaluate.

    Args:
        family: Family of experts; its data set has the same name.
        parts: What to measure, see `PARTS`.
        forms: Ways to compose, see `composition.FORMS`, and rivals, see `rivals.RIVALS`.
        weight: Weight of every ratio; what each expert was calibrated with unless given.
        samples: Samples of each row.
        other_samples: Samples of rows of forms after the first, and in all of each NOT and OR.
        chains: Chains of each test of one expert alone.
        seeds: Seeds; rows are repeated for each.
        sizes: Numbers of attributes asked for at once; all unless given.
        held_out: Asks only for combinations that no expert saw.
        combinations: Those combinations; the ones that all cards name unless given.
        judges: Kinds of judges; the first one's features measure distances.
        root: Folder of the data.
        cache: Where judges are kept.
        progress: Where finished parts are kept until the whole is done.
    """

    family: str
    parts: tuple[str, ...] = PARTS
    forms: tuple[str, ...] = FORMS + RIVALS
    weight: float | None = None
    samples: int = 1000
    other_samples: int = 400
    chains: int = 64
    seeds: tuple[int, ...] = (0,)
    sizes: tuple[int, ...] = ()
    held_out: bool = False
    combinations: tuple[str, ...] = ()
    judges: tuple[str, ...] = KINDS
    root: str = ""
    cache: str = "runs/judges"
    progress: str = "runs/evaluation"

    def __post_init__(self) -> None:
        for name, known in (("parts", PARTS), ("forms", FORMS + RIVALS)):
            if unknown := [value for value in getattr(self, name) if value not in known]:
                raise ValueError(f"`{name}` are {', '.join(known)}, got {', '.join(map(repr, unknown))}.")


class Progress:
    """Finished parts on disk.

    Args:
        folder: One for each set of experts and settings.
        total: Number of parts, for the progress bar.
        title: Of the progress bar.
    """

    def __init__(self, folder: Path, total: int, title: str) -> None:
        self.folder = folder
        self.bar = tqdm(total=total, desc=title, dynamic_ncols=True)

    def part(self, name: str, compute: Callable[[], object]):
        """What `compute` gives, or gave before."""
        path = self.folder / f"{name}.json"
        if path.exists():
            found = json.loads(path.read_text())
        else:
            found = compute()
            write_atomic(path, json.dumps(found).encode())
            found = json.loads(path.read_text())  # the same types, computed or kept
        self.bar.update()
        return found

    def finish(self) -> None:
        """Throws everything away."""
        self.bar.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def evaluate_family(evaluation: Evaluation, out: str | Path) -> dict:
    """Evaluates a family and writes the results as JSON, with plots beside it.

    Args:
        evaluation: What to evaluate.
        out: A .json file; the plots have its name and end in .png and _agreement.png.
    Returns:
        The content of the file.
    Raises:
        ValueError: If the family has no experts to compose, or nothing was held out that is asked for.
    """
    task = task_of(evaluation.family, evaluation.combinations)
    if evaluation.held_out and not task.held_out:
        raise ValueError(
            f"the experts of {task.family!r} name no combination that all were trained without; name some "
            'with `combinations`, such as "glasses+beard".'
        )
    setting, accuracies = _prepare(evaluation, task)
    result = {**_provenance(evaluation, task), "judges": accuracies}
    result["ceiling"], result["floor"] = bounds(setting.first, task, setting.pool)
    if task.base is not None and task.base.codec is not None:
        result["codec_ceiling"], _ = bounds(setting.first, task, setting.pool, task.base.codec)
    plan = _plan(evaluation, task)
    parts = [name for name in PARTS[1:] if name in evaluation.parts]
    alone = [name for name in ALONE if name in parts]
    total = len(plan) + len(parts) + len(alone) * (len(task.all_experts) - 1)
    progress = Progress(_progress_folder(evaluation, result), total, f"evaluate {evaluation.family}")
    result.update(_all_rows(setting, plan, progress))
    for name in parts:
        result[name] = (
            {
                expert: progress.part(f"{name} {expert}", partial(_alone, setting, name, expert))
                for expert in task.all_experts
            }
            if name in alone
            else progress.part(name, partial(_part, setting, name))
        )
    out = Path(out)
    write_atomic(out, (json.dumps(result, indent=1) + "\n").encode())
    if result["rows"]:
        plot(result, out.with_suffix(".png"))
    if alone:
        plot_agreement(result, out.with_name(f"{out.stem}_agreement.png"))
    progress.finish()
    return result


@dataclass(frozen=True)
class _Setting:
    """What every measurement needs: real images to compare with, and those that experts learnt from."""

    evaluation: Evaluation
    task: Task
    judges: dict[str, Judge]
    pool: LabelledImages
    train: LabelledImages

    @property
    def first(self) -> Judge:
        """The judge of the table."""
        return next(iter(self.judges.values()))


def _prepare(evaluation: Evaluation, task: Task) -> tuple[_Setting, dict]:
    root = evaluation.root or None
    judged = {kind: load_judge(evaluation.family, kind, root, evaluation.cache) for kind in evaluation.judges}
    setting = _Setting(
        evaluation,
        task,
        judges={kind: judge for kind, (judge, _) in judged.items()},
        pool=task.reference(root),
        train=task.seen_in_training(load_data(evaluation.family, "train", root)),
    )
    return setting, {
        kind: {name: round(value, 4) for name, value in accuracy.items()}
        for kind, (_, accuracy) in judged.items()
    }


def _plan(evaluation: Evaluation, task: Task) -> list[tuple[str, int, int]]:
    """Form, size and seed of every row."""
    sizes = evaluation.sizes or task.sizes
    if evaluation.held_out:
        sizes = tuple(k for k in sizes if k >= min(map(len, task.held_out)))
    plan = [(f, k, s) for f in evaluation.forms for k in sizes for s in evaluation.seeds]
    return plan if "rows" in evaluation.parts else []


def _all_rows(setting: _Setting, plan: list[tuple[str, int, int]], progress: Progress) -> dict:
    """The rows, and why some could not be drawn."""
    found: dict = {"rows": [], "missing": {}}
    for form, size, seed in plan:
        row = progress.part(f"row {form} {size} {seed}", partial(_row, setting, form, size, seed))
        if "missing" in row:
            found["missing"][form] = row["missing"]
        else:
            found["rows"].append({"form": form, "attributes_asked": size, "seed": seed, **row})
    return found


def _row(setting: _Setting, form: str, size: int, seed: int) -> dict:
    """One row: the same requests for every form."""
    evaluation, task = setting.evaluation, setting.task
    count = evaluation.samples if form == evaluation.forms[0] else evaluation.other_samples
    generator = torch.Generator().manual_seed(REQUEST_SEED + seed)
    held_out = task.held_out if evaluation.held_out else ()
    asked = requests(task.askable, size, count, generator, held_out, each=PER_REQUEST)
    if form == "base ratio" and task.base is None:
        return {"missing": f"the family {task.family!r} has no expert of p(x)."}
    try:
        if form in RIVALS:
            row = sample_rival(form, asked, task, seed)
        else:
            row = sample_row(form, asked, task, evaluation.weight, seed)
    except Missing as error:
        return {"missing": str(error)}
    return evaluate_row(row, task, setting.judges, setting.pool, setting.train)


def _part(setting: _Setting, name: str) -> object:
    """A measurement of the whole family."""
    task, seed, count = setting.task, setting.evaluation.seeds[0], setting.evaluation.other_samples
    if name == "detection":
        return detection(task.experts, task.base, setting.pool)
    return {"negation": negation, "alternatives": alternatives}[name](task, setting.first, count, seed)


def _alone(setting: _Setting, name: str, expert: str) -> dict:
    """A measurement of one expert."""
    measure = {"agreement": agreement, "stability": stability}[name]
    evaluation = setting.evaluation
    return measure(setting.task, expert, setting.first, setting.pool, evaluation.chains, evaluation.seeds[0])


def _provenance(evaluation: Evaluation, task: Task) -> dict:
    settings = {k: v for k, v in asdict(evaluation).items() if k not in ("root", "cache", "progress")}
    return {
        "family": task.family,
        "experts": {name: e.card.weights.get("sha256", "")[:12] for name, e in task.all_experts.items()},
        "weights": {name: e.card.weight for name, e in task.experts.items()},
        "held_out": [
            "+".join(f"{name}={value}" for name, value in request.items()) for request in task.held_out
        ],
        "settings": settings,
        "versions": {
            "composable_ebm": version("composable_ebm"),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "machine": _machine(),
        "threads": torch.get_num_threads(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def _progress_folder(evaluation: Evaluation, provenance: dict) -> Path:
    kept = {k: provenance[k] for k in ("family", "experts", "weights", "held_out", "settings", "versions")}
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:12]
    return Path(evaluation.progress) / f"{evaluation.family}-{digest}"


def _machine() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if "model name" in line]
    return models[0] if models else platform.processor() or platform.machine()
