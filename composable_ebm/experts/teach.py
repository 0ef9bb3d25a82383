"""A new expert from a handful of marked pictures, in seconds.

What a family's base has learned about its pictures, at every noise level, is most of what a new attribute
needs. The new network is the base with one more head, and the head is all that is learned:

    E(x, σ)[y] = E_base(x, σ) + c(x, σ)[y],      c(x, σ) = ±½ (wᵀh(x, σ) + b)

    h      the last hidden layer of the base, at pictures that carry noise of level σ
    c      -log p(y | x, σ) up to a constant: a logistic regression over noisy, shifted copies of the marks

    w, b = argmin mean_i log(1 + exp(-s_i (wᵀh_i + b))) + λ ‖w‖²,      s_i = ±1

λ is the one with the least loss on marks left out in turn, all copies of a picture together; the share of
these that is told right says how sure the expert is. The problem is convex, so there is nothing to tune, and
the expert is noise-conditioned as the others of its family are: it composes with them.

Reference:
    Dhariwal and Nichol (2021), arXiv 2105.05233, section 4, for classifiers of noisy pictures as guides.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from composable_ebm.experts.card import Card
from composable_ebm.experts.expert import Expert
from composable_ebm.experts.networks import NETWORKS

VALUES = ("no", "yes")
LEAST = 3  # marks of each kind

__all__ = ["LEAST", "Lesson", "teach"]


@dataclass(frozen=True)
class Lesson:
    """How an expert is taught.

    Attributes:
        copies: Noisy copies of each mark.
        shift: Largest shift of a copy, in pixels; latents are never shifted.
        noise_levels: Smallest and largest noise of the copies, log-uniform, in data units.
        penalties: The λ to choose from.
        folds: Parts of the marks that are left out in turn.
        weight: Of the finished expert's ratio in `given`: above 1, as what a few marks tell is cautious.
        seed: Seeds copies and folds.
    """

    copies: int = 32
    shift: int = 1
    noise_levels: tuple[float, float] = (0.02, 2.0)
    penalties: tuple[float, ...] = (3e-4, 3e-3, 3e-2)
    folds: int = 4
    weight: float = 3.0
    seed: int = 0


def teach(base: Expert, name: str, yes: Tensor, no: Tensor, lesson: Lesson | None = None) -> Expert:
    """An expert of what the pictures `yes` have and the pictures `no` have not.

    Its card says what share of the marks was told right while they were left out, as `heldout_accuracy`, and
    between which two it lies, with 95 %, as `heldout_low` and `heldout_high`.

    Args:
        base: The expert of p(x) of the family; noise-conditioned.
        name: What to call it: letters, digits and underscores.
        yes: Pictures that have it, states of the base, (n, *event).
        no: Pictures that have not, (m, *event).
        lesson: How it is taught.
    Raises:
        ValueError: If there are fewer than three of a kind, the pictures have another shape, or the base is a
            network that cannot take another head.
    Example:
        >>> tired = teach(load_expert("faces/base"), "tired", yes, no)
        >>> mix = given(base, smile, tired)
    """
    lesson = lesson or Lesson()
    begun = time.perf_counter()
    for kind, marks in (("yes", yes), ("no", no)):
        if len(marks) < LEAST:
            raise ValueError(f"`{kind}` must hold {LEAST} pictures at least, got {len(marks)}.")
        if tuple(marks.shape[1:]) != base.card.event_shape:
            raise ValueError(
                f"`{kind}` must have shape (n, *{base.card.event_shape}), got {tuple(marks.shape)}."
            )
    network, head = _headed(base)
    device = head.weight.device
    marks = torch.cat([yes, no]).to(device, head.weight.dtype)
    signs = torch.cat([torch.ones(len(yes)), -torch.ones(len(no))]).to(marks)
    told, levels = _features(network, head, marks, lesson, shifted=base.codec is None)
    mean, spread = told.mean((0, 1)), told.std((0, 1)).clamp(min=1e-3 * float(told.std()))
    told = (told - mean) / spread / math.sqrt(told.shape[-1])

    best, logits = _chosen(told, signs, lesson)
    weights, bias = _fitted(told, signs, best)
    with torch.no_grad():  # c[no], c[yes] = ±½ of the logit, of which the mean and spread are part
        direction = weights / spread / math.sqrt(told.shape[-1])
        offset = bias - mean @ direction
        head.weight.copy_(torch.stack([direction, -direction]) / 2)
        head.bias.copy_(torch.stack([offset, -offset]) / 2)
    right = ((logits * (levels < 1)).sum(1) * signs > 0).float()
    card = _card(base, name, len(yes), len(no), right, lesson, time.perf_counter() - begun)
    expert = Expert.standing(network.requires_grad_(False).eval(), card)
    expert.in_space(base.codec)
    return expert


def _headed(base: Expert) -> tuple[nn.Module, nn.Linear]:
    """A copy of the base's network with a head for two values, and the head."""
    options = dict(base.card.network)
    kind = options.pop("type", "")
    if not base.noise_conditioned or kind not in NETWORKS or len(base.card.values) != 1:
        raise ValueError(f"{base} is no noise-conditioned base: there is nothing to teach beside it.")
    torch_state = torch.random.get_rng_state()
    torch.manual_seed(0)  # layers that the base has not are drawn the same each time
    network = NETWORKS[kind](**{**options, "num_values": len(VALUES)})
    torch.random.set_rng_state(torch_state)
    head = getattr(network, "value_head", None)
    if not isinstance(head, nn.Linear):
        raise ValueError(f"a {kind} takes no other head: experts cannot be taught beside {base}.")
    network.load_state_dict(base.network.state_dict(), strict=False)
    return network.to(next(base.network.parameters()).device).eval(), head


