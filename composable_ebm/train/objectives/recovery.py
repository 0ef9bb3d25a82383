"""Diffusion recovery likelihood: contrastive learning where chains are short because targets are easy.

Data plus noise at levels σ₀ < σ₁ < ... < σ_L. A noisier copy x̃ = x + s ξ of x at level σₜ, with
s² = σₜ₊₁² - σₜ², leaves little to guess of x:

    p(x | x̃) ∝ exp(-E(x, σₜ) - ‖x̃ - x‖²/(2s²)),

which is close to a Gaussian where s is small, so a few Langevin steps from x̃ draw from it, without
persistent chains. Contrasting x with those draws is the gradient of the mean of log p(x | x̃), whose
maximum is the energy of the data at σₜ, at temperature 1.

Reference:
    Gao, Song, Poole, Wu and Kingma (2021), Learning energy-based models by diffusion recovery
    likelihood, arXiv 2012.08125, eq. 4 and 11 and algorithm 1, here in the variance-exploding form;
    Bengio et al. (2013), arXiv 1305.6663, for recovery from noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from composable_ebm.energy import Energy
from composable_ebm.sampling.chain import Chain
from composable_ebm.sampling.kernel import Noise
from composable_ebm.sampling.langevin import Langevin
from composable_ebm.train.objectives.base import Figures, Objective, Phase, Setting

__all__ = ["RecoveryLikelihood"]


@dataclass(frozen=True)
class RecoveryLikelihood(Objective):
    """Recovery likelihood of a noise-conditioned energy over all its noise levels:

        L = mean E(x⁺, y, σₜ) - mean E(x⁻, y, σₜ) + α mean (E(x⁺) - E(x⁻))²
            + β mean[-log softmax_y(-E(x⁺, ·, σₜ))]_y

    x⁻ is where `langevin_steps` of the shared engine end on E(x, y, σₜ) + ‖x̃ - x‖²/(2s²) from x̃, with
    step η and the coupled noise √(2η). The unit of η is s²σₜ²/(s² + σₜ²), the least variance that x can
    have given x̃ (all data in one point), so that no level is unstable below 2. Levels are spaced evenly
    in log σ over the network's range, and each row of a batch draws its own.

    Args:
        langevin_steps: K.
        step_size: η of those steps, in the units above.
        num_levels: L.
        energy_l2: α, against differences of energy that run away.
        classification: β, 0 for a purely generative expert.
    """

    noise_conditioned: ClassVar[bool] = True

    langevin_steps: int = 10
    step_size: float = 0.2
    num_levels: int = 20
    energy_l2: float = 0.0
    classification: float = 0.0

    def __post_init__(self) -> None:
        if self.langevin_steps < 1 or self.num_levels < 1:
            raise ValueError(
                "`langevin_steps` and `num_levels` must be at least 1, got "
                f"{self.langevin_steps} and {self.num_levels}."
            )
        if not 0 < self.step_size < 2:
            raise ValueError(f"`step_size` must be between 0 and 2, got {self.step_size}.")
        if self.energy_l2 < 0 or self.classification < 0:
            raise ValueError(
                f"`energy_l2` and `classification` must be at least 0, got {self.energy_l2} and "
                f"{self.classification}."
            )

    def begin(self, setting: Setting) -> Phase:
        return _RecoveryPhase(self, setting)


class Recovery(Energy):
    """E(x, yᵢ, σᵢ) + ‖x̃ᵢ - x‖²/(2sᵢ²): what is likely to be behind the noisier x̃ᵢ of row i."""

    def __init__(
        self, network: nn.Module, labels: Tensor, noise_level: Tensor, noisier: Tensor, spread: Tensor
    ) -> None:
        super().__init__()
        self.network = network
        self.labels = labels
        self.noise_level = noise_level
        self.noisier = noisier
        self.spread = spread

    def energy(self, x: Tensor, noise_level: Tensor | None = None) -> Tensor:
        own = self.network(x, self.noise_level).gather(1, self.labels[:, None])[:, 0]
        return own + (x - self.noisier).flatten(1).square().sum(1) / (2 * self.spread.square())


class _RecoveryPhase(Phase):
    def __init__(self, objective: RecoveryLikelihood, setting: Setting) -> None:
        self.objective = objective
        self.generator = setting.generator

    def loss(self, model: nn.Module, network: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Figures]:
        sigma, spread = self._levels(len(x), network.noise_range, x)  # type: ignore[arg-type]
        positives = x + _wide(sigma, x) * self._normal(x)
        noisier = positives + _wide(spread, x) * self._normal(x)
        negatives, chains = self.draw(network, y, sigma, noisier, spread)
        outputs = model(torch.cat([positives, negatives]), torch.cat([sigma, sigma])).float()
        all_pos, all_neg = outputs.split(len(x))
        e_pos, e_neg = (e.gather(1, y[:, None])[:, 0] for e in (all_pos, all_neg))
        gap = e_neg - e_pos
        loss = -gap.mean() + self.objective.energy_l2 * gap.square().mean()
        figures = {"energy_gap": gap.detach().mean(), **chains}
        if self.objective.classification and outputs.shape[1] > 1:
            cross_entropy = F.cross_entropy(-all_pos, y)
            loss = loss + self.objective.classification * cross_entropy
            figures["cross_entropy"] = cross_entropy.detach()
        return loss, {"loss": loss.detach(), **figures}

    def draw(
        self, network: nn.Module, y: Tensor, sigma: Tensor, noisier: Tensor, spread: Tensor
    ) -> tuple[Tensor, Figures]:
        """x⁻ (batch, *event) and figures of their chains."""
        energy = Recovery(network, y, sigma, noisier, spread)
        noise = Noise((self.generator, len(y)))
        chain = Chain(energy, noisier, Langevin(self.objective.step_size), noise, record=False)
        unit = 1 / (spread.square().reciprocal() + sigma.square().reciprocal())
        chain.dynamics = chain.dynamics._replace(step_size=self.objective.step_size * unit)
        negatives = chain.advance(self.objective.langevin_steps)
        divergence = chain.divergence()
        moved = (negatives - noisier).flatten(1).square().mean(1).sqrt() / spread
        return negatives, {"chains_diverged": divergence.chains.float().mean(), "moved": moved.mean()}

    def _levels(self, count: int, noise_range: tuple[float, float], like: Tensor) -> tuple[Tensor, Tensor]:
        """σₜ of each row of a batch, and s, both (batch,)."""
        low, high = map(math.log, noise_range)
        levels = torch.linspace(low, high, self.objective.num_levels + 1, device=like.device).exp()
        t = torch.randint(self.objective.num_levels, (count,), generator=self.generator, device=like.device)
        return levels[t], (levels[t + 1].square() - levels[t].square()).sqrt()

    def _normal(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self.generator, device=like.device)


def _wide(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (like.ndim - 1))
