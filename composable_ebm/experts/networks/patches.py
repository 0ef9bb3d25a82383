"""A noise-conditioned energy of images made of parts: one small network, shared by all patches.

What a scene holds at one place looks like what it holds at another, so the patches of an image share
one Gaussian skeleton and one perceptron, and the energy is a sum over them. What must agree between
places (how many objects there are, say) goes through a context that every patch sees:

    E(x, σ)[y] = Σₚ (½ dₚᵀ(C + σ² I)⁻¹dₚ + r(σ) g(uₚ, σ, context)) + c(u, σ)[y]

with dₚ = xₚ - μ for the pixels xₚ of patch p, and μ, C, r, u and c as in `diffused`. Where things may
stand in many places, nothing has to be learned once for each place. Pictures in which everything has
its own place suit `diffused` better.

Reference:
    Tolstikhin et al. (2021), MLP-Mixer, arXiv 2105.01601, for patches that share layers;
    `diffused` for the energy of noisy data around a Gaussian.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from composable_ebm.experts.networks.skeleton import FIT_IMAGES, ModulatedSkeleton

__all__ = ["DiffusedPatches"]

SUMMARY = 16  # what a patch tells the others, numbers


class DiffusedPatches(ModulatedSkeleton):
    """A perceptron over patches around a Gaussian skeleton; energies (batch, num_values) in nats.

    Args:
        event_shape: (channels, height, width), the sides divisible by `patch`.
        num_values: Values of the attribute; 1 for an unconditional energy.
        patch: Side of the patches, in pixels.
        hidden: Units of each of the three hidden layers, at each patch.
        components: Principal components of a patch.
        context: Units of the layer through which patches know of each other.
        noise_range: Smallest and largest noise level it is trained for, in data units; without a
            noise level given, it is evaluated at the smallest.
        floor: F(σ) in nats, see `skeleton`; none unless given.
    Raises:
        ValueError: If the image does not divide into patches.
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        num_values: int = 1,
        patch: int = 8,
        hidden: int = 128,
        components: int = 48,
        context: int = 64,
        noise_range: Sequence[float] = (0.02, 10.0),
        floor: Sequence[float] = (),
    ) -> None:
        channels, height, width = event_shape
        if height % patch or width % patch:
            raise ValueError(f"images of {height}x{width} do not divide into patches of side {patch}.")
        super().__init__((channels, patch, patch), hidden, components, noise_range)
        self.made_with(locals())
        self.set_floor(floor)
        self.patch = patch
        places = (height // patch) * (width // patch)
        self.signs: Tensor
        self.register_buffer("signs", torch.tensor([1.0, -1.0] * 16))
        self.summary = nn.Linear(hidden, SUMMARY)
        self.gather = nn.Linear(places * SUMMARY, context)
        self.scatter = nn.Linear(context, places * hidden)
        self.second = nn.Linear(hidden, hidden)
        self.third = nn.Linear(hidden, hidden)
        self.linear_head = nn.Linear(hidden, 1)
        self.quadratic_head = nn.Linear(hidden, 32, bias=False)
        self.look = nn.Linear(hidden, SUMMARY) if num_values > 1 else None
        self.value_head = nn.Linear(places * SUMMARY, num_values) if num_values > 1 else None
        self.initialise(self.scatter, self.value_head)
        nn.init.normal_(self.quadratic_head.weight, std=0.4 * hidden**-0.5)

    def patches(self, x: Tensor) -> Tensor:
        """The patches of images (batch, *event), row by row: (batch, places, pixels)."""
        return F.pixel_unshuffle(x, self.patch).flatten(2).mT

    def parts(self, images: Tensor) -> Tensor:
        """A patch of each image in [-1, 1], (n, *event), every place in turn: (m, pixels)."""
        patches = self.patches(images[:FIT_IMAGES])
        image = torch.arange(len(patches), device=patches.device)
        return patches[image, image % patches.shape[1]].float()

    def forward(self, x: Tensor, noise_level: Tensor | None = None) -> Tensor:
        """Energies (batch, num_values) of images (batch, *event) at noise levels () or (batch,)."""
        sigma = self.level(x, noise_level)[:, None]
        noise = sigma.square()
        d = self.patches(x) - self.mean
        along = d @ self.axes.T
        precision = 1 / (self.variances + noise)
        scale = noise + self.spread.square()

        gain1, bias1, gain2, bias2, gain3, bias3 = (part[:, None] for part in self.modulation(sigma[:, 0], 6))
        start = self.from_pixels(d * scale.rsqrt()[:, None])
        start = start + self.from_components(along * precision.sqrt()[:, None])
        h = F.silu(start * (1 + gain1) + bias1)
        context = F.silu(self.gather(self.summary(h).flatten(1)))
        h = h + self.scatter(context).view_as(h)
        h = h + F.silu(self.second(h) * (1 + gain2) + bias2)
        h = h + F.silu(self.third(h) * (1 + gain3) + bias3)

        # Energies are large and their differences small: sums in float32, whatever autocast does.
        with torch.autocast(x.device.type, enabled=False):
            wide = torch.promote_types(h.dtype, torch.float32)
            h, d, along = h.to(wide), d.to(wide), along.to(wide)
            g = self.linear_head(h)[..., 0] + (self.quadratic_head(h).square() * self.signs).sum(2) / 2
            energy = self.gaussian_energy(d, along, noise) + self.strength(sigma) * g
            energy = energy.sum(1, keepdim=True)
            if self.look is not None and self.value_head is not None:
                energy = energy + self.value_head(F.silu(self.look(h)).flatten(1))
            return self.floored(energy, d, sigma[:, 0])
