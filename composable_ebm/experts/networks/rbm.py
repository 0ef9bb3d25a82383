"""The restricted Boltzmann machine: bits or reals above a layer of hidden bits.

    E(v, h) = -bᵀv - cᵀh - vᵀWh                                    visible bits
    E(v, h) = Σᵢ (vᵢ - mᵢ)²/(2s²) - cᵀh - vᵀWh/s                  visible reals

No unit is coupled to another of its own layer, so the hidden bits can be summed out. What is left is
the free energy, the energy of the visible units alone, with p(v) ∝ exp(-F(v)):

    F(v) = -bᵀv - Σⱼ log(1 + exp aⱼ),   a = c + vᵀW      (visible reals: Σ (v - m)²/(2s²) and W/s)

With the values y of an attribute, each is a further bit of one more visible group, of which exactly
one is on: F(v, y) = -bᵀv - d_y - Σⱼ log(1 + exp(aⱼ + U_yj)). Every value is then an RBM of its own.

Reference:
    Smolensky (1986), Information processing in dynamical systems: foundations of harmony theory;
    Hinton (2002), Training products of experts by minimizing contrastive divergence; Hinton and
    Salakhutdinov (2006), Reducing the dimensionality of data with neural networks, for visible
    reals; Larochelle and Bengio (2008), Classification using discriminative restricted Boltzmann
    machines, for values.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from composable_ebm.energy import Energy
from composable_ebm.energy.conditionals import Conditionals
from composable_ebm.experts.networks.sized import Sized

VISIBLE = ("bits", "reals")

__all__ = ["RBM"]


class RBM(Sized):
    """A restricted Boltzmann machine: free energies F(v, y), shape (batch, num_values).

    Args:
        event_shape: Shape of the visible units; a batch is flattened.
        num_values: Values of the attribute; 1 for p(v) alone.
        hidden: Number of hidden bits.
        visible: "bits" in {0, 1}, or "reals" in [-1, 1] with Gaussian noise.
        scale: s, standard deviation of visible reals given the hidden bits, in data units.
        learn_scale: Learns s with the weights, from the standard deviation of the data down towards
            `scale` and never below: the smaller s, the sharper the states and the rarer the moves of
            Gibbs sampling between them.
    Raises:
        ValueError: If a size or the kind of the visible units makes no sense.
    Example:
        >>> rbm = RBM((1, 28, 28), hidden=500)
        >>> sample(rbm.free_energy(), num_chains=64, num_steps=1000, sampler=Gibbs())
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        num_values: int = 1,
        hidden: int = 500,
        visible: str = "bits",
        scale: float = 1.0,
        learn_scale: bool = False,
    ) -> None:
        super().__init__()
        if visible not in VISIBLE:
            raise ValueError(f'`visible` must be "bits" or "reals", got {visible!r}.')
        if hidden < 1 or num_values < 1 or not scale > 0:
            raise ValueError(
                "`hidden` and `num_values` must be at least 1 and `scale` positive, got "
                f"{hidden}, {num_values} and {scale}."
            )
        self.made_with(locals())
        if learn_scale and visible == "bits":
            raise ValueError('bits have no scale to learn: leave `learn_scale` out, or take visible="reals".')
        size = math.prod(event_shape)
        self.event_shape = tuple(event_shape)
        self.binary = visible == "bits"
        self.data_range = (0.0, 1.0) if self.binary else (-1.0, 1.0)
        self.scale = float(scale)
        self.log_scale = nn.Parameter(torch.tensor(0.0)) if learn_scale else None
        self.weight = nn.Parameter(nn.init.normal_(torch.empty(size, hidden), std=0.01))
        self.visible_bias = nn.Parameter(torch.zeros(size))  # b of bits, m of reals
        self.hidden_bias = nn.Parameter(torch.zeros(hidden))
        self.value_weight: nn.Parameter | None = None
        self.value_bias: nn.Parameter | None = None
        if num_values > 1:
            self.value_weight = nn.Parameter(nn.init.normal_(torch.empty(num_values, hidden), std=0.01))
            self.value_bias = nn.Parameter(torch.zeros(num_values))

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """Takes the visible biases from data, (n, *event), as if there were no hidden units.

        So the weights need not learn the mean first (Hinton 2010, A practical guide to training
        restricted Boltzmann machines, section 8.1).
        """
        mean = x.flatten(1).float().mean(0)
        self.visible_bias.copy_(mean.clamp(0.01, 0.99).logit() if self.binary else mean)
        if self.log_scale is not None:
            variance = (x.flatten(1) - mean).square().mean()
            self.log_scale.copy_((variance - self.scale**2).clamp(min=1e-6).log() / 2)

    @property
    def noise(self) -> Tensor | float:
        """s: fixed, or as learned so far, (s² = scale² + exp(2 log_scale))."""
        return self.scale if self.log_scale is None else (self.scale**2 + (2 * self.log_scale).exp()).sqrt()

    def conditionals(self, value: int = 0) -> Conditionals:
        """What Gibbs sampling has to know of p(v | y), see `composable_ebm.energy.conditionals`."""
        hidden_bias: Tensor = self.hidden_bias
        constant = hidden_bias.new_zeros(())
        if self.value_weight is not None and self.value_bias is not None:
            hidden_bias, constant = hidden_bias + self.value_weight[value], -self.value_bias[value]
        if self.binary:
            return Conditionals(self.visible_bias, None, self.weight, hidden_bias, constant=constant)
        precision = torch.ones_like(self.visible_bias) * self.noise**-2
        constant = constant + self.visible_bias.square() @ precision / 2
        return Conditionals(
            self.visible_bias * precision, precision, self.weight / self.noise, hidden_bias, constant=constant
        )

    def features(self, x: Tensor) -> Tensor:
        """p(hⱼ = 1 | v), (batch, hidden), of states (batch, *event)."""
        return self.conditionals().hidden_fields(x.flatten(1)).sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        scaled = x if self.binary else x / self.noise
        if self.binary:
            visible = -(x @ self.visible_bias)
        else:
            visible = (x - self.visible_bias).square().sum(1) / (2 * self.noise**2)
        if self.only_learns(x):
            return (visible + _HiddenEnergy.apply(scaled, self.weight, self.hidden_bias))[:, None]
        fields = scaled @ self.weight + self.hidden_bias
        # Free energies are large and their differences small: sums in float32.
        with torch.autocast(x.device.type, enabled=False):
            wide = torch.promote_types(fields.dtype, torch.float32)
            visible, fields = visible.to(wide)[:, None], fields.to(wide)
            if self.value_weight is None or self.value_bias is None:
                return visible - F.softplus(fields).sum(1, keepdim=True)
            hidden = F.softplus(fields[:, None] + self.value_weight.to(wide)).sum(2)
            return visible - self.value_bias.to(wide) - hidden

    def only_learns(self, x: Tensor) -> bool:
        """Whether a pass serves the gradient of the weights alone, which is then taken in closed form."""
        return (
            self.training
            and torch.is_grad_enabled()
            and not x.requires_grad
            and self.value_weight is None
            and not torch.is_autocast_enabled(x.device.type)
        )

    def free_energy(self, value: int = 0, name: str = "rbm") -> Energy:
        """F(v, y) as an energy that composes, for an RBM that is no expert of a catalogue.

        Args:
            value: Index of y.
            name: What recipes print.
        """
        return _FreeEnergy(self, value).named(name)


