"""What is known of noisy data before anything is learned: its mean and principal components.

Data with mean μ and covariance C, plus Gaussian noise of standard deviation σ, looks first of all
like N(μ, C + σ² I). Networks over noise levels are built around this Gaussian and learn the rest:

    s     standard deviation of the data, per pixel
    C     its principal components, and one variance for all other directions
    m     mean squared error of the Gaussian's own denoiser, per pixel: the size of what is left

Where a network could fall without end, a floor of its energies is set after training, a little below the
lowest energies of data, and changes nothing above:

    E'(x, σ)[y] = E(x, σ)[y] + max(0, F(x, σ) - E(x, σ)),            E(x, σ) = -log Σ_y exp(-E(x, σ)[y])
    F(x, σ)     = F(σ) + ½ max(0, ‖x - μ‖²/(s² + σ²) - κ n)

n is the number of pixels, so that noisy data have ‖x - μ‖² of about n (s² + σ²): beyond κ times as much the
floor rises quadratically.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from composable_ebm.energy.base import Axes
from composable_ebm.experts.networks.sized import Sized

__all__ = [
    *("GaussianSkeleton", "LevelledSkeleton", "ModulatedSkeleton"),
    *("frequencies", "images_to_fit", "principal_axes"),
]

FIT_IMAGES = 10_000
FIT_NUMBERS = 2**26  # a quarter of a gigabyte of them
EXACT = 1024  # the largest matrix that is worth an exact decomposition
REACH = 4.0  # κ: data themselves reach 2.5 times their mean squared length


def images_to_fit(size: int) -> int:
    """How many images of `size` numbers the skeleton is taken from, so that they fit into memory."""
    return max(min(FIT_IMAGES, FIT_NUMBERS // size), 2)


def principal_axes(x: Tensor, count: int) -> Tensor:
    """The directions in which centred data vary most, orthonormal, (size, count), least first.

    By the covariance or the Gram matrix, whichever is smaller, decomposed in float64: in float32 it fails
    for data of low rank. Where both are large, by subspace iteration, which needs neither.

    Args:
        x: Centred data, (n, size).
        count: How many, at most `size`; data of lower rank are completed by directions of no variance.
    Reference:
        Halko, Martinsson and Tropp (2011), arXiv 0909.4061, algorithm 4.4.
    """
    n, size = x.shape
    if size <= min(n, EXACT):
        return torch.linalg.eigh((x.T @ x).double()).eigenvectors[:, -count:].to(x.dtype)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(size, min(count + 16, size), generator=generator).to(x)
    if n <= EXACT:
        leading = torch.linalg.eigh((x @ x.T).double()).eigenvectors[:, -count:].flip(1).to(x.dtype)
        start[:, : leading.shape[1]] = x.T @ leading
        return torch.linalg.qr(start.double()).Q[:, :count].flip(1).to(x.dtype)
    for _ in range(8):
        start = torch.linalg.qr(x.T @ (x @ start)).Q
    seen = x @ start
    return start @ torch.linalg.eigh((seen.T @ seen).double()).eigenvectors[:, -count:].to(x.dtype)


def frequencies() -> Tensor:
    """Of the waves by which a network is told the logarithm of a noise level, (16,), from 0.3 to 6."""
    # Not torch.linspace, which on the meta device imports sympy: a third of a second of a cold start.
    return torch.tensor([0.3 + 0.38 * i for i in range(16)])


class GaussianSkeleton(Sized):
    """The Gaussian part of a network over noise levels, as buffers that `fit` takes from images.

    Args:
        event_shape: (channels, height, width).
        components: Principal components.
        noise_range: Smallest and largest noise level of the network, in data units.
    """

    least_variance: ClassVar[float] = 1e-8
    """A background that never changes has no variance; a pixel's grain has 1e-5."""
    floor_levels: ClassVar[int] = 385
    floor_below: ClassVar[float] = 40.0
    lowest: ClassVar[float] = -math.inf
    """Values of F, nats below data at which it is set, and what energies are above without one.

    Energies of data bend with log σ, most of all at the lowest level: lines between 96 values lay up to
    90 nats below what they stand for, between four times as many 8.
    """

    def __init__(self, event_shape: Sequence[int], components: int, noise_range: Sequence[float]) -> None:
        super().__init__()
        size = math.prod(event_shape)
        low, high = noise_range
        self.noise_range = (float(low), float(high))
        self.mean: Tensor
        self.axes: Tensor
        self.variances: Tensor
        self.residual: Tensor
        self.spread: Tensor
        self.register_buffer("mean", torch.zeros(size))
        # Not torch.eye, which on the meta device imports the compiler: a second of a cold start.
        self.register_buffer("axes", torch.zeros(min(components, size), size).fill_diagonal_(1))
        self.register_buffer("variances", torch.ones(components))
        self.register_buffer("residual", torch.ones(()))  # variance of every other direction
        self.register_buffer("spread", torch.ones(()))  # s
        self.options: dict[str, object] = {}
        self.least: Tensor
        self.set_floor(())

    def set_floor(self, floor: Sequence[float]) -> None:
        """Takes F(σ) in nats, at levels even in log σ over `noise_range`, lines between them; () is none.

        Raises:
            ValueError: If it has one value only.
        """
        if len(floor) == 1:
            raise ValueError("`floor` needs two values or more, one at each end of `noise_range`, got 1.")
        self.floor = [float(value) for value in floor]
        self.options.pop("floor", None)
        if self.floor:
            self.options["floor"] = self.floor
        self.register_buffer("least", torch.tensor(self.floor).to(self.mean), persistent=False)

    @property
    def sizes(self) -> tuple[tuple[str, str], ...]:
        """What networks of one architecture have in common; the number of values and floors may differ."""
        return *(pair for pair in super().sizes if pair[0] != "floor"), ("floor", str(len(self.floor)))

    def levels_of_floor(self) -> Tensor:
        """The noise levels of values of F, (levels,)."""
        low, high = self.noise_range
        return torch.linspace(math.log(low), math.log(high), self.floor_levels).exp()

    def floor_at(self, sigma: Tensor) -> Tensor:
        """F(σ), (batch, 1), at levels (batch,), as a sum of hats, one around each level."""
        low, high = self.noise_range
        steps = len(self.floor) - 1
        place = (sigma.log() - math.log(low)) * (steps / math.log(high / low))
        hats = F.relu(1 - (place[:, None] - torch.arange(steps + 1, device=sigma.device)).abs())
        return (hats * self.least).sum(1, keepdim=True)

    def slope_of_floor(self, d: Tensor, sigma: Tensor) -> Tensor:
        """What F(x, σ) has above F(σ) far from the data, (batch, 1), of deviations (batch, pixels)."""
        length = d.square().sum(1, keepdim=True) / (self.spread.square() + sigma.square())[:, None]
        return F.relu(length - REACH * d.shape[1]) / 2

    def floored(self, outputs: Tensor, d: Tensor, sigma: Tensor) -> Tensor:
        """E'(x, σ)[y], (batch, values), where there is a floor.

        Args:
            outputs: E(x, σ)[y], (batch, values).
            d: Deviations from the mean, (batch, ...).
            sigma: Levels, (batch,) or (1,).
        """
        if not self.floor:
            return outputs
        floor = self.floor_at(sigma) + self.slope_of_floor(d.flatten(1).to(outputs.dtype), sigma)
        if outputs.shape[1] == 1:
            return torch.maximum(outputs, floor)
        return outputs + F.relu(floor + (-outputs).logsumexp(1, keepdim=True))

    @torch.no_grad()
    def fit(self, images: Tensor) -> None:
        """Takes mean and principal components from images in [-1, 1], (n, *event)."""
        x = self.parts(images)
        x = x - x.mean(0)
        self.axes.copy_(principal_axes(x, len(self.variances)).T)
        self.refit(images)

    @torch.no_grad()
    def refit(self, images: Tensor) -> None:
        """Takes the mean and all variances anew, along the axes that it has: weights know those."""
        x = self.parts(images)
        self.mean.copy_(x.mean(0))
        x = x - self.mean
        variances = (x @ self.axes.T).square().mean(0)
        total, others = x.square().sum() / len(x), len(self.mean) - len(variances)
        self.variances.copy_(variances.clamp(min=self.least_variance))
        self.residual.copy_(((total - variances.sum()) / max(others, 1)).clamp(min=self.least_variance))
        self.spread.copy_(x.square().mean().sqrt().clamp(min=1e-4))

    def parts(self, images: Tensor) -> Tensor:
        """What the Gaussian is of: images (n, *event) in [-1, 1], as many as fit into memory, (m, size)."""
        return images[: images_to_fit(self.mean.numel())].flatten(1).float()

    def denoiser_error(self, sigma: Tensor) -> Tensor:
        """m: mean squared error per pixel of the Gaussian's denoiser, shape of `sigma`."""
        noise = sigma.square()
        kept = (self.variances * noise[..., None] / (self.variances + noise[..., None])).sum(-1)
        size = len(self.mean)
        rest = (size - len(self.variances)) * self.residual * noise / (self.residual + noise)
        return (kept + rest) / size

    @torch.no_grad()
    def prior(self, noise: Tensor, noise_level: float) -> Tensor | None:
        """Draws of N(μ, C + σ² I) from draws of a standard normal, (batch, *event) each.

        None where the Gaussian is one of patches, which says little of whole pictures.
        """
        z = noise.flatten(1)
        if z.shape[1] != len(self.mean):
            return None
        rest = (self.residual + noise_level**2).sqrt()
        along = (z @ self.axes.T) * ((self.variances + noise_level**2).sqrt() - rest)
        return (self.mean + rest * z + along @ self.axes).reshape(noise.shape)

    def principal_axes(self, size: int) -> Axes | None:
        """Principal components of states of `size` numbers; None where they are those of patches."""
        return Axes(self.axes, self.variances) if size == len(self.mean) else None

    def gaussian_energy(self, d: Tensor, along: Tensor, noise: Tensor) -> Tensor:
        """½ dᵀ(C + σ² I)⁻¹d in nats, shape of `noise`.

        Args:
            d: Deviations from the mean, (..., pixels).
            along: Their components, (..., components).
            noise: σ², (...).
        """
        precision = 1 / (self.variances + noise[..., None])
        rest = 1 / (self.residual + noise)
        outside = ((precision - rest[..., None]) * along.square()).sum(-1)
        return (rest * d.square().sum(-1) + outside) / 2

    def strength(self, sigma: Tensor) -> Tensor:
        """r(σ) = 2 √m √(σ² + s²)/σ², what a network's part is scaled by, shape of `sigma`."""
        noise = sigma.square()
        return 2 * (self.denoiser_error(sigma) * (noise + self.spread.square())).sqrt() / noise


