"""What a lesson is: marks, a base to teach beside, and an expert with its card.

The loss is that of `train.objectives.NoisyClassification`, over noisy copies, and the expert stands on the
family's base as its others may. It is not the trainer that lessens it: that takes 2,000 steps of Adam where
ten of Newton's reach the minimum of these convex problems, and needs Accelerate, which a server of the mixer
has no use for.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from composable_ebm.experts.card import Card
from composable_ebm.experts.expert import Expert
from composable_ebm.experts.networks import ConfinedEnergy, RegionClassifier
from composable_ebm.experts.networks.skeleton import GaussianSkeleton
from composable_ebm.experts.teach import latents, regions
from composable_ebm.proportions import wilson_interval

VALUES = ("no", "yes")
LEAST = 3  # marks of each kind

__all__ = ["LEAST", "Lesson", "teach"]


@dataclass(frozen=True)
class Lesson:
    """How an expert is taught.

    Attributes:
        copies: Noisy copies of all marks together, about.
        noise_levels: Smallest and largest noise of the copies, log-uniform, in data units.
        penalties: The λ to choose from.
        folds: Parts of the marks that are left out in turn.
        sides: Regions along each side of a picture, half a region apart.
        regions: How many of them the expert may look at in the end.
        weight: Of the finished expert's ratio in `given`: above 1, as what a few marks tell is cautious.
        seed: Seeds copies and folds.
    """

    copies: int = 400
    noise_levels: tuple[float, float] = (0.02, 2.0)
    penalties: tuple[float, ...] = (1e-3, 1e-2, 1e-1)
    folds: int = 6
    sides: int = 7
    regions: int = 16
    weight: float = 3.0
    seed: int = 0


def teach(
    base: Expert,
    name: str,
    yes: Tensor,
    no: Tensor,
    lesson: Lesson | None = None,
    unmarked: Tensor | None = None,
) -> Expert:
    """An expert of what the pictures `yes` have and the pictures `no` have not.

    Its card says what share of the marks was told right while they were left out, as `heldout_accuracy`, and
    between which two it lies, with 95 %, as `heldout_low` and `heldout_high`.

    Args:
        base: The expert of p(x) of the family; noise-conditioned.
        name: What to call it: letters, digits and underscores.
        yes: Pictures that have it, states of the base, (n, *event).
        no: Pictures that have not, (m, *event).
        lesson: How it is taught.
        unmarked: States of which nothing is known, such as samples of the base, (k, *event). Where states are
            latents, a few hundred of them tell far more than marks alone; see `latents`.
    Raises:
        ValueError: If there are fewer than three of a kind, the pictures have another shape, or the base is a
            network that knows no covariance of its pictures.
    Example:
        >>> tired = teach(load_expert("faces/base"), "tired", yes, no)
        >>> mix = given(base, smile, tired)
    """
    lesson = lesson or Lesson()
    begun = time.perf_counter()
    for kind, states, least in (("yes", yes, LEAST), ("no", no, LEAST), ("unmarked", unmarked, 1)):
        if states is None:
            continue
        if len(states) < least:
            raise ValueError(f"`{kind}` must hold {least} pictures at least, got {len(states)}.")
        if tuple(states.shape[1:]) != base.card.event_shape:
            raise ValueError(
                f"`{kind}` must have shape (n, *{base.card.event_shape}), got {tuple(states.shape)}."
            )
    network = base.network
    if not base.noise_conditioned or len(base.card.values) != 1 or not isinstance(network, GaussianSkeleton):
        raise ValueError(
            f"{base} is no noise-conditioned base that knows the covariance of its pictures: there is "
            "nothing to teach beside it."
        )
    marks = torch.cat([yes, no]).to(network.mean)
    signs = torch.cat([torch.ones(len(yes)), -torch.ones(len(no))]).to(marks)
    stands_on = None
    taught: ConfinedEnergy | RegionClassifier
    if unmarked is not None and base.codec is not None and isinstance(network, ConfinedEnergy):
        taught, right = latents.learned(network, base.codec, marks, signs, unmarked.to(marks), lesson.seed)
    else:
        taught, right = regions.learned(network, base.card.event_shape, marks, signs, lesson)
        stands_on = base
    card = _card(base, name, len(yes), len(no), right, lesson)
    card = replace(card, base=str(base.card.weights.get("sha256", "")) if stands_on else card.base)
    card = replace(card, network={"type": type(taught).__name__, **taught.options})
    card = replace(card, training={**card.training, "seconds": round(time.perf_counter() - begun, 2)})
    return Expert.standing(taught.requires_grad_(False).eval(), card, base.codec, stands_on)


def _card(base: Expert, name: str, yes: int, no: int, right: Tensor, lesson: Lesson) -> Card:
    count, share = len(right), float(right.float().mean())
    low, high = wilson_interval(int(right.sum()), count)
    card = base.card
    return Card(
        family=card.family,
        name=name,
        attribute=name,
        values=VALUES,
        event_shape=card.event_shape,
        data_range=card.data_range,
        network={},
        sampler=card.sampler,
        temperature=1.0,
        noise_conditioned=True,
        weight=lesson.weight,
        data=f"{yes} pictures marked yes and {no} marked no",
        training={"taught": asdict(lesson), "beside": card.full_name},
        metrics={
            "heldout_accuracy": round(share, 4),
            "heldout_low": round(low, 4),
            "heldout_high": round(high, 4),
        },
        failures=f"Learned from {count} pictures: what else they have in common it may take for {name}.",
        licence=card.licence,
        codec=card.codec,
    )
