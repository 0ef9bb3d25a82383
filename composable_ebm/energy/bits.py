"""Energies of bits: any energy asked about black and white, and all states of a few bits."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor
from torch.nn import functional as F

from composable_ebm.energy import Energy

MAX_BITS = 22

__all__ = ["bit_states", "log_pseudo_likelihood", "on_bits"]


class _OnBits(Energy):
    """E(low + (high - low) x) of bits x."""

    shares = ("inner",)

    def __init__(self, inner: Energy, low: float, high: float) -> None:
        super().__init__()
        self.inner = inner
        self.low, self.high = low, high
        self.event_shape = inner.event_shape
        self.data_range = (0.0, 1.0)
        self.energy_range = inner.energy_range
        self.noise_conditioned = inner.noise_conditioned
        self.has_value = inner.has_value
        self.binary = True

    def energy(self, x: Tensor, noise_level: Tensor | None = None) -> Tensor:
        return self.inner(self.low + (self.high - self.low) * x, noise_level=noise_level)

    @property
    def key(self) -> Hashable:
        return ("on_bits", self.inner.key, self.low, self.high)

    def __str__(self) -> str:
        return self.name or f"on_bits({self.inner})"


def on_bits(energy: Energy) -> Energy:
    """An energy of real states restricted to the two ends of its range, as an energy of bits:

        E'(x) = E(low + (high - low) x),   x in {0, 1}

    so that it composes with energies of bits. Its gradient is still there, as a function of real x
    (the relaxation), and `DMALA` follows it from bit to bit.

    Args:
        energy: Any energy; without a data range, 0 and 1 are taken as they are.
    Example:
        >>> three = rbm + 5 * on_bits(digit[3])
        >>> sample(three, sampler=DMALA(step_size=0.2))
    Reference:
        Grathwohl et al. (2021), arXiv 2102.04509, section 3, for gradients of discrete energies.
    """
    if not isinstance(energy, Energy):
        raise TypeError(f"`energy` must be an Energy, got {type(energy).__name__}; wrap it by from_callable.")
    if energy.binary:
        return energy
    low, high = energy.data_range or (0.0, 1.0)
    return _OnBits(energy, low, high)


@torch.no_grad()
def log_pseudo_likelihood(energy: Energy, x: Tensor) -> Tensor:
    """Σᵢ log p(xᵢ | all other bits) in nats, (batch,): how well an energy tells each bit from the rest.

        log p(xᵢ | x₋ᵢ) = -log(1 + exp(E(x) - E(x with bit i flipped)))

    No log Z is needed. Every bit is flipped, where scikit-learn's `BernoulliRBM` takes one at random.

    Args:
        energy: Any energy of bits.
        x: States, (batch, *event).
    Reference:
        Besag (1975), Statistical analysis of non-lattice data.
    """
    total = []
    for state, own in zip(x, energy(x), strict=True):
        flat = state.flatten()
        flipped = flat.repeat(len(flat), 1)
        flipped.diagonal().copy_(1 - flat)
        total.append(-F.softplus(own - energy(flipped.reshape(-1, *state.shape))).sum())
    return torch.stack(total)


def bit_states(count: int, device: torch.device | str = "cpu") -> Tensor:
    """All states of a few bits, (2^count, count), for sums that enumeration can still do.

    Raises:
        ValueError: If there are more than 22 bits.
    """
    if not 0 <= count <= MAX_BITS:
        raise ValueError(f"all states of at most {MAX_BITS} bits can be listed, got {count}.")
    index = torch.arange(2**count, device=device)
    return ((index[:, None] >> torch.arange(count, device=device)) & 1).to(torch.get_default_dtype())
