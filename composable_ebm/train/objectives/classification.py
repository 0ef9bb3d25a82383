"""Classification of noisy states, by maximum likelihood over noise levels.

    L = mean_{x, y, σ, ξ} -log p(y | x + σξ, σ)

The least loss is that of the true posterior, so that a classifier at its best is what Bayes' rule multiplies
a density by: at high noise it knows that it cannot know.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from composable_ebm.train.objectives.base import Figures, Objective, Phase, Setting

__all__ = ["NoisyClassification"]


@dataclass(frozen=True)
class NoisyClassification(Objective):
    """Maximum likelihood of labels of noisy states.

    Args:
        log_sigma_mean: Mean of log σ.
        log_sigma_std: Its standard deviation.
        uniform_share: Share of log-uniform σ over the network's whole range, so that no level starves.
    """

    noise_conditioned: ClassVar[bool] = True

    log_sigma_mean: float = -0.6
    log_sigma_std: float = 1.0
    uniform_share: float = 0.3

    def __post_init__(self) -> None:
        if self.log_sigma_std <= 0 or not 0 <= self.uniform_share <= 1:
            raise ValueError(
                "`log_sigma_std` must be positive and `uniform_share` between 0 and 1, got "
                f"{self.log_sigma_std} and {self.uniform_share}."
            )

    def begin(self, setting: Setting) -> Phase:
        return _ClassificationPhase(self, setting)


class _ClassificationPhase(Phase):
    def __init__(self, objective: NoisyClassification, setting: Setting) -> None:
        self.objective = objective
        self.generator = setting.generator

    def loss(self, model: nn.Module, network: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Figures]:
        low, high = map(math.log, network.noise_range)  # type: ignore[arg-type]
        draw: Any = {"generator": self.generator, "device": x.device}
        objective = self.objective
        normal = objective.log_sigma_mean + objective.log_sigma_std * torch.randn(len(x), **draw)
        uniform = low + (high - low) * torch.rand(len(x), **draw)
        chosen = torch.rand(len(x), **draw) < objective.uniform_share
        sigma = torch.where(chosen, uniform, normal).clamp(low, high).exp()
        noise = torch.randn(x.shape, **draw)
        outputs = model(x + sigma.reshape(-1, *[1] * (x.ndim - 1)) * noise, sigma)
        loss = outputs.gather(1, y[:, None]).mean()
        right = (outputs.argmin(1) == y).float().mean()
        return loss, {"loss": loss.detach(), "accuracy": right}
