"""A noise-conditioned energy of images whose parts meet anywhere: overlapping windows that talk.

Strokes look alike wherever they run, and have to meet. So the image is cut into overlapping windows, one
network looks at each, and windows tell each other what they see through dense layers over places:

    E(x, σ)[y] = ½ dᵀ(C + σ² I)⁻¹d + r(σ) Σₜ g(hₜ) + c(h)[y]

with d, C, r and c as in `diffused`, and hₜ what is known at window t after blocks of

    h ← h + P silu(h)        P over places, one matrix for each group of units
    h ← h + B silu(A h)      A and B over units, the same at every place

in which the noise level scales and shifts what enters each silu. A window sees d/√(σ² + s²) and what the
Gaussian makes of it, C(C + σ² I)⁻¹d/s. `diffused` takes a third to a fifth of the
time (16 to 256 images on a CPU), and is enough where things have their place.

Reference:
    Tolstikhin et al. (2021), MLP-Mixer, arXiv 2105.01601, for layers over places and over units;
    `diffused` for the energy of noisy data around a Gaussian.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from composable_ebm.experts.networks.skeleton import LevelledSkeleton

__all__ = ["DiffusedWindows"]

GROUPS = 8  # of units that share a matrix over places
SUMMARY = 16  # what the values are told of a window, numbers


class DiffusedWindows(LevelledSkeleton):
    """A perceptron over windows and places around a Gaussian skeleton; energies (batch, num_values) in nats.

    Args:
        event_shape: (channels, height, width), the sides divisible by `stride`.
        num_values: Values of the attribute; 1 for an unconditional energy.
        hidden: Units at each window, divisible by 8.
        blocks: How often windows are told of each other.
        stride: Pixels between windows.
        overlap: Pixels by which a window reaches further on each side.
        components: Principal components of the skeleton.
        noise_range: Smallest and largest noise level it is trained for, in data units; without a
            noise level given, it is evaluated at the smallest.
        floor: F(σ) in nats, see `skeleton`; none unless given.
    Raises:
        ValueError: If the image does not divide into windows, or `hidden` into groups.
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        num_values: int = 1,
        hidden: int = 128,
        blocks: int = 3,
        stride: int = 4,
        overlap: int = 2,
        components: int = 96,
        noise_range: Sequence[float] = (0.02, 10.0),
        floor: Sequence[float] = (),
    ) -> None:
        channels, height, width = event_shape
        if height % stride or width % stride:
            raise ValueError(f"images of {height}x{width} do not divide into windows {stride} pixels apart.")
        if hidden % GROUPS:
            raise ValueError(f"`hidden` must be divisible by {GROUPS}, got {hidden}.")
        super().__init__(event_shape, components, noise_range, modulations=(1 + 2 * blocks) * 2 * hidden)
        self.made_with(locals())
        self.set_floor(floor)
        self.stride, self.overlap, self.layers = stride, overlap, 1 + 2 * blocks
        self.sides = (2 * channels, height, width)
        places = (height // stride) * (width // stride)
        self.signs: Tensor
        self.register_buffer("signs", torch.tensor([1.0, -1.0] * 16))
        self.start = nn.Linear(2 * channels * (stride + 2 * overlap) ** 2, hidden)
        self.position = nn.Parameter(torch.zeros(places, hidden))
        self.blocks = nn.ModuleList(_Block(hidden, places) for _ in range(blocks))
        self.linear_head = nn.Linear(hidden, 1)
        self.quadratic_head = nn.Linear(hidden, 32, bias=False)
        self.look = nn.Linear(hidden, SUMMARY) if num_values > 1 else None
        self.value_head = nn.Linear(places * SUMMARY, num_values) if num_values > 1 else None
        nn.init.normal_(self.quadratic_head.weight, std=0.4 * hidden**-0.5)
        for layer in (self.modulate, self.value_head):
            if layer is not None:
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)

    def windows(self, image: Tensor) -> Tensor:
        """The windows of images (batch, channels, height, width): (batch, places, pixels), zero outside."""
        size = self.stride + 2 * self.overlap
        return F.unfold(image, size, padding=self.overlap, stride=self.stride).mT

    def forward(self, x: Tensor, noise_level: Tensor | None = None) -> Tensor:
        """Energies (batch, num_values) of images (batch, *event) at noise levels () or (batch,)."""
        sigma = self.level(x, noise_level)
        noise = sigma.square()
        d = x.flatten(1) - self.mean
        along = d @ self.axes.T
        precision = 1 / (self.variances + noise[:, None])
        scale = noise + self.spread.square()

        guess = (along * precision * self.variances) @ self.axes / self.spread
        seen = torch.stack([d * scale.rsqrt()[:, None], guess], dim=1).view(-1, *self.sides)
        gain, bias, *rest = (part[:, None] for part in self.modulation(sigma, 2 * self.layers))
        h = (self.start(self.windows(seen)) + self.position) * (1 + gain) + bias
        for i, block in enumerate(self.blocks):
            h = block(h, *rest[4 * i : 4 * i + 4])

        # Energies are large and their differences small: sums in float32, whatever autocast does.
        with torch.autocast(x.device.type, enabled=False):
            wide = torch.promote_types(h.dtype, torch.float32)
            h, d, along = h.to(wide), d.to(wide), along.to(wide)
            g = self.linear_head(h)[..., 0] + (self.quadratic_head(h).square() * self.signs).sum(2) / 2
            energy = self.gaussian_energy(d, along, noise) + self.strength(sigma) * g.sum(1)
            energy = energy[:, None]
            if self.look is not None and self.value_head is not None:
                energy = energy + self.value_head(F.silu(self.look(h)).flatten(1))
            return self.floored(energy, d, sigma)


class _Block(nn.Module):
    """Windows tell each other what they see, then each thinks about it."""

    def __init__(self, hidden: int, places: int) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.empty(GROUPS, places, places))
        nn.init.normal_(self.places, std=places**-0.5)
        self.into = nn.Linear(hidden, hidden)
        self.out = nn.Linear(hidden, hidden)

    def forward(self, h: Tensor, gain1: Tensor, bias1: Tensor, gain2: Tensor, bias2: Tensor) -> Tensor:
        batch, places, hidden = h.shape
        told = F.silu(h * (1 + gain1) + bias1).view(batch, places, GROUPS, -1)
        told = told.permute(2, 1, 0, 3).reshape(GROUPS, places, -1)
        told = torch.bmm(self.places, told).view(GROUPS, places, batch, -1)
        h = h + told.permute(2, 1, 0, 3).reshape(batch, places, hidden)
        return h + self.out(F.silu(self.into(h) * (1 + gain2) + bias2))
