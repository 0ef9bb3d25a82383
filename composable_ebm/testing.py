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

import copy
import functools
import math
from collections.abc import Callable, Mapping
from typing import NoReturn, ParamSpec

import torch
from torch import Tensor

from composable_ebm.energy import Energy, changed_states, flat
from composable_ebm.energy.analytic import Gaussian
from composable_ebm.energy.bits import bit_states
from composable_ebm.energy.conditionals import Conditionals
from composable_ebm.potential.potential import Potential
from composable_ebm.sampling import Annealed
from composable_ebm.sampling.chains import Chain
from composable_ebm.sampling.kernel import Kernel, Noise, State

Level = Tensor | None
Sampler = Kernel | Annealed

PRECISION = 2.0
DRAWS = 20_000
LIMIT = 4.5
"""Standard errors: a law that is kept is taken for broken in one of 100,000 checks of one figure."""

__all__ = ["ENERGY_RULES", "KERNEL_RULES", "ContractError", "check_energy", "check_kernel"]


class ContractError(AssertionError):
    """An energy or a kernel breaks its contract; the message says which rule, and by how much."""


class _BrokenError(Exception):
    """What is broken, for `_rule` to say of whom, and by which rule."""


P = ParamSpec("P")


def _rule(function: Callable[P, None]) -> Callable[P, None]:
    """A rule whose errors name it, and the energy or kernel, its first argument."""

    @functools.wraps(function)
    def held(*arguments: P.args, **options: P.kwargs) -> None:
        try:
            function(*arguments, **options)
        except _BrokenError as broken:
            subject, kind = str(arguments[0]), type(arguments[0]).__name__
            name = subject if subject.startswith(kind) else f"{kind} {subject}"
            raise ContractError(f"{name} breaks `{function.__name__}`: {broken}.") from broken

    return held


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


# --- energies ------------------------------------------------------------------------------------


@_rule
def energies_are_numbers(energy: Energy, x: Tensor, level: Level, tolerance: float) -> None:
    """One finite energy a state, in a floating type of 32 bits at least."""
    value = energy.energy(x.clone(), level)
    shapes = ((len(x),), (len(x), 1))
    if not isinstance(value, Tensor) or tuple(value.shape) not in shapes:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        _broken(f"of {len(x)} states it must give ({len(x)},) energies, got {got}")
    value = energy(x.clone(), noise_level=level)
    if value.dtype not in (torch.float32, torch.float64):
        _broken(f"energies are float32 or float64, got {value.dtype}")
    if not value.isfinite().all():
        _broken(f"energies of finite states are finite, got {value.tolist()}")


@_rule
def states_are_left_alone(energy: Energy, x: Tensor, level: Level, tolerance: float) -> None:
    """Neither an energy nor a score changes the states it is given."""
    for use in (energy, energy.score):
        given = x.clone()
        try:
            use(given, noise_level=level)
        except (RuntimeError, ValueError) as error:
            said = " ".join([str(error), *getattr(error, "__notes__", ())])
            if "in place" in said or "in-place" in said:
                raise _BrokenError(changed_states(energy)) from error
            raise
        if not torch.equal(given, x):
            _broken(changed_states(energy))


@_rule
def energies_do_not_change(energy: Energy, x: Tensor, level: Level, tolerance: float) -> None:
    """The same state has the same energy at every call, and no global generator is drawn from."""
    random = torch.get_rng_state()
    first, second = (energy(x.clone(), noise_level=level) for _ in range(2))
    advice = "switch off dropout (.eval()), and draw noise from no generator"
    if not torch.equal(first, second):
        worst = float((first - second).abs().max())
        _broken(f"two calls differ by {worst:.3g} nats: {advice}")
    if not torch.equal(random, torch.get_rng_state()):
        _broken(f"it draws from the global generator: {advice}")