class LevelledSkeleton(GaussianSkeleton):
    """The skeleton with gains and biases that the noise level gives to the layers of a network.

    Args:
        event_shape: (channels, height, width).
        components: Principal components of the skeleton.
        noise_range: Smallest and largest noise level of the network, in data units.
        modulations: Gains and biases of all layers together.
    """

    def __init__(
        self, event_shape: Sequence[int], components: int, noise_range: Sequence[float], modulations: int
    ) -> None:
        super().__init__(event_shape, components, noise_range)
        self.frequencies: Tensor
        self.register_buffer("frequencies", frequencies())
        self.embed = nn.Linear(32, 64)
        self.modulate = nn.Linear(64, modulations)

    def level(self, x: Tensor, noise_level: Tensor | None) -> Tensor:
        """σ within the network's range, (batch,), or (1,) where all rows share it, so that what it gives
        to the layers is computed once; the smallest where none is given."""
        sigma = x.new_full((), self.noise_range[0]) if noise_level is None else noise_level
        return sigma.to(x.dtype).clamp(*self.noise_range).reshape(-1)

    def modulation(self, sigma: Tensor, parts: int) -> tuple[Tensor, ...]:
        """Gain and bias of the layers in turn, `parts` in all, (batch, units) each, at levels (batch,)."""
        waves = sigma.log()[:, None] * self.frequencies
        embedding = F.silu(self.embed(torch.cat([waves.sin(), waves.cos()], dim=1)))
        return self.modulate(embedding).chunk(parts, dim=1)