@torch.no_grad()
def _features(
    network: nn.Module, head: nn.Linear, marks: Tensor, lesson: Lesson, shifted: bool
) -> tuple[Tensor, Tensor]:
    """What the head is given of noisy copies, (marks, copies, features), and their levels."""
    generator = torch.Generator().manual_seed(lesson.seed)
    low, high = map(math.log, lesson.noise_levels)
    caught: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0].float()))
    levels = []
    try:
        for _ in range(lesson.copies):
            level = (low + (high - low) * torch.rand(len(marks), generator=generator)).exp().to(marks)
            x = marks
            if shifted and lesson.shift:
                by = torch.randint(-lesson.shift, lesson.shift + 1, (2,), generator=generator).tolist()
                x = _moved(x, by)
            noise = torch.randn(marks.shape, generator=generator).to(marks)
            network(x + level.reshape(-1, *[1] * (x.ndim - 1)) * noise, level)
            levels.append(level)
    finally:
        hook.remove()
    return torch.stack(caught, 1), torch.stack(levels, 1)


def _moved(x: Tensor, by: Sequence[int]) -> Tensor:
    """Images moved by a few pixels, their edges drawn out."""
    if x.ndim != 4:
        return x
    pad = max(abs(step) for step in by)
    padded = F.pad(x, [pad] * 4, mode="replicate")
    rows, columns = x.shape[-2:]
    return padded[..., pad + by[0] : pad + by[0] + rows, pad + by[1] : pad + by[1] + columns]


def _chosen(told: Tensor, signs: Tensor, lesson: Lesson) -> tuple[float, Tensor]:
    """The penalty with the least loss on what is left out, and its logits there, (marks, copies)."""
    order = torch.randperm(len(signs), generator=torch.Generator().manual_seed(lesson.seed))
    order = torch.cat(
        [order[signs.cpu()[order] > 0], order[signs.cpu()[order] < 0]]
    )  # both kinds in each part
    parts = [order[i :: lesson.folds].to(told.device) for i in range(lesson.folds)]
    losses, found = [], []
    for penalty in lesson.penalties:
        logits = torch.zeros(told.shape[:2], device=told.device)
        for part in parts:
            seen = torch.ones(len(signs), dtype=torch.bool, device=told.device)
            seen[part] = False
            weights, bias = _fitted(told[seen], signs[seen], penalty)
            logits[part] = told[part] @ weights + bias
        losses.append(float(F.softplus(-signs[:, None] * logits).mean()))
        found.append(logits)
    best = min(range(len(losses)), key=losses.__getitem__)
    return lesson.penalties[best], found[best]


def _fitted(told: Tensor, signs: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """The logistic regression: weights (features,) and bias ()."""
    told, signs = told.flatten(0, 1), signs[:, None].expand(told.shape[:2]).flatten()
    balance = torch.where(signs > 0, 0.5 / (signs > 0).float().mean(), 0.5 / (signs < 0).float().mean())
    weights = torch.zeros(told.shape[1] + 1, device=told.device, requires_grad=True)
    solver = torch.optim.LBFGS([weights], max_iter=60, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        logits = told @ weights[:-1] + weights[-1]
        value = (balance * F.softplus(-signs * logits)).mean() + penalty * weights[:-1].square().sum()
        value.backward()
        return value

    solver.step(loss)
    fitted = weights.detach()
    return fitted[:-1], fitted[-1]


def _card(base: Expert, name: str, yes: int, no: int, right: Tensor, lesson: Lesson, seconds: float) -> Card:
    count, share = len(right), float(right.mean())
    middle, half = _interval(share, count)
    card = base.card
    return Card(
        family=card.family,
        name=name,
        attribute=name,
        values=VALUES,
        event_shape=card.event_shape,
        data_range=card.data_range,
        network={**card.network, "num_values": len(VALUES)},
        sampler=card.sampler,
        temperature=1.0,
        noise_conditioned=True,
        weight=lesson.weight,
        data=f"{yes} pictures marked yes and {no} marked no",
        training={"taught": asdict(lesson), "beside": card.full_name, "seconds": round(seconds, 2)},
        metrics={
            "heldout_accuracy": round(share, 4),
            "heldout_low": round(max(0.0, middle - half), 4),
            "heldout_high": round(min(1.0, middle + half), 4),
        },
        failures=f"Learned from {count} pictures: what else they have in common it may take for {name}.",
        licence=card.licence,
        codec=card.codec,
    )


def _interval(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """Middle and half width of the 95 % interval of a share of `count` (Wilson 1927)."""
    scale = 1 + z**2 / count
    middle = (share + z**2 / (2 * count)) / scale
    return middle, z / scale * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