@_rule
def rows_do_not_know_of_each_other(energy: Energy, x: Tensor, level: Level, tolerance: float) -> None:
    """A state has the energy and the score that it has alone, whatever else is in the batch."""
    together, scores = energy(x.clone(), noise_level=level), energy.score(x.clone(), noise_level=level)
    advice = "normalisation over the batch couples chains; use layers that see one state at a time"
    order = torch.arange(len(x) - 1, -1, -1, device=x.device)
    cases = [(order, x[order]), *((torch.tensor([i]), x[i : i + 1]) for i in (0, len(x) - 1))]
    for index, states in cases:
        try:
            energy(states.clone(), noise_level=level)
        except ValueError as error:
            _broken(f"it takes no batch of {len(states)}, {error}: {advice}")
        for name, got, wanted in (
            ("energy", energy(states.clone(), noise_level=level), together[index]),
            ("score", energy.score(states.clone(), noise_level=level), scores[index]),
        ):
            if not torch.allclose(got, wanted, rtol=tolerance, atol=tolerance):
                worst = float((got - wanted).abs().max())
                company = "alone" if len(index) == 1 else "in another order"
                _broken(
                    f"{company} its {name} is off by {worst:.3g}: {advice}",
                )


@_rule
def score_is_minus_the_slope(energy: Energy, x: Tensor, level: Level, tolerance: float) -> None:
    """-∂E/∂x is what differences of energies say; of an energy without values it is all there is."""
    if not energy.has_value:
        return
    wide, start = energy, x
    try:
        wide, start = copy.deepcopy(energy).double(), x.double()
        wide(start, noise_level=_like(level, start))
    except (RuntimeError, TypeError):  # it works in its own precision only
        wide, start = energy, x
    level = _like(level, start)
    step = 1e-4 if wide(start, noise_level=level).dtype == torch.float64 else 1e-2
    generator = torch.Generator(x.device).manual_seed(0)
    direction = torch.randn(x.shape, generator=generator, dtype=start.dtype, device=x.device)
    up, down = (wide(start + s * direction, noise_level=level).double() for s in (step, -step))
    slope = -flat(wide.score(start, noise_level=level) * direction).sum(1).double()
    rise = (up - down) / (2 * step)
    allowed = max(10 * tolerance, 0.01) * rise.abs() + max(20 * tolerance, 0.02)
    if ((rise - slope).abs() > allowed).any():
        i = int((rise - slope).abs().argmax())
        _broken(
            f"along one direction state {i} rises by {float(rise[i]):.5g} nats a unit, and its score "
            f"says {float(slope[i]):.5g}: keep tensors attached, and check gradients written by hand"
        )


@_rule
def scores_are_like_states(energy: Energy, x: Tensor, level: Level, tolerance: float) -> None:
    """A score has shape, type and device of its states, is finite, and leaves no gradient at parameters."""
    mine = copy.deepcopy(energy).requires_grad_(True)
    score = mine.score(x.clone(), noise_level=level)
    if (score.shape, score.dtype, score.device) != (x.shape, x.dtype, x.device):
        got = (tuple(score.shape), score.dtype, score.device)
        _broken(
            f"of states {tuple(x.shape)}, {x.dtype}, on {x.device}, got {got}",
        )
    if not score.isfinite().all():
        _broken("a score of finite states is finite")
    if any(p.grad is not None for p in mine.parameters()):
        _broken("a score leaves gradients at the parameters")


@_rule
def each_row_may_have_its_noise_level(energy: Energy, x: Tensor, level: Level, tolerance: float) -> None:
    """Noise levels (batch,) give each state the energy it has at its own."""
    if not energy.noise_conditioned or level is None:
        return
    each = level * torch.linspace(0.8, 4.0, len(x), dtype=x.dtype, device=x.device)
    together = energy(x.clone(), noise_level=each)
    alone = torch.cat([energy(x[i : i + 1], noise_level=s) for i, s in enumerate(each)])
    if not torch.allclose(together, alone, rtol=tolerance, atol=tolerance):
        worst = float((together - alone).abs().max())
        _broken(
            f"with a level a row, energies are off by {worst:.3g}",
        )


@_rule
def fast_forms_equal_the_plain_one(energy: Energy, x: Tensor, level: Level, tolerance: float) -> None:
    """The form that chains evaluate it in gives the energies and gradients of the plain call."""
    for stack in (False, True):
        coefficients = energy.coefficients.to(x.device, torch.promote_types(x.dtype, torch.float32))
        potential = Potential(energy, coefficients, noise_level=level, stack=stack)
        value, gradient = potential(x.clone())
        wanted, score = energy(x.clone(), noise_level=level), energy.score(x.clone(), noise_level=level)
        for name, got, plain in (("energy", value, wanted), ("gradient", gradient, -score)):
            if not torch.allclose(got, plain, rtol=tolerance, atol=tolerance):
                worst = float((got - plain).abs().max())
                how = potential.describe()
                _broken(
                    f"evaluated {how}, its {name} is off by {worst:.3g}",
                )


