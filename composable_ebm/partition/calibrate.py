"""Differences of log normalising constants, and mixtures whose proportions are right.

Energies know no Z, so `a | b` draws from a and b in unknown proportions. The ratio Z_b/Z_a can be
estimated: walk chains from a to b along E_λ = (1-λ) E_a + λ E_b and add up the work

    W = Σ_k (λ_{k+1} - λ_k) (E_b(x_k) - E_a(x_k)),      log Z_b/Z_a = log mean exp(-W),

which is annealed importance sampling. Walking back as well gives works W' of the reverse, and
Bennett's acceptance ratio combines both: ΔF = -log Z_b/Z_a solves

    Σ σ(ΔF - W) = Σ σ(-ΔF - W').

Noise-conditioned energies have a Z at every noise level σ. A diffused mixture is the mixture of the
diffused components in the same proportions,

    (w_a p_a + w_b p_b) * N(0, σ² I) = w_a (p_a * N(0, σ² I)) + w_b (p_b * N(0, σ² I)),

and chains choose their component early, at high noise, where components overlap. So an annealed mixture
needs Z_b(σ)/Z_a(σ) at every level, and there needs no walks: chains of each component, at each level on
their way, give W = E_b(x, σ) - E_a(x, σ) under a and W' = E_a - E_b under b. Where components no longer
overlap the ratio is loose, and nothing hangs on it.

Reference:
    Neal (2001), Annealed importance sampling, arXiv physics/9803008.
    Bennett (1976), Efficient estimation of free energy differences from Monte Carlo data, eq. 12.
    Crooks (2000), arXiv cond-mat/9908420, for works of walks in place of energy differences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from composable_ebm.energy import Energy, Mixture, Sum, carrier, require_values
from composable_ebm.energy.analytic import Analytic
from composable_ebm.energy.log_z import LogZ
from composable_ebm.energy.weights import coefficient_type
from composable_ebm.sampling.annealed import Annealed
from composable_ebm.sampling.block import Sampler
from composable_ebm.sampling.chain import Chain
from composable_ebm.sampling.kernel import Kernel, Noise
from composable_ebm.sampling.particles import Particles
from composable_ebm.sampling.sample import sample

BOOTSTRAPS = 100

__all__ = ["LogZDifference", "calibrate", "log_z_difference", "log_z_over_noise"]


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
    require_values("log Z is estimated from energies", [a, b])
    if sampler.implied_temperature != 1:
        raise ValueError(
            "normalising constants are those of exp(-E): use a kernel at temperature 1, got "
            f"{sampler.implied_temperature:.3g}. Energies calibrated at T are E/T here."
        )
    generator = torch.Generator().manual_seed(seed)

    def works(start: Energy, end: Energy) -> Tensor:
        x = _samples(start, sampler, num_chains, burn_in, init, generator)
        path, ended = Sum([start, end], [1.0, 0.0]), Sum([start, end], [0.0, 1.0])
        x = x.to(path.state_dtype or x.dtype)
        first, last = (each.coefficients.to(x.device, coefficient_type(x)) for each in (path, ended))
        chain = Chain(path, x, sampler, Noise((generator, num_chains)), coefficients=first, record=False)
        work = torch.zeros(num_chains, dtype=torch.float64, device=x.device)
        for level in range(num_levels):
            with torch.no_grad():
                leaves = chain.potential.plan(chain.x, None)
                step = path.combine(leaves, last) - path.combine(leaves, first)
            work = work + step / num_levels
            chain.coefficients = torch.lerp(first, last, (level + 1) / num_levels)
            chain.advance(steps_per_level)
        return work

    return from_works(works(a, b), works(b, a), generator)


def from_works(forward: Tensor, backward: Tensor, generator: torch.Generator) -> LogZDifference:
    """log Z_b - log Z_a from the works of equally many walks from a to b and from b to a, (walks,)."""
    count = len(forward)
    draws = [
        _bennett(*(w[torch.randint(count, (count,), generator=generator)] for w in (forward, backward)))
        for _ in range(BOOTSTRAPS)
    ]
    return LogZDifference(
        value=_bennett(forward, backward),
        error=float(torch.tensor(draws).std()),
        forward=_log_mean_exp(-forward),
        backward=-_log_mean_exp(-backward),
    )


def calibrate(mixture: Mixture, sampler: Sampler, **options) -> Mixture:
    """The mixture with estimated log Zᵢ, so that its weights are the proportions of its components.

    Args:
        mixture: An OR of energies.
        sampler: A kernel, see `log_z_difference`; `Particles`, where one density carries all components;
            or a kernel annealed over noise levels, for noise-conditioned energies, with which the mixture
            is then to be sampled.
        options: The other arguments of `log_z_difference`, of `sample`, or of `log_z_over_noise`.
    Example:
        >>> half_and_half = calibrate(smile | glasses, MALA(step_size=1e-4))
        >>> sampler, num_steps = calibrated_sampler(digit[3])
        >>> either = calibrate(digit[3] | digit[8], sampler, num_steps=num_steps)
    """
    if not isinstance(mixture, Mixture):
        raise TypeError(
            f"only a mixture has proportions to calibrate, got {type(mixture).__name__} {mixture}."
        )
    if isinstance(sampler, Particles):
        one = {carrier(component).key for component in mixture.operands}
        if len(one) > 1:
            raise ValueError(f"the components of {mixture} are carried by several densities; give a kernel.")
        runs = [sample(component, sampler=sampler, **options) for component in mixture.operands]
        return Mixture(mixture.operands, mixture.weights, [run.log_probability for run in runs])
    if isinstance(sampler, Annealed):
        levels, log_z = log_z_over_noise(mixture.operands, sampler, **options)
        normalised = [
            e + LogZ(levels.tolist(), z.tolist())
            for e, z in zip(mixture.operands, log_z.unbind(1), strict=True)
        ]
        return Mixture(normalised, mixture.weights)
    first, *others = mixture.operands
    differences = [0.0, *(log_z_difference(first, other, sampler, **options).value for other in others)]
    return Mixture(mixture.operands, mixture.weights, differences)


def log_z_over_noise(
    energies: Sequence[Energy],
    sampler: Annealed,
    *,
    num_steps: int,
    num_chains: int = 256,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """log Zᵢ(σ) - log Z₀(σ) of noise-conditioned energies, at every noise level of a sampler.

    Args:
        energies: E₀, E₁, ...
        sampler: Annealed over noise levels; chains of each energy run by it from noise.
        num_steps: Steps of those chains.
        num_chains: Chains of each energy.
        seed: Seeds everything.
    Returns:
        Noise levels from high to low, (levels,), and the differences in nats, (levels, energies).
    Raises:
        ValueError: If the sampler is not annealed over noise levels, or an energy takes none.
    """
    require_values("log Z is estimated from energies", energies)
    if sampler.schedule.noise_level is None:
        raise ValueError(
            "log Z over noise needs a sampler annealed over noise levels; at one energy use a kernel."
        )
    if deaf := [str(energy) for energy in energies if not energy.noise_conditioned]:
        raise ValueError(f"{', '.join(deaf)} takes no noise level: calibrate with a kernel, MALA or HMC.")
    # Every level: energies of all components at the states of the chains of each, (chains, energies).
    visited: list[dict[float, list[Tensor]]] = []
    for energy in energies:
        found: dict[float, list[Tensor]] = {}

        def look(step: int, chain: Chain, found: dict[float, list[Tensor]] = found) -> None:
            sigma = chain.potential.noise_level
            if step == num_steps or sigma is None:
                return  # the last state carries no noise
            with torch.no_grad():
                seen = torch.stack([e(chain.x, noise_level=sigma) for e in energies], dim=1)
            found.setdefault(float(sigma), []).append(seen.double().cpu())

        sample(energy, num_chains=num_chains, num_steps=num_steps, sampler=sampler, seed=seed, callback=look)
        visited.append(found)
    levels = sorted(visited[0], reverse=True)
    log_z = torch.zeros(len(levels), len(energies))
    for row, level in enumerate(levels):
        own = [torch.cat(found[level]) for found in visited]
        for i in range(1, len(energies)):
            forward, backward = own[0][:, i] - own[0][:, 0], own[i][:, 0] - own[i][:, i]
            log_z[row, i] = _bennett(forward, backward)
    return torch.tensor(levels), log_z


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
