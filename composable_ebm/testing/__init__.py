"""The contracts that energies and kernels keep, for whoever writes one of their own.

    def test_my_energy():
        check_energy(MyEnergy(), torch.randn(6, 3, 32, 32))

    def test_my_kernel():
        check_kernel(MyKernel(step_size=0.3))

Each rule of a contract is a function of its own in `ENERGY_RULES` and `KERNEL_RULES`; what is broken is
raised as a `ContractError` that names the rule, the energy or kernel, and the numbers. The energies and
kernels of this package are held to the same rules.

Reference:
    gpytorch, `test/base_kernel_test_case.py`, for a contract test that ships.
"""

from __future__ import annotations

import torch
from torch import Tensor

from composable_ebm.energy import Energy
from composable_ebm.testing.energies import ENERGY_RULES
from composable_ebm.testing.kernels import KERNEL_RULES, Sampler
from composable_ebm.testing.rule import ContractError

__all__ = ["ENERGY_RULES", "KERNEL_RULES", "ContractError", "check_energy", "check_kernel"]


def check_energy(energy: Energy, x: Tensor, *, noise_level: float = 0.5, tolerance: float = 1e-3) -> None:
    """Holds an energy to its contract.

    Args:
        energy: Any.
        x: States to ask it at, (batch, *event), at least two of them, different from each other.
        noise_level: A noise level, in data units, that a noise-conditioned energy is asked at as well.
        tolerance: Of comparisons, relative and absolute, in nats and nats per data unit.
    Raises:
        ContractError: If a rule is broken; the message names it.
        ValueError: If there are fewer than two states.
    """
    if len(x) < 2:
        raise ValueError(f"`x` must hold at least two states, got {len(x)}.")
    levels = (None, torch.tensor(noise_level, dtype=x.dtype)) if energy.noise_conditioned else (None,)
    for rule in ENERGY_RULES.values():
        for level in levels:
            rule(energy, x, level, tolerance)


def check_kernel(sampler: Sampler, *, variance: float | None = 1.0) -> None:
    """Holds a kernel to its contract, on a Gaussian of the plane, or on three bits for kernels of bits.

    Args:
        sampler: A kernel, or an annealed one whose curves stand still.
        variance: Of its stationary states, as a multiple of what exp(-E/T) has on N(0.3, ½ I): 1 for kernels
            that are exact, 1/(1 - η) for Langevin steps of size η. None for kernels of bits, which are held
            to all frequencies.
    Raises:
        ContractError: If a rule is broken; the message names it.
    """
    for rule in KERNEL_RULES.values():
        rule(sampler, variance)
