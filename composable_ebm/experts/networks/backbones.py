"""What a Gaussian lacks, learned: networks from a state seen in a ball, and its noise level, to h and logits.

`ConfinedEnergy` names them:

    "perceptron"    every unit sees the whole state, each number by weights of its own
    "mixer"         places share weights: patches are tokens, which exchange and think in turn
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from composable_ebm.experts.networks.skeleton import frequencies

GROUPS = 8
"""Groups of channels of a mixer, each with a matrix over places of its own."""

__all__ = ["BACKBONES", "Backbone", "PatchMixer", "Perceptron"]


class Backbone(nn.Module):
    """From (v, σ) to (h, logits); with its head for values and what it makes of a noise level.

    Args:
        modulations: Gains and biases of all layers together, which the noise level gives.
        hidden: Numbers of `features`.
        num_values: Logits; none for 1.
    """

    in_places = False
    """Whether v and h are in the state's own coordinates, instead of the data's principal components."""

    def __init__(self, modulations: int, hidden: int, num_values: int) -> None:
        super().__init__()
        self.frequencies: Tensor
        self.register_buffer("frequencies", frequencies())
        self.embed = nn.Linear(32, 64)
        self.modulate = nn.Linear(64, modulations)
        self.choose = nn.Linear(hidden, num_values) if num_values > 1 else None
        for head in (self.modulate, *([] if self.choose is None else [self.choose])):
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)

    def modulation(self, sigma: Tensor) -> Tensor:
        """(batch, modulations) at levels (batch,)."""
        waves = sigma.log()[:, None] * self.frequencies
        return self.modulate(F.silu(self.embed(torch.cat([waves.sin(), waves.cos()], dim=1))))

    def features(self, v: Tensor, sigma: Tensor) -> Tensor:
        """What logits are read from, (batch, hidden)."""
        raise NotImplementedError

    def forward(self, v: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor | None]:
        raise NotImplementedError


class Perceptron(Backbone):
    """Residual layers over the whole state, each gained and biased by the noise level.

    Args:
        event_shape: Shape of one state.
        num_values: Logits; none for 1.
        hidden: Units of each hidden layer.
        layers: Hidden layers.
    """

    def __init__(self, event_shape: Sequence[int], num_values: int, hidden: int, layers: int) -> None:
        super().__init__(2 * hidden * layers, hidden, num_values)
        size = math.prod(event_shape)
        self.enter = nn.Linear(2 * size, hidden)
        self.middle = nn.ModuleList([nn.Linear(hidden, hidden) for _ in range(layers - 1)])
        self.leave = nn.Linear(hidden, size)
        for layer in (self.enter, *self.middle):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")
            layer.weight.data.mul_(1.4)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def features(self, v: Tensor, sigma: Tensor) -> Tensor:
        """The last hidden layer, (batch, hidden)."""
        parts = self.modulation(sigma).chunk(2 * (len(self.middle) + 1), dim=1)
        h = F.silu(self.enter(v) * (1 + parts[0]) + parts[1])
        for layer, gain, bias in zip(self.middle, parts[2::2], parts[3::2], strict=True):
            h = h + F.silu(layer(h) * (1 + gain) + bias)
        return h

    def forward(self, v: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor | None]:
        h = self.features(v, sigma)
        return self.leave(h), None if self.choose is None else self.choose(h)


class PatchMixer(Backbone):
    """Patches of 2x2 as tokens: in each block a fixed mixing over places, then layers that all places share.

        t ← t + W₂ silu(gain ⊙ W₁(t + M t) + bias),       M one matrix over places for each group of channels

    Before the first block each token is told what a layer that sees the whole state makes of it, by weights
    of its place. A state is a picture or a grid of latents.

    Args:
        event_shape: (channels, height, width) of one state; patches are one cell where a side is odd.
        num_values: Logits; none for 1.
        hidden: Channels of a token, divisible by 8; a block has twice as many units.
        layers: Blocks.
    Raises:
        ValueError: If states have no places, or channels do not divide into groups.
    Reference:
        Tolstikhin et al. (2021), MLP-Mixer, arXiv 2105.01601, for layers that alternate so.
    """

    in_places = True

    def __init__(self, event_shape: Sequence[int], num_values: int, hidden: int, layers: int) -> None:
        if len(event_shape) != 3 or hidden % GROUPS:
            raise ValueError(
                "a mixer needs states of shape (channels, height, width) and channels of a token divisible "
                f"by {GROUPS}, got {tuple(event_shape)} and hidden = {hidden}; a perceptron takes any."
            )
        super().__init__(2 * hidden * (2 * layers + 1), hidden, num_values)
        channels, height, width = event_shape
        patch = 1 if height % 2 or width % 2 else 2
        tokens, cells = (height // patch) * (width // patch), channels * patch**2
        self.event_shape, self.patch = tuple(event_shape), patch
        self.enter = nn.Linear(2 * cells, hidden)
        self.see = nn.Linear(2 * channels * height * width, hidden)
        self.tell = nn.Linear(hidden, tokens * hidden)
        self.places = nn.ParameterList(
            [nn.Parameter(0.7 * tokens**-0.5 * torch.randn(GROUPS, tokens, tokens)) for _ in range(layers)]
        )
        self.widen = nn.ModuleList([nn.Linear(hidden, 2 * hidden) for _ in range(layers)])
        self.narrow = nn.ModuleList([nn.Linear(2 * hidden, hidden) for _ in range(layers)])
        self.leave = nn.Linear(hidden, cells)
        for layer in (self.enter, self.see, *self.widen):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")
        for layer in (self.tell, *self.narrow):
            layer.weight.data.mul_(0.5)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def _tokens(self, v: Tensor) -> Tensor:
        """(batch, tokens, 2 · channels · patch²) of states side by side, (batch, 2 · size)."""
        channels, height, width = self.event_shape
        rows, columns, side = height // self.patch, width // self.patch, self.patch
        parts = v.reshape(-1, 2 * channels, rows, side, columns, side).permute(0, 2, 4, 1, 3, 5)
        return parts.reshape(-1, rows * columns, 2 * channels * side**2)

    def _state(self, tokens: Tensor) -> Tensor:
        """(batch, size) of tokens (batch, tokens, channels · patch²)."""
        channels, height, width = self.event_shape
        rows, columns, side = height // self.patch, width // self.patch, self.patch
        parts = tokens.reshape(-1, rows, columns, channels, side, side).permute(0, 3, 1, 4, 2, 5)
        return parts.reshape(-1, channels * height * width)

    def _thought(self, v: Tensor, sigma: Tensor) -> Tensor:
        """The tokens after the last block, (batch, tokens, hidden)."""
        hidden = self.enter.out_features
        first, *rest = self.modulation(sigma).split([2 * hidden, *[4 * hidden] * len(self.widen)], dim=1)
        gain, bias = first.chunk(2, dim=1)
        told = self.tell(F.silu(self.see(v) * (1 + gain) + bias))
        t = self.enter(self._tokens(v)) + told.reshape(len(v), -1, hidden)
        count = t.shape[1]
        for mixing, widen, narrow, part in zip(self.places, self.widen, self.narrow, rest, strict=True):
            groups = t.reshape(-1, count, GROUPS, hidden // GROUPS).transpose(1, 2)
            mixed = torch.matmul(mixing, groups).transpose(1, 2).reshape(-1, count, hidden)
            gain, bias = part[:, None].chunk(2, dim=2)
            t = t + narrow(F.silu(widen(t + mixed) * (1 + gain) + bias))
        return t

    def features(self, v: Tensor, sigma: Tensor) -> Tensor:
        """The mean over all places of what was thought there, (batch, hidden)."""
        return self._thought(v, sigma).mean(1)

    def forward(self, v: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor | None]:
        t = self._thought(v, sigma)
        return self._state(self.leave(t)), None if self.choose is None else self.choose(t.mean(1))


BACKBONES: dict[str, type[Perceptron | PatchMixer]] = {"perceptron": Perceptron, "mixer": PatchMixer}
"""The networks that a card may name, for `ConfinedEnergy`."""
