"""Contrastive divergence of a noise-conditioned energy at temperature 1: chains walk down its levels.

    L    = mean w(σ)[E(x + σξ, y, σ) - E(x⁻, y⁻, σ)] + β mean[-log softmax_y(-E(x + σξ, ·, σ))]_y
           + γ mean ‖x̃ - σ² ∂E(x̃, y, σ)/∂x̃ - x‖²/m(σ),    x̃ = x + σξ
    w(σ) = min(1, 1/r(σ))

with r as in `GaussianSkeleton.strength`: low levels, where energies of pixels scatter by hundreds of nats,
would drown the others, and m the error of that skeleton. The third term holds energies where score matching
had them: alone, contrast of a larger network swings, since what chains have left is pushed up until they
come back. x⁻ are persistent chains. One that is drawn takes the step of the probability
flow to the next level, as a sampler does,

    x⁻ ← x⁻ + (σ' - σ) σ ∂E/∂x⁻,

and K steps of MALA there, which leave exp(-E(·, σ')) as it is: no bias of a step size enters L. From the last
level it begins again, with a draw of the network's Gaussian skeleton at the first; so do all before the first
iteration, and flow down to a level each. So what is contrasted with data is what a sampler makes of noise, at
each level on its way.

Best after a first stage of score matching (`init`). On digits of 16 pixels, 25 seconds of each, 95.3 % of
samples were right without the third term and 94.7 with it, where 50 seconds of score matching gave 93.2;
after 100 exact steps 93.9, 91.3 and 90.8 (three seeds of 400 samples, `benchmarks/contrast.py --seconds 50
--seeds 0 1 2`). What it makes of larger networks stands in `docs/objectives.md`.

Reference:
    Tieleman (2008) for persistent chains; Gao et al. (2021), arXiv 2012.08125, for energies over levels;
    Nijkamp et al. (2019), arXiv 1904.09770, for learning from the chains that sampling runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from composable_ebm.energy import Energy, slope
from composable_ebm.experts.networks.skeleton import GaussianSkeleton
from composable_ebm.sampling.chain import Chain
from composable_ebm.sampling.kernel import Noise, expand
from composable_ebm.sampling.mala import MALA
from composable_ebm.train.objectives.base import Figures, Objective, Phase, Setting

AT_ONCE = 256
"""Chains that walk down together before the first iteration, whatever the batch."""

__all__ = ["ContrastiveOverLevels"]


@dataclass(frozen=True)
class ContrastiveOverLevels(Objective):
    """Contrastive divergence over noise levels, with persistent chains that walk down them.

    Args:
        cd_steps: K, MALA steps at a level.
        num_levels: Levels between the ends of the network's range, even in σ^(1/`rho`).
        rho: The larger, the more of them are at low noise, which a range down to 0.02 needs.
        buffer_size: Chains, on each process.
        step_size: η of MALA in units of s²σ²/(s² + σ²), with s² the data's mean variance.
        classification: β, 0 for a purely generative expert.
        denoising: γ, 0 for contrast alone.
    """

    noise_conditioned: ClassVar[bool] = True

    cd_steps: int = 5
    num_levels: int = 24
    rho: float = 2.0
    buffer_size: int = 2048
    step_size: float = 0.15
    classification: float = 0.5
    denoising: float = 100.0

    def __post_init__(self) -> None:
        if min(self.cd_steps, self.buffer_size) < 1 or self.num_levels < 2:
            raise ValueError(
                "`cd_steps` and `buffer_size` must be at least 1 and `num_levels` at least 2, got "
                f"{self.cd_steps}, {self.buffer_size} and {self.num_levels}."
            )
        if min(self.step_size, self.rho) <= 0 or min(self.classification, self.denoising) < 0:
            raise ValueError(
                "`step_size` and `rho` must be positive, `classification` and `denoising` at least 0, got "
                f"{self.step_size}, {self.rho}, {self.classification} and {self.denoising}."
            )

    def begin(self, setting: Setting) -> Phase:
        return OverLevels(self, setting)


class AtLevels(Energy):
    """E(x, yᵢ, σᵢ) of a batch in which every row i has its own label and noise level."""

    def __init__(self, network: nn.Module, labels: Tensor, noise_level: Tensor) -> None:
        super().__init__()
        self.network = network
        self.labels = labels
        self.noise_level = noise_level

    def energy(self, x: Tensor, noise_level: Tensor | None = None) -> Tensor:
        return self.network(x, self.noise_level).gather(1, self.labels[:, None])[:, 0]


class OverLevels(Phase):
    """Keeps the chains, their labels, and how far down each is."""

    def __init__(self, objective: ContrastiveOverLevels, setting: Setting) -> None:
        self.objective = objective
        self.setting = setting
        self.generator = setting.generator
        self.device = setting.generator.device
        count = max(objective.buffer_size, setting.batch_size)
        self.place = self._any(objective.num_levels, count)
        self.chains = torch.empty(0, *setting.event_shape, device=self.device)
        self.labels = torch.empty(0, dtype=torch.long, device=self.device)

    def loss(self, model: nn.Module, network: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Figures]:
        if not isinstance(network, GaussianSkeleton):
            raise TypeError(
                "ContrastiveOverLevels needs a network over noise levels that is an energy, got a "
                f"{type(network).__name__}."
            )
        negatives, labels, sigma, figures = self.draw(network, y)
        positives = x + expand(sigma, x) * self._normal(x.shape)
        positives.requires_grad_(bool(self.objective.denoising))
        outputs = model(torch.cat([positives, negatives]), torch.cat([sigma, sigma])).float()
        of_data, of_chains = outputs.split(len(x))
        e_pos, e_neg = of_data.gather(1, y[:, None])[:, 0], of_chains.gather(1, labels[:, None])[:, 0]
        gap = (e_neg - e_pos).mean()
        loss = ((e_pos - e_neg) * (1 / network.strength(sigma)).clamp(max=1)).mean()
        figures = {"energy_gap": gap.detach(), **figures}
        if self.objective.denoising:
            denoised = positives - expand(sigma.square(), x) * slope(e_pos, positives, learn=True)
            error = ((denoised - x).square().flatten(1).mean(1) / network.denoiser_error(sigma)).mean()
            loss = loss + self.objective.denoising * error
            figures["denoising"] = error.detach()
        if self.objective.classification and outputs.shape[1] > 1:
            cross_entropy = F.cross_entropy(-of_data, y)
            loss = loss + self.objective.classification * cross_entropy
            figures["cross_entropy"] = cross_entropy.detach()
        return loss, {"loss": loss.detach(), **figures}

    def draw(self, network: GaussianSkeleton, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Figures]:
        """x⁻ (batch, *event), their labels and noise levels (batch,), and figures of their chains.

        Args:
            network: Whose chains they are.
            y: Labels of data, (batch,), which chains that begin again take.
        """
        low, high = network.noise_range
        power, count = 1 / self.objective.rho, self.objective.num_levels
        levels = torch.linspace(high**power, low**power, count, device=self.device) ** self.objective.rho
        if not len(self.chains):
            self._fill(network, levels, y)
        rows = torch.randperm(len(self.place), generator=self.generator, device=self.device)[: len(y)]
        x, before = self.chains[rows], self.place[rows]
        ended = before == len(levels) - 1
        now = torch.where(ended, 0, before + 1)
        labels, new = torch.where(ended, y, self.labels[rows]), levels[now]
        x = self._flowed(network, self.labels[rows], x, levels[before], new)
        x = torch.where(expand(ended, x), self._begun(network, new), x)
        moved = self._steps(network, labels, x, new)
        self.chains[rows], self.labels[rows], self.place[rows] = moved, labels, now
        stayed = (moved == x).flatten(1).all(1).float().mean()
        return moved, labels, new, {"chains_still": stayed}

    def _fill(self, network: GaussianSkeleton, levels: Tensor, y: Tensor) -> None:
        """Chains at all levels: each flows there from the first, and takes steps where it stays."""
        self.labels = y[self._any(len(y), len(self.place))]
        self.chains = self._begun(network, levels[:1].expand(len(self.place)))
        for i in range(1, len(levels)):
            for rows in (self.place >= i).nonzero()[:, 0].split(max(len(y), AT_ONCE)):
                old, new = (level.expand(len(rows)) for level in levels[i - 1 : i + 1])
                self.chains[rows] = self._flowed(network, self.labels[rows], self.chains[rows], old, new)
            if len(rows := (self.place == i).nonzero()[:, 0]):
                sigma = levels[i].expand(len(rows))
                self.chains[rows] = self._steps(network, self.labels[rows], self.chains[rows], sigma)

    def _flowed(
        self, network: GaussianSkeleton, labels: Tensor, x: Tensor, old: Tensor, new: Tensor
    ) -> Tensor:
        """A step of the probability flow from levels to others, (batch,) each."""
        with torch.enable_grad():
            at = x.detach().requires_grad_()
            gradient = slope(AtLevels(network, labels, old)(at), at)
        return x + expand((new - old) * old, x) * gradient.detach()

    def _steps(self, network: GaussianSkeleton, labels: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        variance = network.spread.square()
        eta = self.objective.step_size * sigma.square() * variance / (sigma.square() + variance)
        noise = Noise((self.generator, len(x)))
        chain = Chain(AtLevels(network, labels, sigma), x, MALA(1.0), noise, record=False)
        chain.dynamics = chain.dynamics._replace(step_size=eta)
        return chain.advance(self.objective.cd_steps).detach()

    def _begun(self, network: GaussianSkeleton, sigma: Tensor) -> Tensor:
        """Draws of the Gaussian skeleton, one at each noise level."""
        z = self._normal((len(sigma), *self.setting.event_shape))
        x = torch.empty_like(z)
        for level in sigma.unique():
            some = z[sigma == level]
            drawn = network.prior(some, float(level))
            x[sigma == level] = level * some if drawn is None else drawn  # a Gaussian of patches has no draws
        return x

    def _any(self, below: int, count: int) -> Tensor:
        return torch.randint(below, (count,), generator=self.generator, device=self.device)

    def _normal(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device)

    def state_dict(self) -> dict[str, Tensor]:
        return {"chains": self.chains, "labels": self.labels, "place": self.place}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.chains, self.labels, self.place = (
            state[name].to(self.device, copy=True) for name in ("chains", "labels", "place")
        )
