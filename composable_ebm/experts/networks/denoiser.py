"""A denoiser as an expert: the score of noisy data at every noise level, and no energy.

The best guess D(x, σ) of the clean image behind x = clean + σξ is all that a diffusion model
learns, and it gives the score of the noisy data by Tweedie's formula,

    ∂E/∂x = (x - D(x, σ))/σ².

There is no E to differentiate, so training needs one backward pass where a noise-conditioned energy
needs two, and the score need not be the gradient of anything. As in a `DiffusedEnergy` the network
only learns what the Gaussian N(μ, C + σ² I) of noisy data leaves over:

    D(x, σ)[y] = μ + C (C + σ² I)⁻¹ d + √m(σ) h(u, σ)[y],    d = x - μ,  u = d/√(σ² + s²)

Reference:
    Vincent (2011), A connection between score matching and denoising autoencoders, section 4.
    Karras et al. (2022), arXiv 2206.00364, eq. 3 for D and its score, section 5 for the scaling.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from composable_ebm.energy import known_by_gradient
from composable_ebm.experts.networks.skeleton import ModulatedSkeleton

__all__ = ["Denoiser"]


class Denoiser(ModulatedSkeleton):
    """A multilayer perceptron that denoises, one image for each value of its attribute.

    Called like every network, it gives numbers (batch, num_values) whose gradients are the
    ∂E/∂x above, see `energy.known_by_gradient`. As values they carry c(x, σ)[y] = -log p(y | x, σ)
    of a head of its own, so that the marginal -log Σ_y exp(-E(x, y)) has the score of p(x):
    Σ_y p(y | x, σ) times the score of p(x | y).

    Args:
        event_shape: (channels, height, width).
        num_values: Values of the attribute; 1 for an unconditional denoiser.
        hidden: Units of each of the three hidden layers.
        components: Principal components of the skeleton.
        noise_range: Smallest and largest noise level it is trained for, in data units; without a
            noise level given, it is evaluated at the smallest.
    """

    has_value: ClassVar[bool] = False

    def __init__(
        self,
        event_shape: Sequence[int],
        num_values: int = 1,
        hidden: int = 288,
        components: int = 96,
        noise_range: Sequence[float] = (0.02, 10.0),
    ) -> None:
        super().__init__(event_shape, hidden, components, noise_range)
        self.made_with(locals())
        size = len(self.mean)
        self.second = nn.Linear(hidden, hidden)
        self.third = nn.Linear(hidden, hidden)
        # Gain and bias of the third layer, for each value.
        self.choose = nn.Parameter(torch.zeros(num_values, 2 * hidden)) if num_values > 1 else None
        self.to_pixels = nn.Linear(hidden, size)
        self.to_components = nn.Linear(hidden, components)
        self.value_head = nn.Linear(hidden, num_values) if num_values > 1 else None
        self.initialise(self.to_pixels, self.to_components, self.value_head)

    @property
    def architecture(self) -> Hashable:
        """Networks that agree in it may run as one batched pass."""
        return tuple((name, str(value)) for name, value in self.options.items())

    def denoise(self, x: Tensor, noise_level: Tensor) -> tuple[Tensor, Tensor]:
        """D, (batch, num_values, *event), and c, (batch, num_values) in nats.

        Args:
            x: Noisy images, (batch, *event).
            noise_level: σ, (batch,).
        """
        noise = noise_level.square()[:, None]
        d, along, h, gain3, bias3 = self.seen(x, noise_level)
        third = self.third(h) * (1 + gain3) + bias3
        logits = x.new_zeros(len(x), 1)
        if self.choose is not None and self.value_head is not None:
            logits = self.value_head(h + F.silu(third))
            gain, bias = self.choose.chunk(2, dim=1)
            h, third = h[:, None], third[:, None] * (1 + gain) + bias
        h = h + F.silu(third)
        of_pixels, of_components = self.to_pixels(h), self.to_components(h)

        with torch.autocast(x.device.type, enabled=False):
            rest = self.residual / (self.residual + noise)
            kept = self.variances / (self.variances + noise)
            # What is left to learn has the posterior's standard deviation in each direction.
            spread = (kept * noise).sqrt()[:, None] * of_components.float().reshape(len(x), -1, kept.shape[1])
            detail = (rest * noise).sqrt()[:, None] * of_pixels.float().reshape(len(x), -1, d.shape[1])
            gaussian = self.mean + rest * d.float()
            along = ((kept - rest) * along.float())[:, None] + spread
            denoised = gaussian[:, None] + along @ self.axes + detail
            c = -torch.log_softmax(-logits.float(), dim=1)
        return denoised.reshape(len(x), -1, *x.shape[1:]), c

    def forward(self, x: Tensor, noise_level: Tensor | None = None) -> Tensor:
        """Numbers (batch, num_values) with the gradients of the energies at levels () or (batch,)."""
        sigma = self.level(x, noise_level)
        at = x.detach()
        denoised, c = self.denoise(at, sigma)
        gradient = (at[:, None] - denoised) / sigma.square().reshape(-1, *[1] * x.ndim)
        columns = zip(gradient.unbind(1), c.unbind(1), strict=True)
        return torch.stack([known_by_gradient(x, g, value) for g, value in columns], dim=1)
