"""Denoising score matching: the score of data plus Gaussian noise, learned by denoising.

Symbols: x data, x̃ = x + σξ with ξ standard normal. The energy of x̃ has

    x̃ - σ² ∂E/∂x̃ = E[x | x̃],

the best guess of the clean image, so a network whose left side guesses best has the right gradient,
at temperature 1. No second derivative is needed, as in plain score matching.

Reference:
    Vincent (2011), A connection between score matching and denoising autoencoders, eq. 11.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from composable_ebm.data.dataset import UNLABELLED
from composable_ebm.energy import slope, soft_minimum
from composable_ebm.train.objectives.base import Figures, Objective, Phase, Setting

__all__ = ["DenoisingAtOneLevel", "DenoisingScoreMatching"]

LEVELS = (0.05, 0.15, 0.4, 1.0, 3.0)


@dataclass(frozen=True)
class DenoisingScoreMatching(Objective):
    """Denoising score matching over noise levels, of a noise-conditioned energy:

        L = mean_{x, σ, ξ} ‖x̃ - σ² ∂E(x̃, y, σ)/∂x̃ - x‖²/m(σ)  + β mean[-log softmax_y(-E(x̃, ·, σ))]_y

    The denoised image x̃ - σ² ∂E/∂x̃ is the posterior mean of x when E is the energy of noisy
    data at T = 1, so weights and log ratios of such experts are in nats. m(σ) is the error of the
    network's Gaussian skeleton: L = 1 is no better than principal components at every level.

    Args:
        classification: β, 0 for a purely generative expert.
        log_sigma_mean: Mean of log σ.
        log_sigma_std: Its standard deviation.
        uniform_share: Share of log-uniform σ over the network's whole range, so that no level starves.
    Reference:
        Song and Ermon (2019), arXiv 1907.05600, eq. 6; Karras et al. (2022), arXiv 2206.00364,
        section 5, for log-normal levels.
    """

    noise_conditioned: ClassVar[bool] = True

    classification: float = 0.1
    log_sigma_mean: float = -1.0
    log_sigma_std: float = 1.1
    uniform_share: float = 0.2

    def __post_init__(self) -> None:
        if self.classification < 0 or self.log_sigma_std <= 0 or not 0 <= self.uniform_share <= 1:
            raise ValueError(
                "`classification` must be at least 0, `log_sigma_std` positive and `uniform_share` between "
                f"0 and 1, got {self.classification}, {self.log_sigma_std} and {self.uniform_share}."
            )

    def begin(self, setting: Setting) -> Phase:
        return _DenoisingPhase(self, setting)


@dataclass(frozen=True)
class DenoisingAtOneLevel(Objective):
    """Denoising score matching at one noise level σ, of an energy that takes none:

        L = mean_{x, ξ} ‖x̃ - σ² ∂E(x̃, y)/∂x̃ - x‖²/σ²  per component
            + β mean[-log softmax_y(-E(x̃, ·))]_y

    What is learned is the energy of the data blurred by σ: take σ small against what matters in the
    data, but not so small that nothing is learned between its modes. L = 1 is no denoising at all.
    It is one double backward pass an iteration, so a cheap first stage for contrastive divergence.

    Args:
        noise_level: σ, in data units.
        classification: β, 0 for a purely generative expert.
    """

    noise_level: float = 0.1
    classification: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.noise_level < math.inf or self.classification < 0:
            raise ValueError(
                "`noise_level` must be positive and `classification` at least 0, got "
                f"{self.noise_level} and {self.classification}."
            )

    def begin(self, setting: Setting) -> Phase:
        return _OneLevelPhase(self, setting)


class _OneLevelPhase(Phase):
    def __init__(self, objective: DenoisingAtOneLevel, setting: Setting) -> None:
        self.objective = objective
        self.generator = setting.generator

    def loss(self, model: nn.Module, network: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Figures]:
        sigma = self.objective.noise_level
        xi = torch.randn(x.shape, generator=self.generator, device=x.device)
        noisy = (x + sigma * xi).requires_grad_()
        outputs = model(noisy)
        energy = outputs.gather(1, y[:, None])[:, 0]
        gradient = slope(energy, noisy, learn=True)
        loss = (xi - sigma * gradient).square().mean()
        figures = {"denoising": loss.detach(), "energy_positive": energy.detach().mean()}
        if self.objective.classification and outputs.shape[1] > 1:
            cross_entropy = F.cross_entropy(-outputs, y)
            loss = loss + self.objective.classification * cross_entropy
            figures["cross_entropy"] = cross_entropy.detach()
        return loss, {"loss": loss.detach(), **figures}


class _DenoisingPhase(Phase):
    def __init__(self, objective: DenoisingScoreMatching, setting: Setting) -> None:
        self.objective = objective
        self.generator = setting.generator
        self.levels = torch.tensor(LEVELS, device=setting.generator.device)

    def loss(self, model: nn.Module, network: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Figures]:
        sigma = self._levels(len(x), network.noise_range, x)  # type: ignore[arg-type]
        xi = torch.randn(x.shape, generator=self.generator, device=x.device)
        noisy = (x + sigma.reshape(-1, *[1] * (x.ndim - 1)) * xi).requires_grad_()
        outputs = model(noisy, sigma)
        energy = _energy_of(outputs, y)
        gradient = slope(energy, noisy, learn=True)
        denoised = noisy - sigma.square().reshape(-1, *[1] * (x.ndim - 1)) * gradient
        error = (denoised - x).square().flatten(1).mean(1) / network.denoiser_error(sigma)  # type: ignore[operator]
        loss = error.mean()
        figures = {"denoising": loss.detach()}
        with torch.no_grad():
            bucket = torch.bucketize(sigma, self.levels)
            for i in range(len(LEVELS) + 1):
                inside = (bucket == i).float()
                figures[f"denoising_{i}"] = torch.stack([(error * inside).sum(), inside.sum()])
        if self.objective.classification and outputs.shape[1] > 1:
            cross_entropy = _cross_entropy(outputs, y)
            loss = loss + self.objective.classification * cross_entropy
            figures["cross_entropy"] = cross_entropy.detach()
        return loss, {"loss": loss.detach(), **figures}

    def _levels(self, count: int, noise_range: tuple[float, float], like: Tensor) -> Tensor:
        """σ of a batch: log-normal, a share log-uniform, within the network's range."""
        low, high = map(math.log, noise_range)
        normal = self.objective.log_sigma_mean + self.objective.log_sigma_std * self._draw(
            torch.randn, count, like
        )
        uniform = low + (high - low) * self._draw(torch.rand, count, like)
        chosen = self._draw(torch.rand, count, like) < self.objective.uniform_share
        return torch.where(chosen, uniform, normal).clamp(low, high).exp()

    def _draw(self, draw: Callable[..., Tensor], count: int, like: Tensor) -> Tensor:
        return draw((count,), generator=self.generator, device=like.device)


def _energy_of(outputs: Tensor, y: Tensor) -> Tensor:
    """E(x, y) of each row, (batch,), and E(x) = -log Σ_y exp(-E(x, y)) of rows between the values."""
    known = outputs.gather(1, y.clamp(min=0)[:, None])[:, 0]
    return torch.where(y == UNLABELLED, soft_minimum(outputs), known)


def _cross_entropy(outputs: Tensor, y: Tensor) -> Tensor:
    """Mean of -log p(y | x); between the values of its mean over them, least where all are alike."""
    log_p = torch.log_softmax(-outputs, dim=1)
    known = log_p.gather(1, y.clamp(min=0)[:, None])[:, 0]
    return -torch.where(y == UNLABELLED, log_p.mean(1), known).mean()
