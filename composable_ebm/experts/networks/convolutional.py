"""Networks that give energies.

A conditional network has one output per value of its attribute, E(x, y) = f(x)[y], so one forward
pass serves every value, their negation and their mixture. No normalisation layers, which couple
the chains of a batch, and no attention, whose input gradients are poor.

Reference:
    Du and Mordatch (2019), arXiv 1903.08689, for convolutional energies; Grathwohl et al. (2020),
    arXiv 1912.03263, for one energy per class from one network.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from composable_ebm.experts.networks.sized import Sized

__all__ = ["ConvEnergy"]


class ConvEnergy(Sized):
    """A convolutional energy: E(x, y) for every value y, shape (batch, num_values), in float32.

    The first layer sees patches (space to depth) at stride 1 instead of a strided convolution,
    whose input gradient is the bottleneck on CPUs; deeper layers halve the resolution by averages.

    Args:
        event_shape: (channels, height, width), the sides divisible by `patch`.
        num_values: Values of the attribute; 1 for an unconditional energy.
        widths: Channels of each 3x3 convolution; the resolution halves between them.
        patch: Side of the patches, in pixels.
        hidden: Units of the last hidden layer.
    Raises:
        ValueError: If the image does not divide into patches.
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        num_values: int = 1,
        widths: Sequence[int] = (32, 64, 64),
        patch: int = 2,
        hidden: int = 128,
    ) -> None:
        super().__init__()
        channels, height, width = event_shape
        if height % patch or width % patch:
            raise ValueError(f"images of {height}x{width} do not divide into patches of side {patch}.")
        self.made_with(locals())
        self.patch = patch
        depth, height, width = channels * patch**2, height // patch, width // patch
        layers: list[nn.Module] = []
        for i, features in enumerate(widths):
            if i:
                layers.append(nn.AvgPool2d(2, ceil_mode=True))
                height, width = math.ceil(height / 2), math.ceil(width / 2)
            layers += [nn.Conv2d(depth, features, 3, padding=1), nn.SiLU()]
            depth = features
        self.features = nn.Sequential(*layers).to(memory_format=torch.channels_last)
        self.hidden = nn.Linear(depth * height * width, hidden)
        self.head = nn.Linear(hidden, num_values)

    def forward(self, x: Tensor) -> Tensor:
        features = self.features(F.pixel_unshuffle(x, self.patch))
        hidden = F.silu(self.hidden(features.flatten(1)))
        # bfloat16 resolves 0.06 at an energy of 10: the head works in float32.
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(hidden.float(), self.head.weight.float(), self.head.bias.float())
