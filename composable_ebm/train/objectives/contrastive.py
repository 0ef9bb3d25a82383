"""Contrastive divergence, from data or from persistent chains.

Symbols: x⁺ data, x⁻ samples of the model, y their labels, f(x)[y] = E(x, y) the network's outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from composable_ebm.energy import Energy
from composable_ebm.energy.conditionals import Conditionals
from composable_ebm.sampling.chain import Chain
from composable_ebm.sampling.kernel import Noise
from composable_ebm.train.objectives.base import Figures, Objective, Phase, Setting
from composable_ebm.train.replay_buffer import ReplayBuffer

__all__ = ["ContrastiveDivergence", "Labelled"]


@dataclass(frozen=True)
class ContrastiveDivergence(Objective):
    """Contrastive divergence, from data (CD-k) or from persistent chains.

        L = mean E(x⁺, y⁺) - mean E(x⁻, y⁻) + α (mean E(x⁺, y⁺)² + mean E(x⁻, y⁻)²)
            + β mean[-log softmax_y(-E(x⁺, ·))]_{y⁺}

    The first two terms are the gradient of the log likelihood of p(x | y), with k steps of the
    sampler in place of an exact sample; α keeps energies near zero; β adds the log likelihood of
    p(y | x), so that the values of one expert are told apart on one scale.

    Args:
        cd_steps: k.
        persistent: Continues chains from a replay buffer; otherwise they start at x⁺.
        buffer_size: Chains in the buffer, on each process.
        reinit_prob: Probability that a drawn chain restarts from noise.
        energy_l2: α.
        classification: β, 0 for a purely generative expert.
        data_noise: Standard deviation of Gaussian noise on x⁺, in data units.
    Reference:
        Hinton (2002); Tieleman (2008); Du and Mordatch (2019), arXiv 1903.08689, algorithm 1;
        Grathwohl et al. (2020), arXiv 1912.03263, eq. 6, for the sum with β = 1.
    """

    cd_steps: int = 20
    persistent: bool = True
    buffer_size: int = 8192
    reinit_prob: float = 0.05
    energy_l2: float = 0.1
    classification: float = 0.1
    data_noise: float = 0.02

    def __post_init__(self) -> None:
        if self.cd_steps < 1 or self.buffer_size < 1:
            raise ValueError(
                f"`cd_steps` and `buffer_size` must be at least 1, got {self.cd_steps}, {self.buffer_size}."
            )
        if not 0 <= self.reinit_prob <= 1:
            raise ValueError(f"`reinit_prob` must be between 0 and 1, got {self.reinit_prob}.")
        for name in ("energy_l2", "classification", "data_noise"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must be at least 0, got {getattr(self, name)}.")

    def begin(self, setting: Setting) -> Phase:
        return _ContrastivePhase(self, setting)

    def contrast(
        self, model: nn.Module, positives: Tensor, y_pos: Tensor, negatives: Tensor, y_neg: Tensor
    ) -> tuple[Tensor, Figures]:
        """L and its parts, each a scalar on the device.

        Args:
            model: Called once, on positives and negatives together.
            positives: x⁺, (batch, *event), noise included.
            y_pos: Their labels, (batch,).
            negatives: x⁻, (batch, *event).
            y_neg: Their labels, (batch,).
        """
        outputs = model(torch.cat([positives, negatives])).float()
        all_pos, all_neg = outputs.split([len(positives), len(negatives)])
        e_pos = all_pos.gather(1, y_pos[:, None])[:, 0]
        e_neg = all_neg.gather(1, y_neg[:, None])[:, 0]
        positive, negative = e_pos.mean(), e_neg.mean()
        loss = positive - negative
        parts = {
            "energy_positive": positive.detach(),
            "energy_negative": negative.detach(),
            "energy_gap": -loss.detach(),
        }
        if self.energy_l2:
            loss = loss + self.energy_l2 * (e_pos.square().mean() + e_neg.square().mean())
        if self.classification and outputs.shape[1] > 1:
            cross_entropy = F.cross_entropy(-all_pos, y_pos)
            loss = loss + self.classification * cross_entropy
            parts["cross_entropy"] = cross_entropy.detach()
        return loss, {"loss": loss.detach(), **parts}


class Labelled(Energy):
    """E(x, yᵢ) for a batch in which every row i has its own label."""

    def __init__(self, network: nn.Module, labels: Tensor) -> None:
        super().__init__()
        self.network = network
        self.labels = labels
        self.binary = getattr(network, "binary", False)

    def energy(self, x: Tensor, noise_level: Tensor | None = None) -> Tensor:
        return self.read(self.network(x))

    def body(self) -> nn.Module:
        return self.network

    def read(self, outputs: Tensor) -> Tensor:
        return outputs.gather(1, self.labels[:, None])[:, 0]

    def conditionals(self) -> Conditionals | None:
        offer = getattr(self.network, "conditionals", None)
        return None if offer is None else offer(self.labels)


class _ContrastivePhase(Phase):
    """Draws x⁻ with the shared engine, and keeps the persistent chains between iterations."""

    def __init__(self, objective: ContrastiveDivergence, setting: Setting) -> None:
        self.objective = objective
        self.setting = setting
        self.buffer = ReplayBuffer(
            max(objective.buffer_size, setting.batch_size) if objective.persistent else 0,
            setting.event_shape,
            setting.num_values,
            setting.data_range or (-2.0, 2.0),  # latents have unit variance
            objective.reinit_prob,
            setting.generator,
            binary=setting.binary,
        )

    def loss(self, model: nn.Module, network: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Figures]:
        positives = x
        if self.objective.data_noise:
            noise = torch.randn(x.shape, generator=self.setting.generator, device=x.device)
            positives = x + self.objective.data_noise * noise
        negatives, y_neg, chains = self.draw(network, positives, y)
        loss, parts = self.objective.contrast(model, positives, y, negatives, y_neg)
        return loss, {**parts, **chains}

    def draw(self, network: nn.Module, positives: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Figures]:
        """x⁻ (batch, *event), their labels (batch,), and figures of their chains."""
        if self.objective.persistent:
            places, start, labels = self.buffer.draw(len(positives))
        else:
            places, start, labels = None, positives, y
        noise = Noise((self.setting.generator, len(start)))
        chain = Chain(Labelled(network, labels), start, self.setting.sampler, noise, record=False)
        negatives = chain.advance(self.objective.cd_steps)
        if places is not None:
            self.buffer.put(places, negatives, labels)
        divergence = chain.divergence()
        figures = {
            "chains_diverged": divergence.chains.float().mean(),
            "gradient_norm": divergence.largest_gradient.mean(),
        }
        return negatives, labels, figures

    def state_dict(self) -> dict[str, Tensor]:
        return self.buffer.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.buffer.load_state_dict(state)
