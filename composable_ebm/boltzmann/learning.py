"""Learning of a Boltzmann machine: pair statistics with data clamped, less those of the machine alone."""

from __future__ import annotations

import torch
from torch import Tensor

from composable_ebm.boltzmann.machine import BoltzmannMachine
from composable_ebm.sampling.chain import Chain
from composable_ebm.sampling.gibbs import Gibbs
from composable_ebm.sampling.kernel import Noise

__all__ = ["BoltzmannLearning"]


class BoltzmannLearning:
    """Maximum likelihood with persistent chains in both phases.

        ∂ mean log p(v)/∂wᵢₖ = ⟨sᵢsₖ⟩ clamped - ⟨sᵢsₖ⟩ free

    Clamped: one chain for each case of the data, which moves its hidden units alone. Free: chains
    that move all units. Both go on where the last iteration left them, as the machine changes
    little between iterations.

    Args:
        machine: Learns in place.
        data: Visible states, (cases, visible), of bits.
        num_chains: Free chains.
        clamped_sweeps: Sweeps of the clamped chains an iteration.
        free_sweeps: Sweeps of the free chains an iteration.
        seed: Seeds all chains.
    Raises:
        ValueError: If the data are no bits of the machine's visible units.
    Example:
        >>> learning = BoltzmannLearning(machine, bars_and_stripes(3).flatten(1))
        >>> for i in range(2000):
        ...     learning.step(0.2 / (1 + i / 500))
    Reference:
        Ackley, Hinton and Sejnowski (1985), eq. 8; Tieleman (2008) and Neal (1992), Connectionist
        learning of belief networks, for chains that persist.
    """

    def __init__(
        self,
        machine: BoltzmannMachine,
        data: Tensor,
        *,
        num_chains: int = 100,
        clamped_sweeps: int = 5,
        free_sweeps: int = 5,
        seed: int = 0,
    ) -> None:
        if data.ndim != 2 or data.shape[1] != machine.visible or not ((data == 0) | (data == 1)).all():
            raise ValueError(
                f"`data` must be bits of shape (cases, {machine.visible}), got {tuple(data.shape)} between "
                f"{float(data.min()):g} and {float(data.max()):g}."
            )
        self.machine = machine
        self.sweeps = (clamped_sweeps, free_sweeps)
        device = machine.biases.device
        generator = torch.Generator(device).manual_seed(seed)
        data = data.to(machine.biases)

        def coins(rows: int, units: int) -> Tensor:
            return torch.randint(2, (rows, units), generator=generator, device=device).to(data)

        clamped = torch.cat([data, coins(len(data), machine.hidden)], dim=1)
        free = coins(num_chains, machine.visible + machine.hidden)
        self._clamped, self._free = (
            Chain(machine, x, Gibbs(), Noise((generator, len(x))), mask=mask, record=False)
            for x, mask in ((clamped, machine.visible_mask()), (free, None))
        )

    @property
    def chains(self) -> Tensor:
        """The free chains, (num_chains, units)."""
        return self._free.x

    @torch.no_grad()
    def gradient(self) -> tuple[Tensor, Tensor]:
        """Ascent directions of the biases (units,) and couplings (pairs,), after new sweeps."""
        clamped = self.machine.statistics(self._clamped.advance(self.sweeps[0]))
        free = self.machine.statistics(self._free.advance(self.sweeps[1]))
        return clamped[0] - free[0], clamped[1] - free[1]

    @torch.no_grad()
    def step(self, learning_rate: float, decay: float = 0.0) -> None:
        """One ascent on the likelihood.

        Args:
            learning_rate: In nats squared per iteration.
            decay: Pull of the couplings towards zero, as a share of them.
        """
        biases, couplings = self.gradient()
        self.machine.biases.add_(learning_rate * biases)
        self.machine.couplings.add_(learning_rate * (couplings - decay * self.machine.couplings))
