"""What a diffusion network is shown, and what it answers, at noise level σ.

Chains carry x = clean + σξ, ξ standard normal, whatever a network was trained on. Three families of
networks differ in how they want to see it, at which time, and in what they say:

    family                shown               time                     answers
    variance preserving   x/√(1+σ²) = √ᾱ x    t with σ = √((1-ᾱ)/ᾱ)    ξ, clean, or v = √ᾱ ξ - √(1-ᾱ) clean
    flow matching         x/(1+σ) = (1-t) x   t = σ/(1+σ)              v = ξ - clean
    preconditioned        x/√(σ²+s²)          ¼ log σ                  F, clean = c_skip x + c_out F

so each is a change of variables, and the denoiser D(x, σ), the best guess of the clean data, is what all
have in common. Schedules that end in pure noise have no finite σ there: it is taken as `PURE_NOISE`, above
which nothing of the data is left in 32 bits.

Reference:
    Karras et al. (2022), arXiv 2206.00364, table 1; Salimans and Ho (2022), arXiv 2202.00512, for v;
    Lipman et al. (2023), arXiv 2210.02747, and Esser et al. (2024), arXiv 2403.03206, for flows;
    Lin et al. (2024), arXiv 2305.08891, for schedules that end in pure noise.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor, nn

PREDICTIONS = ("epsilon", "sample", "v_prediction")

PURE_NOISE = 4096.0
"""σ that stands for no data at all, ᾱ = 2⁻²⁴, as in `diffusers`."""

__all__ = ["PREDICTIONS", "PURE_NOISE", "Flow", "Parametrisation", "Preconditioned", "VariancePreserving"]


class Parametrisation(nn.Module, ABC):
    """One row of the table.

    Attributes:
        noise_range: Smallest and largest σ that it has a time for.
    """

    noise_range: tuple[float, float]

    @abstractmethod
    def time(self, sigma: Tensor) -> Tensor:
        """What the network is told of noise levels (batch,), (batch,)."""

    @abstractmethod
    def shown(self, x: Tensor, sigma: Tensor) -> Tensor:
        """What the network is shown of states (batch, *event) at noise levels (batch,)."""

    @abstractmethod
    def denoised(self, x: Tensor, sigma: Tensor, answer: Tensor) -> Tensor:
        """D(x, σ), (batch, *event), from what the network answers."""


class VariancePreserving(Parametrisation):
    """Networks that are shown √ᾱ clean + √(1-ᾱ) ξ at step t of a schedule.

    Args:
        alphas_cumprod: ᾱ at t = 0, 1, ..., falling, below 1; the last may be 0, pure noise.
        predicts: "epsilon", the noise; "sample", the clean data; or "v_prediction".
        log_linear: Whether log σ is linear in t between two steps; σ itself is unless so.
    Raises:
        ValueError: If the ᾱ do not fall, or there is no such prediction.
    """

    def __init__(
        self, alphas_cumprod: Tensor | Sequence[float], predicts: str = "epsilon", log_linear: bool = True
    ) -> None:
        super().__init__()
        alphas = torch.as_tensor(alphas_cumprod, dtype=torch.float32).detach().cpu()
        falling = len(alphas) > 1 and bool((alphas.diff() < 0).all())
        if not falling or not 0 <= float(alphas[-1]) < float(alphas[0]) < 1:
            coarse = getattr(alphas_cumprod, "dtype", None) in (torch.float16, torch.bfloat16)
            raise ValueError(
                "`alphas_cumprod` must fall with time and lie between 0 and 1"
                + (", which it does not in 16 bits: give it in float32." if coarse else ".")
            )
        if predicts not in PREDICTIONS:
            raise ValueError(f"`predicts` must be one of {', '.join(PREDICTIONS)}, got {predicts!r}.")
        self.predicts = predicts
        self.log_linear = log_linear
        self._table = ((1 - alphas) / alphas).sqrt().clamp(max=PURE_NOISE)
        self.sigmas: Tensor
        self.register_buffer("sigmas", self._table.clone())  # rising
        self.noise_range = (float(self._table[0]), float(self._table[-1]))

    def _apply(self, fn: Callable, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.sigmas = self._table.to(self.sigmas.device)  # moved with the network, but not made coarse
        return self

    def time(self, sigma: Tensor) -> Tensor:
        table, at = self.sigmas, sigma.to(self.sigmas)
        above = torch.searchsorted(table, at.contiguous()).clamp(1, len(table) - 1)
        low, high = table[above - 1], table[above]
        if self.log_linear:
            low, high, at = low.log(), high.log(), at.log()
        return (above - 1 + (at - low) / (high - low)).clamp(0, len(table) - 1)

    def sigma(self, time: Tensor) -> Tensor:
        """σ at steps (n,) of the schedule that need not be whole, (n,): the inverse of `time`."""
        table, at = self._table, time.float().cpu()
        below = at.floor().long().clamp(0, len(table) - 2)
        low, high = table[below], table[below + 1]
        if self.log_linear:
            return torch.lerp(low.log(), high.log(), at - below).exp()
        return torch.lerp(low, high, at - below)

    def shown(self, x: Tensor, sigma: Tensor) -> Tensor:
        return x * (1 + _broadcast(sigma, x).square()).rsqrt()

    def denoised(self, x: Tensor, sigma: Tensor, answer: Tensor) -> Tensor:
        if self.predicts == "sample":
            return answer
        s = _broadcast(sigma, x)
        if self.predicts == "epsilon":
            return x - s * answer
        root = (1 + s.square()).rsqrt()  # √ᾱ
        return root.square() * x - s * root * answer


class Flow(Parametrisation):
    """Networks that are shown (1-t) clean + t ξ and answer the velocity ξ - clean.

    Args:
        scale: What the network calls t = 1.
        low: Smallest σ.
    """

    def __init__(self, scale: float = 1000.0, low: float = 1e-3) -> None:
        super().__init__()
        self.scale = scale
        self.noise_range = (low, PURE_NOISE)

    @staticmethod
    def _t(sigma: Tensor) -> Tensor:
        return torch.where(sigma >= PURE_NOISE, torch.ones_like(sigma), sigma / (1 + sigma))

    def time(self, sigma: Tensor) -> Tensor:
        return self._t(sigma) * self.scale

    def shown(self, x: Tensor, sigma: Tensor) -> Tensor:
        return x * _broadcast(self._t(sigma) / sigma, x)

    def denoised(self, x: Tensor, sigma: Tensor, answer: Tensor) -> Tensor:
        return self.shown(x, sigma) - _broadcast(self._t(sigma), x) * answer


class Preconditioned(Parametrisation):
    """Networks F of Karras et al.: D = c_skip x + c_out F(c_in x, ¼ log σ).

    Args:
        noise_range: Smallest and largest σ.
        sigma_data: Standard deviation s of the data.
        sign: 1, or -1 for networks that answer a velocity.
    """

    def __init__(
        self, noise_range: Sequence[float] = (0.002, 80.0), sigma_data: float = 0.5, sign: float = 1.0
    ) -> None:
        super().__init__()
        low, high = map(float, noise_range)
        self.noise_range = (low, high)
        self.sigma_data = float(sigma_data)
        self.sign = sign

    def time(self, sigma: Tensor) -> Tensor:
        return sigma.log() / 4

    def shown(self, x: Tensor, sigma: Tensor) -> Tensor:
        return x * (_broadcast(sigma, x).square() + self.sigma_data**2).rsqrt()

    def denoised(self, x: Tensor, sigma: Tensor, answer: Tensor) -> Tensor:
        s, own = _broadcast(sigma, x), self.sigma_data
        total = s.square() + own**2
        return own**2 / total * x + self.sign * s * own * total.rsqrt() * answer


def _broadcast(value: Tensor, x: Tensor) -> Tensor:
    return value.reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype)
