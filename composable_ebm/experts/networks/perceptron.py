"""What a Gaussian lacks, learned: from a state seen in a ball, and its noise level, to h and logits."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from composable_ebm.experts.networks.skeleton import frequencies

__all__ = ["Perceptron"]


class Perceptron(nn.Module):
    """Residual layers over the whole state, each gained and biased by the noise level: (v, σ) -> (h, logits).

    Args:
        event_shape: Shape of one state.
        num_values: Logits; none for 1.
        hidden: Units of each hidden layer.
        layers: Hidden layers.
    """

    def __init__(self, event_shape: Sequence[int], num_values: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.frequencies: Tensor
        self.register_buffer("frequencies", frequencies())
        self.embed = nn.Linear(32, 64)
        self.modulate = nn.Linear(64, 2 * hidden * layers)
        self.choose = nn.Linear(hidden, num_values) if num_values > 1 else None
        size = math.prod(event_shape)
        self.enter = nn.Linear(2 * size, hidden)
        self.middle = nn.ModuleList([nn.Linear(hidden, hidden) for _ in range(layers - 1)])
        self.leave = nn.Linear(hidden, size)
        for layer in (self.enter, *self.middle):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")
            layer.weight.data.mul_(1.4)
        for head in filter(None, (self.modulate, self.choose, self.leave)):
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)

    def features(self, v: Tensor, sigma: Tensor) -> Tensor:
        """The last hidden layer, what logits are read from, (batch, hidden), at levels (batch,)."""
        waves = sigma.log()[:, None] * self.frequencies
        modulation = self.modulate(F.silu(self.embed(torch.cat([waves.sin(), waves.cos()], dim=1))))
        parts = modulation.chunk(2 * (len(self.middle) + 1), dim=1)
        h = F.silu(self.enter(v) * (1 + parts[0]) + parts[1])
        for layer, gain, bias in zip(self.middle, parts[2::2], parts[3::2], strict=True):
            h = h + F.silu(layer(h) * (1 + gain) + bias)
        return h

    def forward(self, v: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor | None]:
        h = self.features(v, sigma)
        return self.leave(h), None if self.choose is None else self.choose(h)
