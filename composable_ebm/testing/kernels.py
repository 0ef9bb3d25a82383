"""The contract of kernels: each rule a function, which raises where it is broken."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from composable_ebm.energy import Energy
from composable_ebm.energy.analytic import Gaussian
from composable_ebm.energy.bits import bit_states
from composable_ebm.energy.conditionals import Conditionals
from composable_ebm.potential.potential import Potential
from composable_ebm.sampling import Annealed
from composable_ebm.sampling.chain import Chain
from composable_ebm.sampling.kernel import Kernel, Noise, State
from composable_ebm.testing.rule import broken, rule

Sampler = Kernel | Annealed

PRECISION = 2.0
DRAWS = 20_000
LIMIT = 4.5
"""Standard errors: a law that is kept is taken for broken in one of 100,000 checks of one figure."""

__all__ = ["KERNEL_RULES", "Sampler"]


class _Bits(Energy):
    """E(x) = -b x - ½ xᵀC x over three bits, whose conditionals have a closed form."""

    event_shape = (3,)
    data_range = (0.0, 1.0)
    binary = True
    name = "three_bits"

    def __init__(self) -> None:
        super().__init__()
        self.field: Tensor
        self.coupling: Tensor
        self.register_buffer("field", torch.tensor([0.6, -0.4, 0.2]))
        self.register_buffer("coupling", torch.tensor([[0.0, 1.2, -0.5], [1.2, 0.0, 0.8], [-0.5, 0.8, 0.0]]))

    def energy(self, x: Tensor, noise_level: Tensor | None = None) -> Tensor:
        return -x @ self.field - ((x @ self.coupling) * x).sum(1) / 2

    def conditionals(self) -> Conditionals:
        return Conditionals(self.field, coupling=self.coupling, groups=(0, 1, 2))


def _target(variance: float | None) -> Energy:
    """What kernels are checked on, as a sum, so that it has coefficients."""
    if variance is None:
        return 0.5 * _Bits()
    return PRECISION * Gaussian([0.3, 0.3], 1.0).named("plane")


def _starts(variance: float | None, count: int = 6) -> Tensor:
    x = torch.randn(count, 3 if variance is None else 2, generator=torch.Generator().manual_seed(0))
    return (x > 0).float() if variance is None else x


def _kernel_of(sampler: Sampler) -> Kernel:
    return sampler.kernel if isinstance(sampler, Annealed) else sampler


def _stepped(
    sampler: Sampler, variance: float | None, x: Tensor, noise: Noise, steps: int = 20, **options
) -> Tensor:
    return Chain(_target(variance), x, sampler, noise, num_steps=steps, **options).advance(steps)


@rule
def steps_keep_shapes_and_types(sampler: Sampler, variance: float | None) -> None:
    """States, energies and gradients keep shape and type; probabilities of acceptance are between 0 and 1."""
    kernel, mix = _kernel_of(sampler), _target(variance)
    for dtype in (torch.float32, torch.float64):
        x = _starts(variance).to(dtype)
        potential = Potential(copy.deepcopy(mix).to(dtype), mix.coefficients.to(dtype))
        noise = _noise(len(x))
        state = kernel.init(potential, x, noise)
        after, info = kernel.step(potential, state, noise, kernel.dynamics(x))
        for moment in (state, after):
            shapes = (moment.x.shape, moment.gradient.shape, moment.energy.shape)
            kinds = {part.dtype for part in moment if part is not None}
            if shapes != (x.shape, x.shape, x.shape[:1]) or kinds != {dtype}:
                broken(
                    f"from {dtype} {tuple(x.shape)} to {shapes}, {kinds}",
                )
        if (info.acceptance is not None) != kernel.needs_energy:
            what = "compares energies, and" if kernel.needs_energy else "accepts every step, and yet"
            broken(
                f"it {what} its info says acceptance {info.acceptance}",
            )
        if info.acceptance is not None and not ((info.acceptance >= 0) & (info.acceptance <= 1)).all():
            broken(f"acceptance of {info.acceptance.tolist()}")


@rule
def steps_are_functions_of_their_arguments(sampler: Sampler, variance: float | None) -> None:
    """The same state and noise give the same step, and a step changes nothing that it is given."""
    kernel, mix, x = _kernel_of(sampler), _target(variance), _starts(variance)
    potential = Potential(mix, mix.coefficients.float())
    state = kernel.init(potential, x, _noise(len(x)))
    before = copy.deepcopy(state)
    one, two = (kernel.step(potential, state, _noise(len(x), 1), kernel.dynamics(x))[0] for _ in range(2))
    if not _same(one, two):
        broken("the same state and noise gave two steps")
    if not _same(state, before):
        broken("a step changed the state it was given")


@rule
def draws_come_from_the_noise(sampler: Sampler, variance: float | None) -> None:
    """A seed gives a run, another seed another one, and the global generator is left alone."""
    x, random = _starts(variance), torch.get_rng_state()
    one, same, other = (_stepped(sampler, variance, x, _noise(len(x), seed)) for seed in (1, 1, 2))
    if not torch.equal(one, same):
        broken("one seed gave two runs")
    if not torch.equal(torch.get_rng_state(), random):
        broken("it draws from the global generator: ask `noise`")
    if torch.equal(one, other) and not torch.equal(one, x):
        broken("two seeds gave one run")


@rule
def chains_go_where_they_would_go_alone(sampler: Sampler, variance: float | None) -> None:
    """Rows of a batch draw their own noise and do not know of each other."""
    x = _starts(variance)
    both = Noise((torch.Generator().manual_seed(3), 4), (torch.Generator().manual_seed(5), 2))
    together = _stepped(sampler, variance, x, both)
    alone = _stepped(sampler, variance, x[4:], _noise(2, 5))
    if not torch.allclose(together[4:], alone, rtol=1e-4, atol=1e-4):
        worst = float((together[4:] - alone).abs().max())
        broken(f"in company states are off by {worst:.3g}")


@rule
def held_parts_stay(sampler: Sampler, variance: float | None) -> None:
    """What a mask holds stays exactly where it is."""
    x = _starts(variance)
    mask = torch.ones(x.shape[1])
    mask[0] = 0
    moved = _stepped(sampler, variance, x, _noise(len(x)), mask=mask)
    if not torch.equal(moved[:, 0], x[:, 0]):
        broken("what is held moved: noise and gradients are zero there, so use both")


@rule
def lost_chains_stop(sampler: Sampler, variance: float | None) -> None:
    """A chain whose energy stops being a number stays where it was, and the others go on."""
    x, steps = _starts(variance), 8
    sound, hurt = (Chain(_target(variance), x, sampler, _noise(len(x)), num_steps=steps) for _ in range(2))
    sound.advance(3), hurt.advance(3)
    stopped, rows = hurt.x[1].clone(), hurt.coefficients.expand(len(x), -1).clone()
    sound.coefficients = rows.clone()
    rows[1] = math.nan
    hurt.coefficients = rows
    there, here = sound.advance(5), hurt.advance(5)
    others = torch.arange(len(x)) != 1
    if not torch.equal(here[1], stopped) or hurt.divergence().chains.tolist() != (~others).tolist():
        broken("a chain without a finite energy did not stop, or was not counted")
    if not torch.allclose(here[others], there[others], rtol=1e-4, atol=1e-4):
        broken("a chain that was lost moved the others")


@rule
def law_stays(sampler: Sampler, variance: float | None) -> None:
    """From exact draws, six steps later the law is the same: moments or all frequencies within 4.5 errors."""
    generator, noise = torch.Generator().manual_seed(11), _noise(DRAWS, 12)
    temperature = _kernel_of(sampler).implied_temperature
    if variance is None:
        states = bit_states(3)
        truth = (-_target(None)(states) / temperature).softmax(0)
        x = states[torch.multinomial(truth, DRAWS, replacement=True, generator=generator)]
        end = _stepped(sampler, None, x, noise, 6, record=False)
        found = torch.bincount((end * torch.tensor([1.0, 2.0, 4.0])).sum(1).long(), minlength=8) / DRAWS
        off = (found - truth).abs() / (truth * (1 - truth) / DRAWS).sqrt()
        if (worst := float(off.max())) > LIMIT:
            broken(
                f"the frequency of a state of bits is off by {worst:.1f} standard errors",
            )
        return
    spread = math.sqrt(variance * temperature / PRECISION)
    x = 0.3 + spread * torch.randn(DRAWS, 2, generator=generator)
    end = _stepped(sampler, variance, x, noise, 6, record=False)
    centred, count = (end - 0.3) / spread, end.numel()
    for name, found, wanted, error in (
        ("mean", centred.mean(), 0.0, count**-0.5),
        ("variance", centred.square().mean(), 1.0, (2 / count) ** 0.5),
        ("fourth moment", (centred**4).mean(), 3.0, (96 / count) ** 0.5),
    ):
        if (off := abs(float(found) - wanted) / error) > LIMIT:
            broken(
                f"after six steps from exact draws the {name} is {float(found):.4g} where it was "
                f"{wanted:g}, {off:.1f} standard errors off",
            )


KernelRule = Callable[[Sampler, float | None], None]

KERNEL_RULES: Mapping[str, KernelRule] = {
    each.__name__: each
    for each in (
        steps_keep_shapes_and_types,
        steps_are_functions_of_their_arguments,
        draws_come_from_the_noise,
        chains_go_where_they_would_go_alone,
        held_parts_stay,
        lost_chains_stop,
        law_stays,
    )
}
"""The contract of kernels, by the names of its rules."""


def _noise(rows: int, seed: int = 0) -> Noise:
    return Noise((torch.Generator().manual_seed(seed), rows))


def _same(one: State, two: State) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True) if a is not None and b is not None)
