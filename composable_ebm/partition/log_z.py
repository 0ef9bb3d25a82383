"""log Z of energies whose conditionals have a closed form, by annealed importance sampling.

The walk goes from independent units, whose Z is known, to the energy, with β from 0 to 1:

    E_β(x) = β constant - Σᵢ ((1-β) b⁰ᵢ + β bᵢ) xᵢ + ½ Σᵢ λᵢxᵢ² - ½ β xᵀCx - Σⱼ log(1 + exp βaⱼ)

in the symbols of `composable_ebm.energy.conditionals`, with b⁰ the field of the units at the start. For an
RBM it scales the couplings of the joint energy of v and h, and not the free energy of v, so that
every E_β is again an RBM and `Gibbs` walks it. The works W = Σ_k E_{β_{k+1}}(x_k) - E_{β_k}(x_k)
then give log Z = log Z_0 + log mean exp(-W), and with walks back from samples of the energy Bennett's
ratio, as in `composable_ebm.partition.calibrate`.

Reference:
    Neal (2001), Annealed importance sampling, arXiv physics/9803008; Salakhutdinov and Murray (2008),
    On the quantitative analysis of deep belief networks, eq. 16 to 18; Burda, Grosse and
    Salakhutdinov (2015), arXiv 1412.8566, for walks in the other direction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from composable_ebm.energy import Energy, Sum
from composable_ebm.energy.bits import MAX_BITS, bit_states
from composable_ebm.energy.conditionals import Conditionals
from composable_ebm.partition.calibrate import from_works
from composable_ebm.sampling.chain import Chain
from composable_ebm.sampling.gibbs import Gibbs
from composable_ebm.sampling.kernel import Noise

__all__ = ["LogZEstimate", "exact_log_z", "log_z"]


@dataclass(frozen=True)
class LogZEstimate:
    """An estimate of log Z in nats.

    Attributes:
        value: From the walks in both directions, by Bennett's ratio.
        error: Its standard error, by the bootstrap over walks; blind to chains that never mixed.
        forward: From the walks towards the energy alone; on average too low.
        backward: From the walks away from it alone; on average too high. The gap between the two is
            the better measure of what is not known where walks are short.
    """

    value: float
    error: float
    forward: float
    backward: float


class _Path(Energy):
    """E_β, with β a tensor that may be moved."""

    def __init__(self, target: Conditionals, start: Tensor, binary: bool) -> None:
        super().__init__()
        self.target, self.start = target, start
        self.beta = start.new_zeros(())
        self.event_shape = (target.size,)
        self.binary = binary

    def conditionals(self) -> Conditionals:
        t, beta = self.target, self.beta
        return Conditionals(
            torch.lerp(self.start, t.field, beta),
            t.precision,
            None if t.weight is None else beta * t.weight,
            None if t.hidden_bias is None else beta * t.hidden_bias,
            None if t.coupling is None else beta * t.coupling,
            t.groups,
            beta * t.constant,
        )

    def energy(self, x: Tensor, noise_level: Tensor | None = None) -> Tensor:
        return self.conditionals().energy(x)

    @torch.no_grad()
    def work(self, x: Tensor, to: Tensor) -> Tensor:
        """E_to(x) - E_β(x), (batch,)."""
        t = self.target
        slope = t.constant - x @ (t.field - self.start)
        if t.coupling is not None:
            slope = slope - ((x @ t.coupling) * x).sum(1) / 2
        work = (to - self.beta) * slope
        if t.weight is not None:
            a = t.hidden_fields(x)
            work = work - (F.softplus(to * a) - F.softplus(self.beta * a)).sum(1)
        return work


def log_z(
    energy: Energy,
    *,
    num_chains: int = 100,
    levels: int | Sequence[float] = 1000,
    start: Tensor | None = None,
    init: Tensor | None = None,
    burn_in: int = 500,
    seed: int = 0,
) -> LogZEstimate:
    """log Z of an energy with conditionals, or of a whole-weighted sum of such energies.

    Args:
        energy: An RBM's free energy, a Boltzmann machine, a sum of some.
        num_chains: Walks in each direction.
        levels: Number of steps in β, evenly spaced; or the values of β, from 0 to 1.
        start: b⁰, (size,); for bits the log odds of the data's mean are good. The field of the energy
            unless given.
        init: States that the chains for the walks back start from, (num_chains, *event); coins, or
            standard normal, unless given. Data are good.
        burn_in: Sweeps before the walks back.
        seed: Seeds everything.
    Raises:
        ValueError: If the energy does not tell its conditionals, or a weight is not whole.
    """
    target = _merged(energy)
    path = _Path(target, target.field if start is None else start.to(target.field), energy.binary)
    betas = _rising(levels).to(target.field)
    noise = Noise((torch.Generator(target.field.device).manual_seed(seed), num_chains))

    path.beta = betas[0]
    independent = path.conditionals()
    # Sweeps of independent units are independent draws, wherever they start.
    x = Chain(path, target.field.new_zeros(num_chains, target.size), Gibbs(), noise).advance(1)
    forward = _walk(path, x, betas, noise)
    path.beta = betas[-1]
    if init is None:
        like = target.field.new_zeros(num_chains, target.size)
        x = noise.bits(torch.full_like(like, 0.5)) if energy.binary else noise.normal(like)
    else:
        energy.check_states(init)
        x = init.flatten(1).to(target.field)
    x = Chain(path, x, Gibbs(), noise, record=False).advance(burn_in)
    backward = _walk(path, x, betas.flip(0), noise)

    difference = from_works(forward.cpu(), backward.cpu(), torch.Generator().manual_seed(seed))
    base = float(independent.log_z())
    return LogZEstimate(
        value=base + difference.value,
        error=difference.error,
        forward=base + difference.forward,
        backward=base + difference.backward,
    )


def _rising(levels: int | Sequence[float]) -> Tensor:
    """The values of β, from 0 to 1."""
    betas = torch.linspace(0, 1, max(levels, 0) + 1) if isinstance(levels, int) else torch.tensor(levels)
    if len(betas) < 2 or float(betas[0]) != 0 or float(betas[-1]) != 1 or not (betas.diff() > 0).all():
        raise ValueError(
            f"`levels` must be a positive number, or values of β that rise from 0 to 1: {levels}."
        )
    return betas


def _walk(path: _Path, x: Tensor, betas: Tensor, noise: Noise) -> Tensor:
    """Work in nats, (num_chains,), of walks from states `x` of the first β to the last."""
    path.beta = betas[0]
    chain = Chain(path, x, Gibbs(), noise, record=False)
    work = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    for beta in betas[1:]:
        work += path.work(chain.x, beta).double()
        path.beta = beta
        chain.advance(1)
    return work


@torch.no_grad()
def exact_log_z(energy: Energy) -> float:
    """log Z in nats, by a sum over all states of the hidden bits, or of the bits themselves.

    Raises:
        ValueError: If there are more than 22 of either.
    """
    try:
        target = _merged(energy)
    except ValueError:
        target = None  # then only its values are known
    if target is not None and target.weight is not None and target.coupling is None:
        assert target.hidden_bias is not None
        fewest = target.precision is not None or target.hidden <= target.size
        if target.hidden <= MAX_BITS and fewest:
            h = bit_states(target.hidden, target.field.device).to(target.field)
            eta = target.field + h @ target.weight.T
            if target.precision is None:
                visible = F.softplus(eta).sum(1)
            else:
                p = target.precision
                visible = (eta.square() / p + (2 * torch.pi / p).log()).sum(1) / 2
            return float(torch.logsumexp(h @ target.hidden_bias + visible, 0) - target.constant)
    size = None if energy.event_shape is None else torch.Size(energy.event_shape).numel()
    if not energy.binary or size is None or size > MAX_BITS:
        raise ValueError(
            f"log Z of {energy} is no sum over at most {MAX_BITS} bits; estimate it with log_z, or the "
            "difference to another energy with log_z_difference."
        )
    parameter = next(energy.parameters(), None)
    states = bit_states(size, "cpu" if parameter is None else parameter.device)
    assert energy.event_shape is not None
    parts = [-energy(x.reshape(-1, *energy.event_shape)) for x in states.split(2**16)]
    return float(torch.logsumexp(torch.cat(parts), 0))


@torch.no_grad()
def _merged(energy: Energy) -> Conditionals:
    """One energy in the form of `Conditionals` from a sum of some: hidden units stand side by side."""
    Gibbs().check(energy)
    pairs = zip(energy.operands, energy.weights, strict=True) if isinstance(energy, Sum) else [(energy, 1.0)]
    told = [(term, term.conditionals(), torch.as_tensor(weight)) for term, weight in pairs]
    parts: list[tuple[Conditionals, float]] = []
    for term, part, weight in told:
        assert part is not None
        if weight.ndim:
            raise ValueError(f"log Z is of one energy; {term} has a weight for each row.")
        if part.hidden and (float(weight) < 0 or float(weight) % 1):
            raise ValueError(
                f"log Z by Gibbs walks needs whole weights of terms with summed-out hidden units; {term} has "
                f"{float(weight):g}. Use log_z_difference with DMALA."
            )
        parts.append((part, float(weight)))
    repeated = [part for part, weight in parts for _ in range(int(weight)) if part.hidden]
    precise = [weight * part.precision for part, weight in parts if part.precision is not None]
    couplings = [weight * part.coupling for part, weight in parts if part.coupling is not None]
    groups = [part.groups for part, _ in parts if part.coupling is not None]
    if len(groups) > 1:
        groups = [tuple(range(parts[0][0].size))]
    return Conditionals(
        field=_total([weight * part.field for part, weight in parts]),  # type: ignore[arg-type]
        precision=_total(precise),
        weight=torch.cat([p.weight for p in repeated if p.weight is not None], 1) if repeated else None,
        hidden_bias=torch.cat([p.hidden_bias for p in repeated if p.hidden_bias is not None])
        if repeated
        else None,
        coupling=_total(couplings),
        groups=groups[0] if groups else (),
        constant=sum((weight * part.constant for part, weight in parts), torch.zeros(())),
    )


def _total(tensors: Sequence[Tensor]) -> Tensor | None:
    return torch.stack(list(tensors)).sum(0) if tensors else None
