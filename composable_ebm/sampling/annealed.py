"""A kernel that follows a schedule."""

from __future__ import annotations

from dataclasses import dataclass

from composable_ebm.sampling.kernel import Kernel
from composable_ebm.sampling.schedule import Schedule

__all__ = ["Annealed"]


@dataclass(frozen=True)
class Annealed:
    """Runs `kernel` while temperature, noise level or step size move along `schedule`.

    With constant curves at 1 it is `kernel` itself. Where the kernel has a `target_acceptance`,
    its step size adapts at every level but the last, which runs at the step size found.

    Noise-conditioned energies take the noise level of the step; all others ignore it. Summed
    energies at a noise level above 0 are not the diffused energy of the sum: they are a path that
    ends in the right place, along which kernels that adjust (MALA, HMC) keep up best.

    Args:
        kernel: Any kernel.
        schedule: The curves to follow.
    Example:
        >>> schedule = Schedule(noise_level=geometric(1.0, 0.01), num_levels=100)
        >>> sample(product, num_steps=1000, sampler=Annealed(HMC(0.1, num_leapfrog=3), schedule))
    Reference:
        Song and Ermon (2019), arXiv 1907.05600, algorithm 1; Du et al. (2023), Reduce, reuse,
        recycle, arXiv 2302.11552, algorithm 1, for annealed MCMC on composed energies.
    """

    kernel: Kernel
    schedule: Schedule

    def __str__(self) -> str:
        return f"{self.kernel}, {self.schedule}"
