"""Taught on pictures: which of their regions tell marks apart, by what the base knows of its covariance.

With two dozen pictures and thousands of pixels, what matters is to look at little. The base of a family knows
the mean and the covariance of its pictures, and with them the directions in which each region of a picture
varies, at every noise level. Each region tries by itself, and those that tell marks apart which they have not
seen are added up:

    l_r = argmin mean_i log(1 + exp(-s_i l_r(x_i))) + λ ‖w‖²,       s_i = ±1
    l   = c Σ_r a_r l_r,         a = softmax(-2 n · loss of r on marks left out)

The mean is over noisy copies of the marks, so that the expert is noise-conditioned as the others of its
family are; see `networks.regions` for what l_r may be. Each problem is convex and solved by Newton's method,
all regions at once: there is nothing to tune. λ, a and the scale c come from marks left out in turn, all
copies of a picture together. How sure the expert is, is told by marks that had no part in any of these.

Reference:
    Dhariwal and Nichol (2021), arXiv 2105.05233, section 4, for classifiers of noisy pictures as guides.
    Wolpert (1992), Stacked generalization, for predictors weighed by what they say of data left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from composable_ebm.experts.networks import RegionClassifier
from composable_ebm.experts.networks.skeleton import GaussianSkeleton
from composable_ebm.experts.teach.copies import noisy_copies

if TYPE_CHECKING:
    from composable_ebm.experts.teach.lesson import Lesson

CLEAN = 0.5  # noise level in data units below which a copy is told about as well as its picture

__all__ = ["learned"]


def learned(
    base: GaussianSkeleton, event_shape: Sequence[int], marks: Tensor, signs: Tensor, lesson: Lesson
) -> tuple[RegionClassifier, Tensor]:
    """The network of a few regions, and which marks were told right while they were left out.

    Args:
        base: Of the family.
        event_shape: Of its states.
        marks: States, (n, *event).
        signs: 1 for those that have it, -1 for the others, (n,).
        lesson: How it is taught.
    """
    candidates = _candidates(base, event_shape, lesson)
    marks = marks.to(candidates.mean)
    seen, levels = _features(candidates, marks, lesson)
    found = _stacked(seen, signs, lesson)
    best = found.shares.topk(min(lesson.regions, len(found.shares))).indices
    network = RegionClassifier(**{**candidates.options, "regions": len(best)}).to(marks)  # type: ignore[arg-type]
    with torch.no_grad():
        network.mean.copy_(candidates.mean)
        network.spread.copy_(candidates.spread[best])
        looks = candidates.look.weight.view(*candidates.sides, -1)
        network.look.weight.copy_(looks[best].flatten(0, 1))
        shares = found.shares[best] / found.shares[best].sum()
        weights = found.weights[best] * shares[:, None]
        network.weight.copy_(torch.stack([-weights, weights]) / 2)
    clean = (levels < CLEAN).to(marks)  # of what is asked about later, pictures
    return network, ((found.left_out * clean).sum(1) * signs) > 0


def _candidates(network: GaussianSkeleton, event_shape: Sequence[int], lesson: Lesson) -> RegionClassifier:
    """All regions that there are, and what pictures do in them by the base's own covariance."""
    size = math.prod(event_shape)
    places = torch.arange(size).view(tuple(event_shape))
    device = network.mean.device
    if len(network.mean) == size:
        regions = _windows(places, lesson.sides)
        mean, axes = network.mean.cpu(), network.axes.cpu().double()
    else:  # one Gaussian, shared by patches
        regions = list(network.patches(places[None].float())[0].long())  # type: ignore[operator]
        mean, axes = torch.zeros(size), network.axes.cpu().double()
        mean[torch.stack(regions)] = network.mean.cpu()
    variances, residual = network.variances.cpu().double(), float(network.residual)
    components = min(12, min(map(len, regions)))
    looks, spreads = [], []
    for region in regions:
        own = axes if len(network.mean) < size else axes[:, region]
        covariance = own.T @ ((variances - residual)[:, None] * own)
        covariance.diagonal().add_(residual)
        values, directions = torch.linalg.eigh(covariance)
        look = torch.zeros(components, size, dtype=torch.float64)
        look[:, region] = directions[:, -components:].flip(1).T
        looks.append(look)
        spreads.append(values[-components:].flip(0).clamp(min=1e-8).sqrt())
    made = RegionClassifier(
        event_shape,
        regions=len(regions),
        components=components,
        squares=min(6, components),
        noise_range=network.noise_range,
    )
    with torch.no_grad():
        made.mean.copy_(mean)
        made.spread.copy_(torch.stack(spreads))
        made.look.weight.copy_(torch.cat(looks))
    return made.to(device)


