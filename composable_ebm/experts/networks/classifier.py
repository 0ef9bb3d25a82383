"""What an attribute adds to a density: the probabilities of its values, at every noise level.

    outputs[y] = -log p(y | x, σ)

A classifier of noisy states is all that composition needs of an attribute: `given` multiplies a density by
p(y | x, σ). It is a few minutes of training beside a density that stands still, and trained by maximum
likelihood it says what Bayes' rule asks for, a probability, in nats.

Reference:
    Dhariwal and Nichol (2021), arXiv 2105.05233, section 4.1, for classifiers of noisy images.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from composable_ebm.experts.networks.sized import Sized
from composable_ebm.experts.networks.skeleton import frequencies

__all__ = ["NoisyClassifier"]


class NoisyClassifier(Sized):
    """A small convolutional network whose gains and biases the noise level gives; (batch, values) in nats.

    Args:
        event_shape: (channels, height, width) of states of about unit scale; sides divisible by 2·`patch`.
        num_values: Values of the attribute, at least 2.
        width: Channels.
        blocks: Residual blocks.
        hidden: Units of the last hidden layer.
        noise_range: Smallest and largest noise level it is trained for, in data units; without a
            noise level given, it is evaluated at the smallest.
        patch: Pixels a side of what the first layer sees as one; 1 for latents.
    Raises:
        ValueError: If there is nothing to tell apart.
    """

    adds_to_base = True
    """Its outputs are probabilities, and no density: an expert of it is one on top of a base."""

    def __init__(
        self,
        event_shape: Sequence[int],
        num_values: int = 2,
        width: int = 64,
        blocks: int = 2,
        hidden: int = 128,
        noise_range: Sequence[float] = (0.1, 10.0),
        patch: int = 1,
    ) -> None:
        super().__init__()
        if num_values < 2:
            raise ValueError(f"a classifier tells at least two values apart, got num_values = {num_values}.")
        self.made_with(locals())
        low, high = noise_range
        self.noise_range = (float(low), float(high))
        channels, height, across = event_shape
        self.frequencies: Tensor
        self.register_buffer("frequencies", frequencies())
        self.embed = nn.Linear(32, 64)
        self.modulate = nn.Linear(64, 2 * width * (blocks + 1))
        self.patches = nn.PixelUnshuffle(patch) if patch > 1 else nn.Identity()
        self.enter = nn.Conv2d(channels * patch**2, width, 3, padding=1)
        self.convolutions = nn.ModuleList([nn.Conv2d(width, width, 3, padding=1) for _ in range(2 * blocks)])
        self.hidden = nn.Linear(width * (height // (2 * patch)) * (across // (2 * patch)), hidden)
        self.choose = nn.Linear(hidden, num_values)
        for layer in (self.modulate, *self.convolutions[1::2]):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, noise_level: Tensor | None = None) -> Tensor:
        """-log p(y | x, σ) of each value, (batch, num_values), of states (batch, *event)."""
        sigma = x.new_full((), self.noise_range[0]) if noise_level is None else noise_level
        sigma = sigma.to(x.dtype).clamp(*self.noise_range).reshape(-1)
        waves = sigma.log()[:, None] * self.frequencies
        embedding = F.silu(self.embed(torch.cat([waves.sin(), waves.cos()], dim=1)))
        parts = self.modulate(embedding)[:, :, None, None].chunk(len(self.convolutions) + 2, dim=1)
        scale = (1 + sigma.square()).rsqrt().reshape(-1, 1, 1, 1)
        h = self.enter(self.patches(x * scale)) * (1 + parts[0]) + parts[1]
        layers = zip(self.convolutions[::2], self.convolutions[1::2], parts[2::2], parts[3::2], strict=True)
        for first, second, gain, bias in layers:
            h = h + second(F.silu(first(F.silu(h)) * (1 + gain) + bias))
        features = F.silu(self.hidden(F.avg_pool2d(F.silu(h), 2).flatten(1)))
        with torch.autocast(x.device.type, enabled=False):
            wide = torch.promote_types(x.dtype, torch.float32)
            weight, bias = self.choose.weight.to(wide), self.choose.bias.to(wide)
            return -F.linear(features.to(wide), weight, bias).log_softmax(1)