EnergyRule = Callable[[Energy, Tensor, Level, float], None]

ENERGY_RULES: Mapping[str, EnergyRule] = {
    rule.__name__: rule
    for rule in (
        energies_are_numbers,
        states_are_left_alone,
        energies_do_not_change,
        rows_do_not_know_of_each_other,
        score_is_minus_the_slope,
        scores_are_like_states,
        each_row_may_have_its_noise_level,
        fast_forms_equal_the_plain_one,
    )
}
"""The contract of energies, by the names of its rules."""


# --- kernels -------------------------------------------------------------------------------------


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


@_rule
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
                _broken(
                    f"from {dtype} {tuple(x.shape)} to {shapes}, {kinds}",
                )
        if (info.acceptance is not None) != kernel.needs_energy:
            what = "compares energies, and" if kernel.needs_energy else "accepts every step, and yet"
            _broken(
                f"it {what} its info says acceptance {info.acceptance}",
            )
        if info.acceptance is not None and not ((info.acceptance >= 0) & (info.acceptance <= 1)).all():
            _broken(f"acceptance of {info.acceptance.tolist()}")


@_rule
def steps_are_functions_of_their_arguments(sampler: Sampler, variance: float | None) -> None:
    """The same state and noise give the same step, and a step changes nothing that it is given."""
    kernel, mix, x = _kernel_of(sampler), _target(variance), _starts(variance)
    potential = Potential(mix, mix.coefficients.float())
    state = kernel.init(potential, x, _noise(len(x)))
    before = copy.deepcopy(state)
    one, two = (kernel.step(potential, state, _noise(len(x), 1), kernel.dynamics(x))[0] for _ in range(2))
    if not _same(one, two):
        _broken("the same state and noise gave two steps")
    if not _same(state, before):
        _broken("a step changed the state it was given")


@_rule
def draws_come_from_the_noise(sampler: Sampler, variance: float | None) -> None:
    """A seed gives a run, another seed another one, and the global generator is left alone."""
    x, random = _starts(variance), torch.get_rng_state()
    one, same, other = (_stepped(sampler, variance, x, _noise(len(x), seed)) for seed in (1, 1, 2))
    if not torch.equal(one, same):
        _broken("one seed gave two runs")
    if not torch.equal(torch.get_rng_state(), random):
        _broken("it draws from the global generator: ask `noise`")
    if torch.equal(one, other) and not torch.equal(one, x):
        _broken("two seeds gave one run")


@_rule
def chains_go_where_they_would_go_alone(sampler: Sampler, variance: float | None) -> None:
    """Rows of a batch draw their own noise and do not know of each other."""
    x = _starts(variance)
    both = Noise((torch.Generator().manual_seed(3), 4), (torch.Generator().manual_seed(5), 2))
    together = _stepped(sampler, variance, x, both)
    alone = _stepped(sampler, variance, x[4:], _noise(2, 5))
    if not torch.allclose(together[4:], alone, rtol=1e-4, atol=1e-4):
        worst = float((together[4:] - alone).abs().max())
        _broken(f"in company states are off by {worst:.3g}")


@_rule
def held_parts_stay(sampler: Sampler, variance: float | None) -> None:
    """What a mask holds stays exactly where it is."""
    x = _starts(variance)
    mask = torch.ones(x.shape[1])
    mask[0] = 0
    moved = _stepped(sampler, variance, x, _noise(len(x)), mask=mask)
    if not torch.equal(moved[:, 0], x[:, 0]):
        _broken("what is held moved: noise and gradients are zero there, so use both")


@_rule
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
        _broken("a chain without a finite energy did not stop, or was not counted")
    if not torch.allclose(here[others], there[others], rtol=1e-4, atol=1e-4):
        _broken("a chain that was lost moved the others")


@_rule
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
            _broken(
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
            _broken(
                f"after six steps from exact draws the {name} is {float(found):.4g} where it was "
                f"{wanted:g}, {off:.1f} standard errors off",
            )


KernelRule = Callable[[Sampler, float | None], None]

KERNEL_RULES: Mapping[str, KernelRule] = {
    rule.__name__: rule
    for rule in (
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


def _like(level: Level, x: Tensor) -> Level:
    return None if level is None else level.to(x)


def _broken(what: str) -> NoReturn:
    raise _BrokenError(what.rstrip("."))
