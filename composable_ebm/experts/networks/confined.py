"""An energy over noise levels that confines by construction: half a squared residual around a Gaussian.

Data with mean μ and covariance C, plus noise of standard deviation σ, looks first of all like N(μ, C + σ² I),
whose energy is half the squared length of the whitened state w = (C + σ² I)^(-½)(x - μ). The network moves
where that length is measured from:

    E(x, σ)[y] = ½ ‖w + k(σ) h(x, σ)‖² - log p(y | x, σ)

    k     one factor a component, √m/σ · √(λ/(λ + σ²)) · (1 + √λ), with λ the variance of the data along it
          and m the mean squared error of the Gaussian's own denoiser: in the denoised state x - σ² ∂E/∂x the
          network's part then has about the size of what is left to explain
    h     the network, in the principal components of the data
    p     the values of the attribute, a softmax of the network's logits

    F     optional, a floor that rises over nothing: E is max(½ ‖w + k h‖², F(σ)) - log p(y | x, σ)

E is at least 0, whatever the network does. The network sees w, and d/√(s² + σ²) beside it, through a ball,
v = w/√(1 + ‖w‖²/(κ² D)): so h is bounded, and E rises like the Gaussian's ½‖w‖² far from the data. There is
nowhere to fall but to 0, which at low noise lies far below data: smooth pictures that no data has may descend
there. `set_floor` ends that a little below the lowest energies of data, and changes nothing above.

Preconditioning wraps a network here: `backbone` is a module from (v, σ) to (h, logits).

Reference:
    Salimans and Ho (2021), Should EBMs model the energy or the score?, for squared residuals as energies.
    Karras et al. (2022), arXiv 2206.00364, section 5, for the scaling of inputs and outputs.
    Vincent (2011), A connection between score matching and denoising autoencoders.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from composable_ebm.experts.networks.perceptron import Perceptron
from composable_ebm.experts.networks.skeleton import GaussianSkeleton

__all__ = ["ConfinedEnergy"]

BALL = 3.0
"""κ: the network sees states as if within κ times the typical length of noisy data."""


def _in_ball(w: Tensor) -> Tensor:
    """States (batch, n) with lengths below κ√n, short ones about as they are."""
    return w * (1 + w.square().mean(1, keepdim=True) / BALL**2).rsqrt()


class ConfinedEnergy(GaussianSkeleton):
    """Half a squared residual around a Gaussian skeleton; energies (batch, num_values) in nats, at least 0.

    Latents and small pictures in which things have their place suit it.

    Args:
        event_shape: Shape of one state.
        num_values: Values of the attribute; 1 for an unconditional energy.
        hidden: Units of each hidden layer.
        layers: Hidden layers.
        noise_range: Smallest and largest noise level it is trained for, in data units.
        level: The level at which it is evaluated where none is given: the noise of the density that it is
            when asked for one energy. What is finer than that is left to the codec.
        floor: F in nats at levels even in log σ over `noise_range`, lines between them; none unless given.
    """

    least_variance = 1e-4
    floor_levels, floor_below, lowest = 81, 50.0, 0.0

    def __init__(
        self,
        event_shape: Sequence[int],
        num_values: int = 1,
        hidden: int = 512,
        layers: int = 3,
        noise_range: Sequence[float] = (0.1, 10.0),
        level: float = 0.4,
        floor: Sequence[float] = (),
    ) -> None:
        size = math.prod(event_shape)
        super().__init__(event_shape, size, noise_range)
        self.made_with(locals())
        self.level = float(level)
        self.set_floor(floor)
        self.backbone = Perceptron(event_shape, num_values, hidden, layers)

    def denoiser_error(self, sigma: Tensor) -> Tensor:
        noise = sigma.square()[..., None]
        return (self.variances * noise / (self.variances + noise)).mean(-1)

    @torch.no_grad()
    def fit(self, images: Tensor) -> None:
        x = images.flatten(1).double()
        mean = x.mean(0)
        self.axes.copy_(torch.linalg.eigh((x - mean).T @ (x - mean)).eigenvectors.T)
        self.refit(images)

    def features(self, x: Tensor, noise_level: Tensor | None = None) -> Tensor:
        """The last hidden layer, (batch, hidden), of states at noise levels () or (batch,)."""
        _, v, sigma = self._seen(x, noise_level)
        return self.backbone.features(v, sigma)

    def _seen(self, x: Tensor, noise_level: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """(w, v, σ) of each state."""
        sigma = x.new_full((), self.level) if noise_level is None else noise_level
        sigma = sigma.to(x.dtype).clamp(*self.noise_range).expand(len(x))
        noise = sigma.square()[:, None]
        d = (x.flatten(1) - self.mean) @ self.axes.T
        w = d * (self.variances + noise).rsqrt()
        seen = _in_ball(w), _in_ball(d * (self.spread.square() + noise).rsqrt())
        return w, torch.cat(seen, dim=1), sigma

    def forward(self, x: Tensor, noise_level: Tensor | None = None) -> Tensor:
        """Energies (batch, num_values) of states (batch, *event) at noise levels () or (batch,)."""
        w, v, sigma = self._seen(x, noise_level)
        noise = sigma.square()[:, None]
        h, logits = self.backbone(v, sigma)
        # Energies are large and their differences small: sums in float32, whatever autocast does.
        with torch.autocast(x.device.type, enabled=False):
            wide = torch.promote_types(x.dtype, torch.float32)
            w, h = w.to(wide), h.to(wide)
            share = (self.variances / (self.variances + noise)).sqrt() * (1 + self.variances.sqrt())
            k = (self.denoiser_error(sigma).sqrt() / sigma)[:, None] * share
            energy = (w + k * h).square().sum(1, keepdim=True) / 2
            if self.floor:
                energy = torch.maximum(energy, self.floor_at(sigma))
            return energy if logits is None else energy - logits.to(wide).log_softmax(1)