def _windows(places: Tensor, sides: int) -> list[Tensor]:
    """Which numbers of a state stand in each of `sides` x `sides` windows, half a window apart."""
    if places.ndim != 3:
        return [places.flatten()]
    cuts = []
    for length in places.shape[1:]:
        count = max(1, min(sides, length - 1))
        width = max(2, round(2 * length / (count + 1)))
        cuts.append([(round(i * (length - width) / max(1, count - 1)), width) for i in range(count)])
    return [
        places[:, top : top + height, left : left + width].flatten()
        for top, height in cuts[0]
        for left, width in cuts[1]
    ]


@torch.no_grad()
def _features(candidates: RegionClassifier, marks: Tensor, lesson: Lesson) -> tuple[Tensor, Tensor]:
    """What each region shows of noisy copies, (regions, marks, copies, features), and the copies' levels."""
    copies = min(max(lesson.copies // len(marks), 6), 24)
    shown, levels = [], []
    for noisy, level in noisy_copies(marks, lesson.noise_levels, copies, lesson.seed):
        shown.append(candidates.features(noisy, level))
        levels.append(level)
    return torch.stack(shown, 1).permute(2, 0, 1, 3).contiguous(), torch.stack(levels, 1)


class _Found(NamedTuple):
    """What the regions learned.

    Attributes:
        weights: Of each region's own discriminant, the scale in it, (regions, features).
        shares: Of each region in the whole, (regions,).
        left_out: Logits of the whole at marks that had no part in them, (marks, copies).
    """

    weights: Tensor
    shares: Tensor
    left_out: Tensor


@torch.no_grad()
def _stacked(seen: Tensor, signs: Tensor, lesson: Lesson) -> _Found:
    """Regions that learn each by itself, weighed by what they say of marks left out."""
    regions, marks, copies, _ = seen.shape
    parts = _parts(signs, lesson)
    losses, logits, weights = [], [], []
    for penalty in lesson.penalties:
        said = seen.new_zeros(regions, marks, copies)
        for part in parts:
            rest = torch.ones(marks, dtype=torch.bool, device=seen.device)
            rest[part] = False
            learned = _fitted(seen[:, rest], signs[rest], penalty)
            said[:, part] = torch.einsum("rmcf,rf->rmc", seen[:, part], learned)
        losses.append(F.softplus(-signs[:, None] * said).mean(2))  # (regions, marks)
        logits.append(said)
        weights.append(_fitted(seen, signs, penalty))
    best = torch.stack(losses).mean(2).argmin(0)
    each = torch.arange(regions, device=seen.device)
    loss, said = torch.stack(losses)[best, each], torch.stack(logits)[best, each]
    left_out = said.new_zeros(marks, copies)
    for part in parts:  # weighed by the others alone
        others = loss.sum(1) - loss[:, part].sum(1)
        shares = (-others * marks / (marks - len(part)) * SHARPNESS).softmax(0)
        left_out[part] = torch.einsum("r,rmc->mc", shares, said[:, part])
    scales = torch.tensor(SCALES).to(seen)
    costs = [float(F.softplus(-signs[:, None] * scale * left_out).mean()) for scale in scales]
    scale = scales[min(range(len(costs)), key=costs.__getitem__)]
    shares = (-loss.sum(1) * SHARPNESS).softmax(0)
    return _Found(torch.stack(weights)[best, each] * scale, shares, left_out)


SHARPNESS = 2.0  # of the choice of regions: twice the evidence that marks left out give
SCALES = (0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0)


def _parts(signs: Tensor, lesson: Lesson) -> list[Tensor]:
    """Which marks are left out together, both kinds in each part."""
    kept = signs.cpu()
    order = torch.randperm(len(kept), generator=torch.Generator().manual_seed(lesson.seed))
    order = torch.cat([order[kept[order] > 0], order[kept[order] < 0]]).to(signs.device)
    folds = min(lesson.folds, len(kept) // 2)
    return [order[i::folds] for i in range(folds)]


def _fitted(seen: Tensor, signs: Tensor, penalty: float, steps: int = 8) -> Tensor:
    """Logistic regressions by Newton's method, one a region: weights (regions, features)."""
    regions, _, copies, features = seen.shape
    x, signs = seen.flatten(1, 2), signs.repeat_interleave(copies)
    share = (signs > 0).float().mean()
    balance = torch.where(signs > 0, 0.5 / share, 0.5 / (1 - share)) / len(signs)
    ridge = 2 * penalty * torch.eye(features, device=x.device)
    ridge[-1, -1] = 1e-4  # the offset is free
    weights = x.new_zeros(regions, features)
    for _ in range(steps):
        wrong = torch.sigmoid(-signs * torch.einsum("rnf,rf->rn", x, weights))
        gradient = weights @ ridge - torch.einsum("rn,rnf->rf", balance * signs * wrong, x)
        curvature = (x * (balance * wrong * (1 - wrong))[..., None]).mT @ x + ridge
        weights = weights - torch.linalg.solve(curvature, gradient[..., None])[..., 0]
    return weights
