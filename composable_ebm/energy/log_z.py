"""A normalising constant for each noise level, as an energy: it is the same for all states."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
import torch
from torch import Tensor

from composable_ebm.energy import Energy

__all__ = ["LogZ"]


class LogZ(Energy):
    """log Z(σ), the same for all states: added to an energy it normalises it at each noise level.

    Between levels it is linear in log σ; without a noise level it is that of the lowest one.

    Args:
        levels: Noise levels, falling.
        log_z: In nats, as many, up to what all components of a mixture share.
    Raises:
        ValueError: If levels do not fall or are not positive, or numbers are not as many or not finite.
    """

    noise_conditioned = True

    def __init__(self, levels: Sequence[float], log_z: Sequence[float]) -> None:
        super().__init__()
        sigmas, constants = (torch.tensor(list(each), dtype=torch.float32) for each in (levels, log_z))
        if len(sigmas) != len(constants) or not len(sigmas):
            raise ValueError(
                f"each level needs one log Z, got {len(sigmas)} levels and {len(constants)} values."
            )
        if not (sigmas > 0).all() or not (sigmas.diff() < 0).all() or not sigmas.isfinite().all():
            raise ValueError(f"`levels` must be positive and fall, got {levels}.")
        if not constants.isfinite().all():
            raise ValueError(f"`log_z` must be finite, got {log_z}.")
        self._text = f"levels=[{_text(sigmas)}], values=[{_text(constants)}]"
        self.log_levels: Tensor
        self.log_z: Tensor
        self.register_buffer("log_levels", sigmas.log().flip(0))  # rising, as searchsorted needs
        self.register_buffer("log_z", constants.flip(0).clone())

    @property
    def key(self) -> Hashable:
        return ("log_z", self._text)

    def energy(self, x: Tensor, noise_level: Tensor | None = None) -> Tensor:
        if noise_level is None or len(self.log_z) == 1:
            return self.log_z[0].expand(len(x))
        at = noise_level.log().clamp(self.log_levels[0], self.log_levels[-1])
        above = torch.searchsorted(self.log_levels, at).clamp(1, len(self.log_levels) - 1)
        low, high = self.log_levels[above - 1], self.log_levels[above]
        return torch.lerp(self.log_z[above - 1], self.log_z[above], (at - low) / (high - low)).expand(len(x))

    def __str__(self) -> str:
        return self.name or f"log_z({self._text})"


def _text(values: Tensor) -> str:
    """The shortest numbers that read back as the same ones of 32 bits."""
    return ", ".join(np.format_float_positional(v, unique=True, trim="-") for v in values.numpy())
