"""Energies with known answers: normalised, exactly sampled, and diffused in closed form.

Each is noise-conditioned: at noise level σ its energy is that of p * N(0, σ² I), the density of a
draw plus Gaussian noise. They are what samplers and the algebra are checked against.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from composable_ebm.energy import Energy

Values = Tensor | Sequence | float

__all__ = ["Analytic", "Box", "DoubleWell", "Gaussian", "GaussianMixture", "Rings"]

_RANGE_DRAWS = 20_000


class Analytic(Energy):
    """An energy over vectors whose samples can be drawn exactly."""

    noise_conditioned = True

    @abstractmethod
    def draw(self, num: int, generator: torch.Generator | None = None) -> Tensor:
        """Exact samples, shape (num, dimension)."""

    @cached_property
    def energy_range(self) -> tuple[float, float]:  # type: ignore[override]
        """Energies between which 99.8 % of exact samples lie."""
        device = next(self.buffers()).device
        x = self.draw(_RANGE_DRAWS, torch.Generator(device).manual_seed(0))
        ends = torch.quantile(self.energy(x), x.new_tensor([0.001, 0.999]))
        return float(ends[0]), float(ends[1])


class GaussianMixture(Analytic):
    """Σₖ wₖ N(μₖ, Cₖ): E(x) = -log Σₖ wₖ N(x; μₖ, Cₖ + σ² I).

    Args:
        means: μₖ, shape (components, dimension).
        covariance: C, shared or one a component: a variance, variances (dimension,), a matrix
            (dimension, dimension), or (components, dimension, dimension).
        weights: wₖ, positive, normalised here; equal unless given.
    Raises:
        ValueError: If shapes do not fit or a covariance is not positive definite.
    """

    def __init__(self, means: Values, covariance: Values = 1.0, weights: Values | None = None) -> None:
        super().__init__()
        means = torch.as_tensor(means, dtype=torch.float32)
        if means.ndim != 2:
            raise ValueError(f"`means` must have shape (components, dimension), got {tuple(means.shape)}.")
        count, dimension = means.shape
        matrix = _matrix(torch.as_tensor(covariance, dtype=torch.float32), dimension)
        variances, axes = torch.linalg.eigh(matrix.expand(count, dimension, dimension))
        if not (variances > 0).all():
            raise ValueError("`covariance` must be positive definite.")
        w = torch.ones(count) if weights is None else torch.as_tensor(weights, dtype=torch.float32)
        if w.shape != (count,) or not (w > 0).all():
            raise ValueError(f"`weights` must be {count} positive numbers, got {w.tolist()}.")
        self.event_shape = (dimension,)
        self.means: Tensor
        self.variances: Tensor
        self.axes: Tensor
        self.log_weights: Tensor
        self.register_buffer("means", means)
        self.register_buffer("variances", variances)  # eigenvalues of Cₖ, (components, dimension)
        self.register_buffer("axes", axes)  # its eigenvectors, as columns
        self.register_buffer("log_weights", (w / w.sum()).log())

    def energy(self, x: Tensor, noise_level: Tensor | None = None) -> Tensor:
        offset = x[:, None] - self.means
        variances = self.variances.expand(len(x), -1, -1)
        if noise_level is not None:
            variances = variances + noise_level.reshape(-1, 1, 1).square()
        along = torch.einsum("bkd,kde->bke", offset, self.axes.to(offset.dtype))
        quadratic = (along.square() / variances + variances.log()).sum(-1)
        constant = x.shape[1] * math.log(2 * math.pi)
        return -torch.logsumexp(self.log_weights - (quadratic + constant) / 2, dim=1)

    def prior(self, noise: Tensor, noise_level: float) -> Tensor:
        weights = self.log_weights.exp()
        mean = weights @ self.means
        spread = torch.einsum("kde,ke,kfe->kdf", self.axes, self.variances, self.axes)
        offset = self.means - mean
        covariance = torch.einsum("k,kdf->df", weights, spread) + (weights[:, None] * offset).T @ offset
        covariance = covariance + noise_level**2 * torch.eye(len(mean), device=mean.device)
        return (mean + noise.to(mean) @ torch.linalg.cholesky(covariance).T).to(noise.dtype)

    def draw(self, num: int, generator: torch.Generator | None = None) -> Tensor:
        k = torch.multinomial(self.log_weights.exp(), num, replacement=True, generator=generator)
        shape = (num, self.means.shape[1])
        xi = torch.randn(shape, generator=generator, device=self.means.device) * self.variances[k].sqrt()
        return self.means[k] + torch.einsum("bde,be->bd", self.axes[k], xi)


class Gaussian(GaussianMixture):
    """N(μ, C): E(x) = ½ (x - μ)ᵀ(C + σ² I)⁻¹(x - μ) + ½ log det 2π(C + σ² I).

    Args:
        mean: μ, shape (dimension,), or a number for one dimension.
        covariance: A variance, variances (dimension,), or a matrix (dimension, dimension).
    """

    def __init__(self, mean: Values = 0.0, covariance: Values = 1.0) -> None:
        super().__init__(torch.as_tensor(mean, dtype=torch.float32).reshape(1, -1), covariance)


class Box(Analytic):
    """The uniform density on a box, its walls softened by Gaussian noise of width s:

        E(x) = -Σ_d log [Φ((x_d - low_d)/√(s² + σ²)) - Φ((x_d - high_d)/√(s² + σ²))] + log volume.

    Args:
        low: Lower corner, shape (dimension,).
        high: Upper corner.
        softness: s, in data units.
    Raises:
        ValueError: If the box is empty.
    """

    def __init__(self, low: Values, high: Values, softness: float = 0.01) -> None:
        super().__init__()
        low, high = (torch.as_tensor(v, dtype=torch.float32).reshape(-1) for v in (low, high))
        if low.shape != high.shape or not (low < high).all():
            raise ValueError(
                f"`low` must lie below `high` in every dimension, got {low.tolist()}, {high.tolist()}."
            )
        if not softness > 0:
            raise ValueError(f"`softness` must be positive, got {softness}.")
        self.event_shape = tuple(low.shape)
        self.softness = float(softness)
        self.low: Tensor
        self.high: Tensor
        self.register_buffer("low", low)
        self.register_buffer("high", high)

    def energy(self, x: Tensor, noise_level: Tensor | None = None) -> Tensor:
        width = x.new_full((), self.softness)
        if noise_level is not None:
            width = (width.square() + noise_level.reshape(-1, 1).square()).sqrt()
        # Φ(b) - Φ(a) on the side where both are small keeps its digits far outside the box:
        # reflect so that the nearer wall is at -u, then log Φ(-u) + log(1 - Φ(-v)/Φ(-u)), v > u.
        centre, half = (self.low + self.high) / 2, (self.high - self.low) / 2
        distance = (x - centre).abs()
        near, far = _log_ndtr((half - distance) / width), _log_ndtr((-half - distance) / width)
        inside = near + torch.log1p(-torch.exp((far - near).clamp(max=-1e-30)))
        return -(inside - (2 * half).log()).sum(1)

    def draw(self, num: int, generator: torch.Generator | None = None) -> Tensor:
        options = {"generator": generator, "device": self.low.device}
        u = torch.rand(num, len(self.low), **options)  # type: ignore[arg-type]
        xi = torch.randn(num, len(self.low), **options)  # type: ignore[arg-type]
        return self.low + u * (self.high - self.low) + self.softness * xi


class _Tabulated(Analytic):
    """A density without a diffused closed form, normalised and sampled on a one-dimensional grid."""

    noise_conditioned = False

    def _tabulate(self, grid: Tensor, energy: Tensor, log_measure: Tensor) -> float:
        """Registers the quantile table of exp(-energy + log_measure) on `grid`; returns log Z."""
        log_mass = log_measure - energy
        step = float(grid[1] - grid[0])
        self.grid: Tensor
        self.cumulative: Tensor
        self.register_buffer("grid", grid)
        self.register_buffer("cumulative", log_mass.softmax(0).cumsum(0))
        return float(torch.logsumexp(log_mass, 0)) + math.log(step)

    def _quantiles(self, u: Tensor) -> Tensor:
        index = torch.searchsorted(self.cumulative, u).clamp(1, len(self.grid) - 1)
        low, high = self.cumulative[index - 1], self.cumulative[index]
        share = ((u - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
        return self.grid[index - 1] + share * (self.grid[index] - self.grid[index - 1])


class DoubleWell(_Tabulated):
    """Two wells along the first axis, a parabola along the others:

        E(x) = b (x₁² - 1)² + ½ Σ_{d>1} x_d² + log Z.

    Args:
        barrier: b, the height of the wall between the wells at ±1, in nats.
        dimension: Number of axes.
    """

    def __init__(self, barrier: float = 4.0, dimension: int = 1) -> None:
        super().__init__()
        self.barrier = float(barrier)
        self.event_shape = (dimension,)
        reach = 1 + 3 / max(barrier, 0.05) ** 0.25
        grid = torch.linspace(-reach, reach, 8001, dtype=torch.float64)
        well = self.barrier * (grid.square() - 1).square()
        log_z = self._tabulate(grid.float(), well.float(), torch.zeros(8001))
        self.log_z = log_z + (dimension - 1) / 2 * math.log(2 * math.pi)

    def energy(self, x: Tensor, noise_level: Tensor | None = None) -> Tensor:
        well = self.barrier * (x[:, 0].square() - 1).square()
        return well + x[:, 1:].square().sum(1) / 2 + self.log_z

    def draw(self, num: int, generator: torch.Generator | None = None) -> Tensor:
        options = {"generator": generator, "device": self.grid.device}
        first = self._quantiles(torch.rand(num, **options))  # type: ignore[arg-type]
        assert self.event_shape is not None
        rest = torch.randn(num, self.event_shape[0] - 1, **options)  # type: ignore[arg-type]
        return torch.cat([first[:, None], rest], dim=1)


class Rings(_Tabulated):
    """Concentric rings in the plane, equally likely in radius profile:

        E(x) = -log Σₖ exp(-(‖x‖ - rₖ)²/(2s²)) + log Z.

    Args:
        radii: rₖ > 0.
        width: s, in data units.
    """

    event_shape = (2,)

    def __init__(self, radii: Sequence[float] = (1.0, 2.0), width: float = 0.1) -> None:
        super().__init__()
        self.width = float(width)
        self.radii: Tensor
        self.register_buffer("radii", torch.tensor(radii, dtype=torch.float32))
        grid = torch.linspace(1e-6, max(radii) + 8 * width, 8001)
        # In polar coordinates the plane has measure 2πr dr.
        self.log_z = self._tabulate(grid, self._profile(grid), (2 * math.pi * grid).log())

    def _profile(self, radius: Tensor) -> Tensor:
        return -torch.logsumexp(-(radius[:, None] - self.radii).square() / (2 * self.width**2), dim=1)

    def energy(self, x: Tensor, noise_level: Tensor | None = None) -> Tensor:
        # The small constant keeps the gradient finite at the origin.
        return self._profile((x.square().sum(1) + 1e-12).sqrt()) + self.log_z

    def draw(self, num: int, generator: torch.Generator | None = None) -> Tensor:
        options = {"generator": generator, "device": self.grid.device}
        radius = self._quantiles(torch.rand(num, **options))  # type: ignore[arg-type]
        angle = 2 * math.pi * torch.rand(num, **options)  # type: ignore[arg-type]
        return radius[:, None] * torch.stack([angle.cos(), angle.sin()], dim=1)


def _log_ndtr(u: Tensor) -> Tensor:
    """log Φ(u), with a gradient that is right however far out; torch's is 8 % off at u = -3,000 in
    float32, and 0 or infinite at -100,000."""
    tail = u.clamp(max=-19.0)
    expansion = -tail.square() / 2 - (-tail).log() - 0.5 * math.log(2 * math.pi) - tail.pow(-2)
    return torch.where(u < -20, expansion, torch.special.log_ndtr(u.clamp(min=-21.0)))


def _matrix(covariance: Tensor, dimension: int) -> Tensor:
    if covariance.ndim == 0:
        return covariance * torch.eye(dimension)
    if covariance.shape == (dimension,):
        return torch.diag(covariance)
    if covariance.ndim in (2, 3) and covariance.shape[-2:] == (dimension, dimension):
        if not torch.allclose(covariance, covariance.mT, rtol=1e-4, atol=1e-7):
            raise ValueError("`covariance` must be symmetric.")
        return covariance
    raise ValueError(
        f"`covariance` must be a variance, {dimension} variances or a {dimension} by {dimension} matrix, "
        f"got shape {tuple(covariance.shape)}."
    )
