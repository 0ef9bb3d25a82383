"""Particles: chains that carry weights along an annealing, and are resampled among themselves.

A composition with a carrier (see `composable_ebm.energy.carrier`) is a density times probabilities,
at every noise level σ:

    π_σ(x) ∝ p_σ(x) exp G(x, σ),      G = E_c - E = Σᵢ wᵢ log pᵢ(aᵢ | x, σ)

    p_σ   the carrier, exp(-E_c(x, σ)) up to a constant
    G     what the experts say of x, of the order of a nat an attribute

From σ to the next level σ' the carrier's own probability flow takes particles of p_σ to particles of
p_σ', so only what the experts say has to be weighed:

    x' = x + σ(σ' - σ) ∂E_c/∂x                      log w' = log w + G(x', σ') - G(x, σ)

Where the weights have become uneven the particles are resampled, and a kernel that leaves π_σ'
invariant moves them on. As their number grows the weighted particles tend to π exactly, up to the steps
between levels and the kernel's own error (none for MALA and HMC), and the mean weight is an unbiased
estimate of

    p(request) = ∫ p(x) exp G(x) dx.

Reference:
    Del Moral, Doucet and Jasra (2006), Sequential Monte Carlo samplers, JRSS B 68; Doucet and
    Johansen (2009), A tutorial on particle filtering and smoothing, for resampling; Song et al. (2021),
    arXiv 2011.13456, eq. 13, for the flow; Wu et al. (2023), arXiv 2306.17775, for particles under
    diffusion models; Lee and Whiteley (2018), Variance estimation in the particle filter, eq. 7.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor

from composable_ebm.energy import Energy, carrier, require_values
from composable_ebm.sampling.annealed import Annealed

FEWEST = 32
"""Particles that a request has at least; the chains that were asked for are drawn from them."""
CANDIDATES = 4
"""States at the first noise level for each particle, of which the particles are chosen."""

__all__ = ["Particles", "Population", "Weighted", "drawn", "systematic"]


@dataclass(frozen=True)
class Particles(Annealed):
    """An annealed kernel whose chains are weighed against each other, and resampled.

    For compositions that are one density times probabilities: `given`, one value of an expert, a
    classifier beside a density, an OR of those. Exact at weight 1 as particles grow; `num_chains` are
    drawn from more of them, without taking one twice where there are enough. All start from noise. What a
    mask leaves open is filled in without weights: they would need the density of the part that is held,
    which much noise hides, given the part that is not, and an energy of both does not know that.

    Args:
        kernel: Moves particles at each level; MALA and HMC leave it exact.
        schedule: Must move the noise level, and `predict`.
        num_particles: How many; `per_chain` times the chains asked for, and at least 32, unless given.
        per_chain: Particles for each chain that is asked for. 1.35 let a draw seldom take one twice where
            most meet the request in the end. Where few do, more of them find it, and there is more to
            choose from: letters that are bold or italic as asked, see `docs/latents.md`.
        threshold: Resamples where the effective sample size is below this share of the particles. Early
            copies still become pictures of their own; of faces with four attributes
            asked for, one in six had a twin at 0.5, one in four hundred at 0.7.
        verdict: Asks in the end for states of which every expert thinks its value likelier than not,
            instead of weighing them by how likely. The same where a picture leaves no doubt about its
            attributes, but a model's pictures sometimes do; then those are left out.
        surest: Of particles that meet the verdict, draws first those of which every expert is as sure as it
            is of nine in ten pictures (`Energy.doubt`), if there are as many as were asked for, else up to
            ten times less, and so on. A taste, for a base that often draws pictures between two values.
        carrier: The density that carries the particles; found by Bayes' rule unless given, see
            `composable_ebm.energy.carrier`. Any energy that is known at every noise level will do, and all
            else is weighed: eight modes, of which a bar leaves two. The less there is to weigh, the better.
    Raises:
        ValueError: If the schedule does not move the noise level by predictor steps, or a number makes
            no sense.
    Example:
        >>> levels = Schedule(noise_level=karras(10, 0.02), noise_power=2, predict=True, num_levels=40)
        >>> out = sample(given(face, smile), sampler=Particles(MALA(0.1), levels), num_steps=80)
        >>> print(out.log_probability)
    """

    num_particles: int | None = None
    per_chain: float = 1.35
    threshold: float = 0.7
    verdict: bool = False
    surest: bool = False
    carrier: Energy | None = None

    def __post_init__(self) -> None:
        if self.schedule.noise_level is None or not self.schedule.predict:
            raise ValueError(
                "Particles are carried from noise level to noise level: give a schedule with a `noise_level` "
                "curve and predict=True."
            )
        if self.num_particles is not None and self.num_particles < 1:
            raise ValueError(f"`num_particles` must be at least 1, got {self.num_particles}.")
        if not 1 <= self.per_chain < math.inf:
            raise ValueError(f"`per_chain` must be at least 1, got {self.per_chain}.")
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"`threshold` must be between 0 and 1, got {self.threshold}.")

    @property
    def plain(self) -> Annealed:
        """The same kernel and schedule without weights."""
        return Annealed(self.kernel, self.schedule)

    def count(self, num_chains: int) -> int:
        """How many particles there are where `num_chains` are asked for."""
        if self.num_particles is not None:
            return max(self.num_particles, num_chains)
        return max(FEWEST, math.ceil(self.per_chain * num_chains))

    def __str__(self) -> str:
        count = "" if self.num_particles is None else f"{self.num_particles} "
        return f"{count}particles of {self.kernel}, {self.schedule}"


class Population(NamedTuple):
    """The weights of some particles, on their device.

    Attributes:
        log_weights: log w since the last resampling, (particles,).
        ancestors: Which of the first particles each descends from, (particles,).
        log_mean: log of the mean weight of all resamplings so far, ().
        ess: Effective sample size, of all particles 1, after each level so far.
    """

    log_weights: Tensor
    ancestors: Tensor
    log_mean: Tensor
    ess: tuple[Tensor, ...] = ()

    @classmethod
    def of(cls, log_weights: Tensor) -> Self:
        """Particles that have just been weighed for the first time."""
        count = len(log_weights)
        return cls(
            _finite(log_weights),
            torch.arange(count, device=log_weights.device),
            log_weights.new_zeros(()),
        )

    @property
    def log_probability(self) -> Tensor:
        """log p(request), ()."""
        return self.log_mean + torch.logsumexp(self.log_weights, 0) - math.log(len(self.log_weights))

    def weighed(self, increment: Tensor) -> Self:
        """With log w + increment, (particles,); what is not finite gets no weight."""
        return self._replace(log_weights=_finite(self.log_weights + increment))

    def resampled(self, u: Tensor, threshold: float) -> tuple[Self, Tensor]:
        """Resamples where the weights are uneven, without a look from the host.

        Args:
            u: Uniform on [0, 1), ().
            threshold: Least effective sample size, of all particles 1, that is left as it is.
        Returns:
            The population, and which particle now stands in each place, (particles,).
        """
        count = len(self.log_weights)
        weights = torch.softmax(self.log_weights, 0)
        ess = 1 / (count * weights.square().sum())
        due = ess < threshold
        places = torch.arange(count, device=u.device)
        index = torch.where(due, systematic(weights, count, u), places)
        return (
            type(self)(
                torch.where(due, 0.0, self.log_weights),
                self.ancestors[index],
                torch.where(due, self.log_probability, self.log_mean),
                (*self.ess, ess),
            ),
            index,
        )


def _finite(log_weights: Tensor) -> Tensor:
    """Without NaN, and never all at minus infinity: particles that are all impossible stay as they are."""
    lowest = torch.finfo(log_weights.dtype).min / 4
    return log_weights.nan_to_num(nan=lowest, posinf=lowest, neginf=lowest).clamp(min=lowest)


def systematic(weights: Tensor, count: int, u: Tensor) -> Tensor:
    """Indices (count,), rising, of which i comes ⌊count·wᵢ⌋ or ⌈count·wᵢ⌉ times, on average count·wᵢ.

    Args:
        weights: Summing to 1, (n,).
        count: How many.
        u: Uniform on [0, 1), ().
    Reference:
        Kitagawa (1996), Monte Carlo filter and smoother for non-Gaussian nonlinear state space models.
    """
    positions = (torch.arange(count, device=weights.device) + u) / count
    edges = weights.double().cumsum(0)
    return torch.searchsorted(edges / edges[-1], positions.double()).clamp(max=len(weights) - 1)


def drawn(log_weights: Tensor, count: int, u: Tensor) -> Tensor:
    """Indices (count,) of a draw by weights, none twice as long as there are enough of some weight.

    Each particle is in the draw with probability min(1, c wᵢ), the c such that `count` are expected.
    Those that stand among the first `count` and are drawn keep their place.

    Args:
        log_weights: (n,), n ≥ count.
        count: How many.
        u: Uniform on [0, 1), ().
    """
    return _drawn(chances(log_weights, count), count, u)


def _drawn(chance: Tensor, count: int, u: Tensor) -> Tensor:
    if bool((chance > 1).any()):
        return _in_place(systematic(chance / count, count, u), count)
    edges = chance.cumsum(0)
    passed = torch.floor(edges * count / edges[-1] - u.double() + 1)
    index = torch.diff(passed, prepend=passed.new_zeros(1)).nonzero()[:, 0]
    return _in_place(index[:count], count)


def chances(log_weights: Tensor, count: int) -> Tensor:
    """How often each of (n,) is expected in a draw of `count` by weights, (n,), summing to `count`.

    At most once, min(1, c wᵢ), where more than `count` have some weight; count·wᵢ times otherwise.

    Reference:
        Tillé (2006), Sampling algorithms, section 2.10.
    """
    weights = torch.softmax(log_weights.double(), 0)
    if int((weights * len(weights) > 1e-6).sum()) <= count:
        return count * weights
    certain = torch.zeros_like(weights, dtype=torch.bool)
    while True:
        rest = torch.where(certain, 0.0, weights)
        share = rest / rest.sum() * (count - int(certain.sum()))
        more = share >= 1
        if not bool(more.any()):
            return torch.where(certain, 1.0, share)
        certain |= more


def chosen(log_weights: Tensor, count: int, u: Tensor) -> tuple[Tensor, Tensor]:
    """`count` of more candidates, drawn by weights, and the log weights that they then stand with.

    The mean weight keeps its expectation: each weight is divided by the chance with which it was drawn.

    Args:
        log_weights: (n,), n ≥ count.
        count: How many.
        u: Uniform on [0, 1), ().
    Returns:
        Indices (count,), and log weights (count,).
    Reference:
        Horvitz and Thompson (1952), A generalization of sampling without replacement, eq. 4; Fearnhead
        and Clifford (2003), On-line inference for hidden Markov models via particle filters, section 3.
    """
    log_weights = _finite(log_weights)
    chance = chances(log_weights, count)
    index = _drawn(chance, count, u)
    left = log_weights - chance.log().to(log_weights)
    return index, left[index] + math.log(count / len(log_weights))


def _in_place(chosen: Tensor, count: int) -> Tensor:
    """The same indices, each of those below `count` once at its own place, the others in what is left."""
    at_home = torch.zeros(count, dtype=torch.bool, device=chosen.device)
    stays = chosen < count
    first = torch.ones_like(stays)
    first[1:] = chosen[1:] != chosen[:-1]
    stays &= first
    at_home[chosen[stays]] = True
    placed = torch.arange(count, device=chosen.device)
    placed[~at_home] = chosen[~stays]
    return placed


@dataclass(frozen=True, eq=False)
class Weighted:
    """What the particles of a run say of the request.

    Attributes:
        states: All of them, (particles, *event).
        log_weights: (particles,), up to a constant; means under exp(log_weights) are those of the target.
        chosen: Which of them are the samples, (num_chains,).
        ancestors: Which of the first particles each descends from, (particles,).
        ess: Effective sample size along the way, (levels,), of all particles 1.
        log_probability: log p(request) under the carrier, in nats; log of the probability of the verdict
            where the sampler goes by it.
        error: Its standard error, in nats.
        carrier: What p(request) is under.
        unmet: Whether no particle meets the request by the experts' verdict.
    """

    states: Tensor
    log_weights: Tensor
    chosen: Tensor
    ancestors: Tensor
    ess: Tensor
    log_probability: float
    error: float
    carrier: Energy
    unmet: bool = False

    @property
    def num_ancestors(self) -> int:
        """How many of the first particles the samples descend from."""
        return len(self.ancestors[self.chosen].unique())

    @property
    def sentence(self) -> str:
        """How rare the request is, in words."""
        odds = math.exp(min(60.0, -self.log_probability))
        rarity = "nearly every one" if odds < 1.05 else f"one in {odds:.3g}"
        return (
            f"{rarity} of {self.carrier} is like this: log p = {self.log_probability:.2f} ± {self.error:.2f}"
        )


def error_of(log_weights: Tensor, ancestors: Tensor) -> float:
    """Standard error of the log of a mean weight, in nats, from one run.

        Var(Ẑ)/Z² ≈ Σₖ (Σ_{i of k} Wᵢ)² - 1/N,      k over the first particles, W the normalised weights

    Reference:
        Chan and Lai (2013), A general theory of particle filters in hidden Markov models; Lee and
        Whiteley (2018), eq. 7.
    """
    weights = torch.softmax(log_weights.double(), 0)
    of_each = torch.zeros_like(weights).index_add_(0, ancestors, weights)
    return math.sqrt(max(0.0, float(of_each.square().sum()) - 1 / len(weights)))


def carried(sampler: object, energy: Energy, coefficients: Tensor | None = None) -> Energy | None:
    """The carrier of a composition if `sampler` weighs particles, else None.

    Raises:
        NotCarriedError: If there is none to be found.
        ValueError: If the one that is given cannot carry.
    """
    if not isinstance(sampler, Particles):
        return None
    if sampler.carrier is None:
        return carrier(energy, coefficients)
    require_values("particles are weighed by their energies", [energy, sampler.carrier])
    if not sampler.carrier.noise_conditioned:
        raise ValueError(f"{sampler.carrier} is not known at every noise level, so it carries no particles.")
    return sampler.carrier
