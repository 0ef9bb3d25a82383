"""Differences of log normalising constants, and mixtures whose proportions are right.

Energies know no Z, so `a | b` draws from a and b in unknown proportions. The ratio Z_b/Z_a can be
estimated: walk chains from a to b along E_λ = (1-λ) E_a + λ E_b and add up the work

    W = Σ_k (λ_{k+1} - λ_k) (E_b(x_k) - E_a(x_k)),      log Z_b/Z_a = log mean exp(-W),

which is annealed importance sampling. Walking back as well gives works W' of the reverse, and
Bennett's acceptance ratio combines both: ΔF = -log Z_b/Z_a solves

    Σ σ(ΔF - W) = Σ σ(-ΔF - W').

Reference:
    Neal (2001), Annealed importance sampling, arXiv physics/9803008.
    Bennett (1976), Efficient estimation of free energy differences from Monte Carlo data, eq. 12.
    Crooks (2000), arXiv cond-mat/9908420, for works of walks in place of energy differences.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from composable_ebm.analytic import Analytic
from composable_ebm.energy import Energy, Mixture, Sum
from composable_ebm.sampling.engine import Chain, Sampler
from composable_ebm.sampling.kernel import Kernel, Noise
from composable_ebm.sampling.sample import sample

BOOTSTRAPS = 100

__all__ = ["LogZDifference", "calibrate", "log_z_difference"]


@dataclass(frozen=True)
class LogZDifference:
    """An estimate of log Z_b - log Z_a in nats.

    Attributes:
        value: Bennett's estimate.
        error: Its standard error, by the bootstrap over chains; blind to chains that never mixed.
        forward: The estimate of the walks from a to b alone.
        backward: The estimate of the walks from b to a alone. Both differ much where walks are too short.
    """

    value: float
    error: float
    forward: float
    backward: float


def log_z_difference(
    a: Energy,
    b: Energy,
    sampler: Kernel,
    *,
    num_chains: int = 256,
    num_levels: int = 200,
    steps_per_level: int = 1,
    burn_in: int = 500,
    init: Tensor | None = None,
    seed: int = 0,
) -> LogZDifference:
    """log Z_b - log Z_a of exp(-E_a) and exp(-E_b), by walks between them in both directions.

    Args:
        a: Where walks start.
        b: Where they end.
        sampler: A kernel that leaves exp(-E) invariant at temperature 1: MALA or HMC.
        num_chains: Walks in each direction.
        num_levels: Values of λ.
        steps_per_level: Steps of the kernel at each.
        burn_in: Steps before a walk starts, where exact samples cannot be drawn.
        init: States that the burn-in starts from, (num_chains, *event); see `sample`.
        seed: Seeds everything.
    Raises:
        ValueError: If the kernel is not at temperature 1.
    """
    if sampler.implied_temperature != 1:
        raise ValueError(
            "normalising constants are those of exp(-E): use a kernel at temperature 1, got "
            f"{sampler.implied_temperature:.3g}. Energies calibrated at T are E/T here."
        )
    generator = torch.Generator().manual_seed(seed)

    def works(start: Energy, end: Energy) -> Tensor:
        x = _samples(start, sampler, num_chains, burn_in, init, generator)
        path = Sum([start, end], [1.0, 0.0])
        first, last = path.coefficients.to(x), Sum([start, end], [0.0, 1.0]).coefficients.to(x)
        chain = Chain(path, x, sampler, Noise((generator, num_chains)), coefficients=first, record=False)
        work = x.new_zeros(num_chains)
        for level in range(num_levels):
            with torch.no_grad():
                leaves = chain.potential.plan(chain.x, None)
                step = path.combine(leaves, last) - path.combine(leaves, first)
            work = work + step / num_levels
            chain.coefficients = torch.lerp(first, last, (level + 1) / num_levels)
            chain.advance(steps_per_level)
        return work.double()

    forward, backward = works(a, b), works(b, a)
    draws = [
        _bennett(
            *(w[torch.randint(num_chains, (num_chains,), generator=generator)] for w in (forward, backward))
        )
        for _ in range(BOOTSTRAPS)
    ]
    return LogZDifference(
        value=_bennett(forward, backward),
        error=float(torch.tensor(draws).std()),
        forward=_log_mean_exp(-forward),
        backward=-_log_mean_exp(-backward),
    )


def calibrate(mixture: Mixture, sampler: Kernel, **options) -> Mixture:
    """The mixture with estimated log Zᵢ, so that its weights are the proportions of its components.

    Args:
        mixture: An OR of energies.
        sampler: See `log_z_difference`.
        options: The other arguments of `log_z_difference`.
    Example:
        >>> half_and_half = calibrate(smile | glasses, MALA(step_size=1e-4))
    """
    if not isinstance(mixture, Mixture):
        raise TypeError(
            f"only a mixture has proportions to calibrate, got {type(mixture).__name__} {mixture}."
        )
    first, *others = mixture.operands
    log_z = [0.0, *(log_z_difference(first, other, sampler, **options).value for other in others)]
    return Mixture(mixture.operands, mixture.weights, log_z)


def _samples(
    energy: Energy,
    sampler: Sampler,
    num_chains: int,
    burn_in: int,
    init: Tensor | None,
    generator: torch.Generator,
) -> Tensor:
    if isinstance(energy, Analytic):
        return energy.draw(num_chains, generator)
    options = {"num_chains": num_chains} if init is None else {"init": init}
    return sample(energy, num_steps=burn_in, sampler=sampler, generator=generator, **options).samples


def _log_mean_exp(values: Tensor) -> float:
    return float(torch.logsumexp(values, 0) - torch.tensor(float(len(values))).log())


def _bennett(forward: Tensor, backward: Tensor) -> float:
    """log Z_b/Z_a from the works of equally many walks in both directions, by bisection."""
    ends = torch.cat([forward, -backward])
    low, high = float(ends.min()) - 1, float(ends.max()) + 1  # of ΔF
    for _ in range(80):
        middle = (low + high) / 2
        excess = torch.sigmoid(middle - forward).sum() - torch.sigmoid(-middle - backward).sum()
        low, high = (low, middle) if excess > 0 else (middle, high)
    return -(low + high) / 2
