"""Score matching: the gradient of an energy learned from data, without chains and without noise.

The Fisher divergence between data p and model exp(-E)/Z,

    F = ½ mean_p ‖∇E + ∇ log p‖²,

does not know Z, and integration by parts removes the unknown ∇ log p but for a constant:

    J = mean_p [½ ‖∇E‖² - tr ∇²E],      F = J + const.

The trace is what costs: exactly, one backward pass for each component of x; or as the mean of
vᵀ(∇²E)v over random directions v of mean square 1, one backward pass each.

Densities must have a gradient: where data are discrete, as bytes are, or lie on a surface, J has no
lower bound, and a little noise (`data_noise`) gives it one.

Reference:
    Hyvärinen (2005), Estimation of non-normalized statistical models by score matching, theorem 1.
    Hutchinson (1989), A stochastic estimator of the trace of the influence matrix.
    Song, Garg, Shi and Ermon (2019), Sliced score matching, arXiv 1905.07088, eq. 7 and 8.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from composable_ebm.energy import slope
from composable_ebm.train.objectives.base import Figures, Objective, Phase, Setting

LARGEST_EXACT = 256

__all__ = ["ScoreMatching", "SlicedScoreMatching"]


@dataclass(frozen=True)
class _WithoutNoise(Objective):
    """What exact, estimated and sliced score matching share: the data, the labels, the directions.

    Args:
        data_noise: Standard deviation of Gaussian noise on x, in data units.
        classification: β of an added β mean[-log softmax_y(-E(x, ·))]_y.
    """

    data_noise: float = 0.0
    classification: float = 0.0

    def __post_init__(self) -> None:
        if self.data_noise < 0 or self.classification < 0:
            raise ValueError(
                f"`data_noise` and `classification` must be at least 0, got {self.data_noise} and "
                f"{self.classification}."
            )

    def begin(self, setting: Setting) -> Phase:
        return _Phase(self, setting)

    @abstractmethod
    def divergence(self, x: Tensor, gradient: Tensor, generator: torch.Generator) -> Tensor:
        """J of each row, (batch,), whose mean is the Fisher divergence up to a constant.

        Args:
            x: States that require a gradient, (batch, *event).
            gradient: ∇E at `x`, with its graph.
            generator: Draws directions.
        """


@dataclass(frozen=True)
class ScoreMatching(_WithoutNoise):
    """J = mean [½ ‖∇E‖² - tr ∇²E], with the trace exact or estimated.

    Args:
        trace: "exact", a backward pass for each component of x, for small dimension; or
            "hutchinson", mean vᵀ(∇²E)v over `num_probes` directions of random signs, the estimator of
            least variance that needs nothing of ∇²E.
        num_probes: Directions of each state.
        data_noise: Standard deviation of Gaussian noise on x, in data units.
        classification: β of an added β mean[-log softmax_y(-E(x, ·))]_y.
    Raises:
        ValueError: If there is no such trace, or (in training) the dimension is too large for "exact".
    """

    trace: str = "hutchinson"
    num_probes: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.trace not in ("exact", "hutchinson"):
            raise ValueError(f'`trace` must be "exact" or "hutchinson", got {self.trace!r}.')
        if self.num_probes < 1:
            raise ValueError(f"`num_probes` must be at least 1, got {self.num_probes}.")

    def divergence(self, x: Tensor, gradient: Tensor, generator: torch.Generator) -> Tensor:
        half_square = gradient.flatten(1).square().sum(1) / 2
        if self.trace == "exact":
            return half_square - _exact_trace(x, gradient)
        traces = [_curvature(x, gradient, _signs(x, generator)) for _ in range(self.num_probes)]
        return half_square - torch.stack(traces).mean(0)


@dataclass(frozen=True)
class SlicedScoreMatching(_WithoutNoise):
    """Score matching along random directions v, standard normal:

        J = mean_{x, v} [½ (vᵀ∇E)² - vᵀ(∇²E)v],

    the same divergence seen in one dimension at a time. With variance reduction the mean over v of the
    first term is taken in closed form, ½ ‖∇E‖², and what is left is Hutchinson's estimate.

    Args:
        num_slices: Directions of each state.
        variance_reduction: Whether the first term is ½ ‖∇E‖².
        data_noise: Standard deviation of Gaussian noise on x, in data units.
        classification: β of an added β mean[-log softmax_y(-E(x, ·))]_y.
    """

    num_slices: int = 1
    variance_reduction: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_slices < 1:
            raise ValueError(f"`num_slices` must be at least 1, got {self.num_slices}.")

    def divergence(self, x: Tensor, gradient: Tensor, generator: torch.Generator) -> Tensor:
        rows = []
        for _ in range(self.num_slices):
            v = torch.randn(x.shape, generator=generator, device=x.device)
            along = gradient if self.variance_reduction else (gradient * v).flatten(1).sum(1, keepdim=True)
            curvature = _curvature(x, gradient, v)
            rows.append(along.flatten(1).square().sum(1) / 2 - curvature)
        return torch.stack(rows).mean(0)


def _exact_trace(x: Tensor, gradient: Tensor) -> Tensor:
    """tr ∇²E of each row, (batch,)."""
    dimension = x[0].numel()
    if dimension > LARGEST_EXACT:
        raise ValueError(
            f"an exact trace takes a backward pass for each of {dimension} components: use "
            'ScoreMatching(trace="hutchinson") or SlicedScoreMatching, which take one.'
        )
    trace = x.new_zeros(len(x))
    for i in range(dimension):
        row = slope(gradient.flatten(1)[:, i], x, learn=True)
        trace = trace + row.flatten(1)[:, i]
    return trace


def _curvature(x: Tensor, gradient: Tensor, v: Tensor) -> Tensor:
    """vᵀ(∇²E)v of each row, (batch,)."""
    row = slope(gradient * v, x, learn=True)
    return (row * v).flatten(1).sum(1)


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    bits = torch.randint(2, like.shape, generator=generator, device=like.device)
    return (2 * bits - 1).to(like.dtype)


class _Phase(Phase):
    def __init__(self, objective: _WithoutNoise, setting: Setting) -> None:
        self.objective = objective
        self.generator = setting.generator

    def loss(self, model: nn.Module, network: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Figures]:
        if self.objective.data_noise:
            noise = torch.randn(x.shape, generator=self.generator, device=x.device)
            x = x + self.objective.data_noise * noise
        x = x.detach().requires_grad_()
        outputs = model(x)
        energy = outputs.gather(1, y[:, None])[:, 0]
        gradient = slope(energy, x, learn=True)
        loss = self.objective.divergence(x, gradient, self.generator).mean()
        figures = {
            "fisher": loss.detach(),
            "gradient_norm": gradient.detach().flatten(1).norm(dim=1).mean(),
            "energy_positive": energy.detach().mean(),
        }
        if self.objective.classification and outputs.shape[1] > 1:
            cross_entropy = F.cross_entropy(-outputs, y)
            loss = loss + self.objective.classification * cross_entropy
            figures["cross_entropy"] = cross_entropy.detach()
        return loss, {"loss": loss.detach(), **figures}
