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

Preconditioning wraps a network here: `backbone` may be any module from (v, σ) to (h, logits).

Reference:
    Salimans and Ho (2021), Should EBMs model the energy or the score?, for squared residuals as energies.
    Karras et al. (2022), arXiv 2206.00364, section 5, for the scaling of inputs and outputs.
    Vincent (2011), A connection between score matching and denoising autoencoders.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from composable_ebm.experts.networks.skeleton import GaussianSkeleton, frequencies

__all__ = ["ConfinedEnergy", "Perceptron"]

FLOORS = 20
BALL = 3.0
"""κ: the network sees states as if within κ times the typical length of noisy data."""


class Perceptron(nn.Module):
    """Residual layers whose gain and bias the noise level gives, from (v, σ) to (h, logits).

    Args:
        inputs: Numbers of v.
        size: Components of h.
        num_values: Logits; none for 1.
        hidden: Units of each hidden layer.
        layers: Hidden layers.
    """

    def __init__(self, inputs: int, size: int, num_values: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.frequencies: Tensor
        self.register_buffer("frequencies", frequencies())
        self.embed = nn.Linear(32, 64)
        self.modulate = nn.Linear(64, 2 * hidden * layers)
        self.enter = nn.Linear(inputs, hidden)
        self.middle = nn.ModuleList([nn.Linear(hidden, hidden) for _ in range(layers - 1)])
        self.leave = nn.Linear(hidden, size)
        self.choose = nn.Linear(hidden, num_values) if num_values > 1 else None
        for layer in (self.enter, *self.middle):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")
            layer.weight.data.mul_(1.4)
        for head in (self.modulate, self.leave, *([] if self.choose is None else [self.choose])):
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)

    def features(self, v: Tensor, sigma: Tensor) -> Tensor:
        """The last hidden layer, (batch, hidden)."""
        waves = sigma.log()[:, None] * self.frequencies
        embedding = F.silu(self.embed(torch.cat([waves.sin(), waves.cos()], dim=1)))
        parts = self.modulate(embedding).chunk(2 * (len(self.middle) + 1), dim=1)
        h = F.silu(self.enter(v) * (1 + parts[0]) + parts[1])
        for layer, gain, bias in zip(self.middle, parts[2::2], parts[3::2], strict=True):
            h = h + F.silu(layer(h) * (1 + gain) + bias)
        return h

    def forward(self, v: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor | None]:
        h = self.features(v, sigma)
        return self.leave(h), None if self.choose is None else self.choose(h)


def _in_ball(w: Tensor) -> Tensor:
    """States (batch, n) with lengths below κ√n, short ones about as they are."""
    return w * (1 + w.square().mean(1, keepdim=True) / BALL**2).rsqrt()


class ConfinedEnergy(GaussianSkeleton):
    """Half a squared residual around a Gaussian skeleton; energies (batch, num_values) in nats, at least 0.

    Latents and small pictures in which things have their place suit it.

    Args:
        event_shape: Shape of one state.
        num_values: Values of the attribute; 1 for an unconditional energy.
        hidden: Units of each hidden layer of the perceptron.
        layers: Its hidden layers.
        noise_range: Smallest and largest noise level it is trained for, in data units.
        level: The level at which it is evaluated where none is given: the noise of the density that it is
            when asked for one energy. What is finer than that is left to the codec.
        floor: F in nats at levels even in log σ over `noise_range`, lines between them; none unless given.
    """

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
        size = 1
        for side in event_shape:
            size *= side
        super().__init__(event_shape, size, noise_range)
        self.options: dict[str, object] = {
            "event_shape": list(event_shape),
            "num_values": num_values,
            "hidden": hidden,
            "layers": layers,
            "noise_range": list(noise_range),
            "level": level,
        }
        self.level = float(level)
        self.least: Tensor
        self.set_floor(floor)
        self.backbone = Perceptron(2 * size, size, num_values, hidden, layers)

    def set_floor(self, floor: Sequence[float]) -> None:
        """Takes F, at levels even in log σ; an empty one is none."""
        if len(floor) == 1:
            raise ValueError("`floor` needs two values or more, one at each end of `noise_range`, got 1.")
        self.floor = [float(value) for value in floor]
        self.options.pop("floor", None)
        if self.floor:
            self.options["floor"] = self.floor
        self.register_buffer("least", torch.tensor(self.floor).to(self.mean), persistent=False)

    def levels_of_floor(self) -> Tensor:
        """The noise levels of twenty values of F, (20,): lines between them are right to ten nats."""
        low, high = self.noise_range
        return torch.linspace(math.log(low), math.log(high), FLOORS).exp()

    def _floor_at(self, sigma: Tensor) -> Tensor:
        """F(σ), (batch, 1), as a sum of hats, one around each level."""
        low, high = self.noise_range
        steps = len(self.floor) - 1
        place = (sigma.log() - math.log(low)) * (steps / math.log(high / low))
        hats = F.relu(1 - (place[:, None] - torch.arange(steps + 1, device=sigma.device)).abs())
        return (hats * self.least).sum(1, keepdim=True)

    @property
    def architecture(self) -> Hashable:
        """Networks that agree in it may run as one batched pass."""
        return tuple((name, str(value)) for name, value in self.options.items() if name != "num_values")

    def denoiser_error(self, sigma: Tensor) -> Tensor:
        noise = sigma.square()[..., None]
        return (self.variances * noise / (self.variances + noise)).mean(-1)

    @torch.no_grad()
    def fit(self, images: Tensor) -> None:
        x = images.flatten(1).double()
        mean = x.mean(0)
        variances, axes = torch.linalg.eigh((x - mean).T @ (x - mean) / len(x))
        self.mean.copy_(mean)
        self.axes.copy_(axes.T)
        self.variances.copy_(variances.clamp(min=1e-4))
        self.spread.copy_(variances.mean().sqrt())

    def features(self, x: Tensor, noise_level: Tensor | None = None) -> Tensor:
        """The perceptron's last hidden layer, (batch, hidden), of states at noise levels () or (batch,)."""
        _, v, sigma = self._seen(x, noise_level)
        return self.backbone.features(v, sigma)

    def _seen(self, x: Tensor, noise_level: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """(w, v, σ) of each state."""
        sigma = x.new_full((), self.level) if noise_level is None else noise_level
        sigma = sigma.to(x.dtype).clamp(*self.noise_range).expand(len(x))
        noise = sigma.square()[:, None]
        d = (x.flatten(1) - self.mean) @ self.axes.T
        w = d * (self.variances + noise).rsqrt()
        v = torch.cat([_in_ball(w), _in_ball(d * (self.spread.square() + noise).rsqrt())], dim=1)
        return w, v, sigma

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
                energy = torch.maximum(energy, self._floor_at(sigma))
            return energy if logits is None else energy - logits.to(wide).log_softmax(1)
