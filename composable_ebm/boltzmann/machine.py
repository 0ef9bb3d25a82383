"""The Boltzmann machine: binary units, each coupled to any other.

    E(v, h) = -½ (vᵀLv + hᵀJh + 2 vᵀWh) - bᵀv - cᵀh

L, J symmetric with zero diagonals, units in {0, 1}. The factor ½ counts each pair of a layer once,
since vᵀLv holds it twice, and vᵀWh holds each pair once; so every coupling is the energy that its
two units save by both being on, Lᵢₖ, Jⱼₗ and Wᵢⱼ alike, and each has the same gradient,
⟨sᵢsⱼ⟩ clamped - ⟨sᵢsⱼ⟩ free. The textbook's form, E(s) = -Σ_{i<k} wᵢₖ sᵢsₖ - Σ θᵢ sᵢ over all units
s = (v, h), is this one with w = [[L, W], [Wᵀ, J]]; both are kept here as one vector of pairs i < k.
The diagonal would only repeat the biases, as s² = s.

Reference:
    Ackley, Hinton and Sejnowski (1985), A learning algorithm for Boltzmann machines, eq. 1;
    Salakhutdinov and Hinton (2009), Deep Boltzmann machines, eq. 1 to 3.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from composable_ebm.energy import Energy
from composable_ebm.energy.bits import bit_states
from composable_ebm.energy.conditionals import Conditionals

__all__ = ["BoltzmannMachine"]


class BoltzmannMachine(Energy):
    """The energy of all units s = (v, h), states (batch, visible + hidden) of bits.

    Hidden units are part of the state: `Gibbs` draws every unit in turn from σ(θᵢ + Σₖ wᵢₖ sₖ). Given
    data is clamped by a mask that holds the visible units. Small by nature: what sums over all
    states enumerates them, and refuses more than 22 units.

    Args:
        visible: Number of visible units.
        hidden: Number of hidden units.
        lateral: Whether units of one layer are coupled. Without, L = J = 0 and it is an RBM, whose
            layers Gibbs sampling draws as two blocks.
        scale: Standard deviation of the initial couplings, in nats.
    Example:
        >>> machine = BoltzmannMachine(9, 6)
        >>> out = sample(machine, num_chains=100, num_steps=50, sampler=Gibbs())
        >>> images = out.samples[:, :9].reshape(-1, 1, 3, 3)
    """

    def __init__(self, visible: int, hidden: int, lateral: bool = True, scale: float = 0.1) -> None:
        super().__init__()
        if visible < 1 or hidden < 0:
            raise ValueError(f"a machine needs a visible unit, got {visible} visible and {hidden} hidden.")
        self.visible, self.hidden, self.lateral = visible, hidden, lateral
        units = visible + hidden
        pairs = torch.triu_indices(units, units, offset=1)
        if not lateral:
            pairs = pairs[:, (pairs[0] < visible) & (pairs[1] >= visible)]
        self.pairs: Tensor
        self.register_buffer("pairs", pairs)
        self.couplings = nn.Parameter(scale * torch.randn(pairs.shape[1]))
        self.biases = nn.Parameter(torch.zeros(units))
        self.event_shape = (units,)
        self.data_range = (0.0, 1.0)
        self.binary = True

    @property
    def coupling(self) -> Tensor:
        """w = [[L, W], [Wᵀ, J]], (units, units), symmetric with zero diagonal."""
        upper = self.couplings.new_zeros(len(self.biases), len(self.biases))
        upper = upper.index_put(tuple(self.pairs), self.couplings)
        return upper + upper.mT

    def conditionals(self) -> Conditionals:
        units = range(len(self.biases))
        groups = tuple(units) if self.lateral else tuple(int(i >= self.visible) for i in units)
        return Conditionals(self.biases, coupling=self.coupling, groups=groups)

    def energy(self, x: Tensor, noise_level: Tensor | None = None) -> Tensor:
        return self.conditionals().energy(x)

    def visible_mask(self) -> Tensor:
        """For sampling the hidden units given the visible ones: 0 for visible, 1 for hidden, (units,)."""
        return (torch.arange(len(self.biases), device=self.biases.device) >= self.visible).to(self.biases)

    def statistics(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """⟨sᵢ⟩, (units,), and ⟨sᵢsₖ⟩ of the coupled pairs, (pairs,), over states (batch, units)."""
        return s.mean(0), (s.mT @ s / len(s))[tuple(self.pairs)]

    # -- by enumeration ----------------------------------------------------------------------------

    def log_z(self) -> Tensor:
        """log Σ_s exp(-E(s)), (), over all states of all units."""
        states = bit_states(len(self.biases), self.biases.device).to(self.biases)
        return torch.logsumexp(-self.energy(states), 0)

    def free_energy(self, v: Tensor) -> Tensor:
        """F(v) = -log Σ_h exp(-E(v, h)), (batch,), of visible states (batch, visible), over all h."""
        hidden = bit_states(self.hidden, v.device).to(v)
        s = torch.cat([v[:, None].expand(-1, len(hidden), -1), hidden.expand(len(v), -1, -1)], dim=2)
        energies = self.energy(s.flatten(0, 1)).reshape(len(v), len(hidden))
        return -torch.logsumexp(-energies, 1)

    def log_likelihood(self, v: Tensor) -> Tensor:
        """log p(v), (batch,), of visible states (batch, visible): exact, differentiable."""
        return -self.free_energy(v) - self.log_z()
