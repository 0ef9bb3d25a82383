"""A noise-conditioned energy: the energy of data plus Gaussian noise, at every noise level.

At noise level σ the energy describes p * N(0, σ² I), whose score is what denoising score matching
learns. Most of it is known beforehand: data with mean μ and covariance C, plus noise, looks first
of all like N(μ, C + σ² I). The network only learns what is not Gaussian.

    E(x, σ)[y] = ½ dᵀ(C + σ² I)⁻¹d + r(σ) g(u, σ) + c(u, σ)[y],    d = x - μ,  u = d/√(σ² + s²)

    s     standard deviation of the data, per pixel
    C     its principal components, and one variance for all other directions
    r     2 √m √(σ² + s²)/σ², with m the mean squared error of the Gaussian's own denoiser: in the
          denoised image x - σ² ∂E/∂x the network's part then has the size of what is left to explain
    c     the values of the attribute, -log p(y | x, σ) up to a constant

Reference:
    Vincent (2011), A connection between score matching and denoising autoencoders.
    Song and Ermon (2019), arXiv 1907.05600, for one network over noise levels.
    Karras et al. (2022), arXiv 2206.00364, section 5, for the scaling of inputs and outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from composable_ebm.experts.networks.diffused_native import DiffusedPass
from composable_ebm.experts.networks.skeleton import ModulatedSkeleton
from composable_ebm.potential.forms import register

__all__ = ["DiffusedEnergy"]


class DiffusedEnergy(ModulatedSkeleton):
    """A multilayer perceptron around a Gaussian skeleton; energies (batch, num_values) in nats.

    Small images in which things have their place (faces, digits) suit it: matrix products are what
    CPUs and GPUs do best.

    Args:
        event_shape: (channels, height, width).
        num_values: Values of the attribute; 1 for an unconditional energy.
        hidden: Units of each of the three hidden layers.
        components: Principal components of the skeleton.
        noise_range: Smallest and largest noise level it is trained for, in data units; without a
            noise level given, it is evaluated at the smallest.
        floor: F(σ) in nats, see `skeleton`; none unless given.
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        num_values: int = 1,
        hidden: int = 512,
        components: int = 128,
        noise_range: Sequence[float] = (0.02, 10.0),
        floor: Sequence[float] = (),
    ) -> None:
        super().__init__(event_shape, hidden, components, noise_range)
        self.made_with(locals())
        self.set_floor(floor)
        self.signs: Tensor
        self.register_buffer("signs", torch.tensor([1.0, -1.0] * 64))
        self.second = nn.Linear(hidden, hidden)
        self.third = nn.Linear(hidden, hidden)
        self.linear_head = nn.Linear(hidden, 1)
        self.quadratic_head = nn.Linear(hidden, 128, bias=False)
        self.value_head = nn.Linear(hidden, num_values) if num_values > 1 else None
        self.initialise(self.value_head)
        nn.init.normal_(self.quadratic_head.weight, std=0.4 * hidden**-0.5)

    def forward(self, x: Tensor, noise_level: Tensor | None = None) -> Tensor:
        """Energies (batch, num_values) of images (batch, *event) at noise levels () or (batch,)."""
        sigma = self.level(x, noise_level)
        noise = sigma.square()
        d, along, h, gain3, bias3 = self.seen(x, sigma)
        h = h + F.silu(self.third(h) * (1 + gain3) + bias3)

        # Energies are large and their differences small: sums in float32, whatever autocast does.
        with torch.autocast(x.device.type, enabled=False):
            wide = torch.promote_types(h.dtype, torch.float32)
            h, d, along = h.to(wide), d.to(wide), along.to(wide)
            g = self.linear_head(h)[:, 0] + (self.quadratic_head(h).square() * self.signs).sum(1) / 2
            energy = self.gaussian_energy(d, along, noise) + self.strength(sigma) * g
            energy = energy[:, None]
            return self.floored(energy if self.value_head is None else energy + self.value_head(h), d, sigma)


# Not for subclasses, whose `forward` may do more.
register(DiffusedPass, takes=lambda network: type(network) is DiffusedEnergy)
