"""What became of a training, in plain words: held-out figures beside what they should be.

Samples are compared with pictures by d, the root of the mean squared difference of pixels in [-1, 1]:

    d(sample, nearest picture learned from)  against  d(held-out picture, nearest picture learned from)

Much less means copies; much more means noise, or ghosts of several pictures in one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from composable_ebm.data import LabelledImages
from composable_ebm.data.summary import FEW
from composable_ebm.experts.expert import Expert
from composable_ebm.plotting import save_grid
from composable_ebm.train.export import sample_values

SAMPLES = 64
HELD_OUT = 256
SHOWN = 16
CHUNK = 512
COPIES, FAR = 0.6, 1.5
"""Ratios of the two distances below which samples are copies, and above which they are like no picture."""
LEARNED = 0.95
OVERFIT = 1.15
MORE_PICTURES = "it no longer got better: more pictures may help, more minutes do not"

__all__ = ["Verdict", "judge"]


@dataclass(frozen=True)
class Verdict:
    """What became of a training.

    Attributes:
        figures: For the card.
        lines: In words.
    """

    figures: Mapping[str, float]
    lines: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join(self.lines)


def judge(
    expert: Expert,
    train: LabelledImages,
    held_out: LabelledImages,
    metrics: Mapping[str, float],
    on_training: Mapping[str, float],
    sheet: Path,
    better: bool = False,
) -> Verdict:
    """Draws samples from noise and says what they and the held-out figures are worth.

    Args:
        expert: The expert.
        train: Pictures that it learned from.
        held_out: Pictures that it has not seen.
        metrics: Its `held_out_metrics`.
        on_training: The same measured on pictures that it learned from.
        sheet: A picture of samples with their nearest pictures beneath them is written here.
        better: Whether it was still getting better at the end.
    """
    columns = sample_values(expert, max(SAMPLES // len(expert.card.values), 2))
    samples = expert.images(torch.cat(list(columns.values()))).cpu().clamp(-1, 1)
    distance, nearest = _nearest(samples, train)
    some = torch.randperm(len(held_out), generator=torch.Generator().manual_seed(0))[:HELD_OUT]
    real, _ = _nearest(held_out.batch(some).cpu(), train)
    figures = {
        "sample_distance": round(float(distance.median()), 4),
        "heldout_distance": round(float(real.median()), 4),
    }
    pick = torch.linspace(0, len(samples) - 1, min(SHOWN, len(samples))).long()
    beside = torch.cat([samples[pick], train.batch(nearest[pick].to(train.images.device)).cpu()])
    title = {"expert": expert.card.full_name, "rows": "samples from noise, nearest training pictures"}
    save_grid(beside, sheet, columns=len(pick), metadata=title)
    return Verdict(
        figures, tuple(_lines(expert, train, metrics, on_training, figures, held_out, sheet, better))
    )


def _nearest(images: Tensor, train: LabelledImages) -> tuple[Tensor, Tensor]:
    """Distance and position of the nearest training picture of each image."""
    flat = images.flatten(1)
    best = torch.full((len(flat),), torch.inf)
    where = torch.zeros(len(flat), dtype=torch.long)
    for index in torch.arange(len(train)).split(CHUNK):
        theirs = train.batch(index.to(train.images.device)).cpu().flatten(1)
        distance, place = torch.cdist(flat, theirs).min(1)
        closer = distance < best
        best[closer], where[closer] = distance[closer], index[place[closer]]
    return best / flat.shape[1] ** 0.5, where


def _gaussian_share(metrics: Mapping[str, float]) -> float:
    """The denoising error over a Gaussian's own on the same pictures: it, too, knows some of them."""
    return metrics.get("heldout_denoising", 0.0) / metrics.get("heldout_gaussian", 1.0)


def _rare(attribute: str, train: LabelledImages) -> str:
    """The values of few pictures, and how many."""
    if attribute not in train.values:
        return ""
    counts = [int((train.labels[attribute] == i).sum()) for i in range(len(train.values[attribute]))]
    return ", ".join(f"{v} ({n})" for v, n in zip(train.values[attribute], counts, strict=True) if n < FEW)


def _lines(
    expert: Expert,
    train: LabelledImages,
    metrics: Mapping[str, float],
    on_training: Mapping[str, float],
    figures: Mapping[str, float],
    held_out: LabelledImages,
    sheet: Path,
    better: bool,
) -> list[str]:
    lines, problems = [], []
    more = "it was still getting better: give it more --minutes" if better else MORE_PICTURES
    if "heldout_denoising" in metrics:
        error = _gaussian_share(metrics)
        known = _gaussian_share(on_training) or error
        lines.append(
            f"  held-out denoising error {error:.2f}, on pictures it learned from {known:.2f} (1 is a "
            "Gaussian: less is better, and the two should be alike)"
        )
        if error > LEARNED:
            problems.append(f"of other pictures it knows little more than a Gaussian does, and {more}")
        elif error > OVERFIT * known:
            problems.append(
                "it knows the pictures it learned from better than others: give it more pictures, or "
                "--data.mirror where left and right are alike"
            )
    if (accuracy := metrics.get("heldout_accuracy")) is not None:
        labels = held_out.labels[expert.card.attribute]
        chance = float(torch.bincount(labels[labels >= 0]).max() / max(int((labels >= 0).sum()), 1))
        lines.append(f"  held-out accuracy {accuracy:.2f} ({chance:.2f} by always saying the same)")
        if accuracy < (1 + chance) / 2:
            problems.append(
                "it tells values apart badly: give it more minutes or labels, or look for wrong ones"
            )
    if rare := _rare(expert.card.attribute, train):
        problems.append(f"of {rare} it has seen too few pictures: give it more of them")
    if expert.base is not None and _gaussian_share(expert.base.card.metrics) > LEARNED:
        problems.append(
            f"{expert.base.card.full_name}, from which its samples come, knows little more of other pictures "
            "than a Gaussian does: give that more pictures first, or --data.mirror where left and right are "
            "alike"
        )
    ratio = figures["sample_distance"] / max(figures["heldout_distance"], 1e-6)
    lines.append(
        f"  nearest training picture: {figures['sample_distance']:.2f} from a sample, "
        f"{figures['heldout_distance']:.2f} from a held-out picture (alike is right)"
    )
    if ratio < COPIES:
        problems.append(
            f"its samples are copies of the {len(train):,} pictures it learned from: only more pictures help"
        )
    elif ratio > FAR:
        problems.append(
            "its samples are like no picture, noise or ghosts: give it a smaller --data.size, or more "
            f"{'--minutes' if better else 'pictures'}"
        )
    worth = "usable" if not problems else "not good yet: " + "; ".join(problems)
    return [
        f"{expert.card.full_name}:",
        *lines,
        f"  verdict: {worth}.",
        f"  samples and their nearest: {sheet}",
    ]