class ModulatedSkeleton(LevelledSkeleton):
    """The skeleton with the way into a perceptron of three hidden layers, which the noise level modulates.

    A subclass adds the layers `second` and `third`, and its heads.

    Args:
        event_shape: (channels, height, width).
        hidden: Units of each hidden layer.
        components: Principal components.
        noise_range: Smallest and largest noise level of the network, in data units.
    """

    second: nn.Linear
    third: nn.Linear

    def __init__(
        self, event_shape: Sequence[int], hidden: int, components: int, noise_range: Sequence[float]
    ) -> None:
        super().__init__(event_shape, components, noise_range, modulations=6 * hidden)
        self.from_pixels = nn.Linear(len(self.mean), hidden, bias=False)
        self.from_components = nn.Linear(components, hidden)

    def seen(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """What is seen of images (batch, *event) at noise levels (batch,) or (1,): deviations from the mean,
        (batch, pixels), their components, what two layers make of them, and gain and bias of the third."""
        noise = sigma.square()[:, None]
        d = x.flatten(1) - self.mean
        along = d @ self.axes.T
        gain1, bias1, gain2, bias2, gain3, bias3 = self.modulation(sigma, 6)
        start = self.from_pixels(d * (noise + self.spread.square()).rsqrt())
        start = start + self.from_components(along * (self.variances + noise).rsqrt())
        h = F.silu(start * (1 + gain1) + bias1)
        return d, along, h + F.silu(self.second(h) * (1 + gain2) + bias2), gain3, bias3

    def initialise(self, *heads: nn.Linear | None) -> None:
        """First weights: of the hidden layers at random; the modulation and `heads` begin at zero."""
        for layer in (self.from_components, self.second, self.third):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")
            layer.weight.data.mul_(1.4)
        nn.init.normal_(self.from_pixels.weight, std=len(self.mean) ** -0.5)
        for head in (self.modulate, *heads):
            if head is not None:
                nn.init.zeros_(head.weight)
                nn.init.zeros_(head.bias)