class _HiddenEnergy(torch.autograd.Function):
    """-Σⱼ log(1 + exp aⱼ) of states (batch, size), with the textbook's statistics for a gradient:

        ∂/∂W = -xᵀ σ(a),   ∂/∂c = -Σ σ(a)

    Equal to what autograd makes of the formula, with nothing recorded between a and its products: at
    200 hidden bits and batches of 100, four fifths of the time of the forward and backward passes.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        fields = torch.addmm(bias, x, weight)
        ctx.save_for_backward(x, weight, fields)
        return -F.softplus(fields).sum(1)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        x, weight, fields = ctx.saved_tensors
        on = fields.sigmoid().mul_(-gradient[:, None])
        return on @ weight.T if ctx.needs_input_grad[0] else None, x.T @ on, on.sum(0)


class _FreeEnergy(Energy):
    def __init__(self, network: RBM, value: int) -> None:
        super().__init__()
        self.network = network
        self.value = value
        self.event_shape = network.event_shape
        # Reals are Gaussian given the hidden bits, so no range holds them.
        self.data_range = network.data_range if network.binary else None
        self.binary = network.binary

    @property
    def key(self) -> Hashable:
        return ("free energy", id(self.network), self.value)

    def body(self) -> nn.Module:
        return self.network

    def read(self, outputs: Tensor) -> Tensor:
        return outputs[:, self.value]

    def energy(self, x: Tensor, noise_level: Tensor | None = None) -> Tensor:
        return self.read(self.network(x))

    def conditionals(self) -> Conditionals:
        return self.network.conditionals(self.value)
