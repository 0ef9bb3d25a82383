"""The contract of energies: each rule a function, which raises where it is broken."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from composable_ebm.energy import Energy, changed_states, flat
from composable_ebm.potential.potential import Potential
from composable_ebm.testing.rule import BrokenError, broken, rule

Level = Tensor | None

__all__ = ["ENERGY_RULES"]


@rule
def energies_are_numbers(energy: Energy, x: Tensor, level: Level, tolerance: float) -> None:
    """One finite energy a state, in a floating type of 32 bits at least."""
    value = energy.energy(x.clone(), level)
    shapes = ((len(x),), (len(x), 1))
    if not isinstance(value, Tensor) or tuple(value.shape) not in shapes:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        broken(f"of {len(x)} states it must give ({len(x)},) energies, got {got}")
    value = energy(x.clone(), noise_level=level)
    if value.dtype not in (torch.float32, torch.float64):
        broken(f"energies are float32 or float64, got {value.dtype}")
    if not value.isfinite().all():
        broken(f"energies of finite states are finite, got {value.tolist()}")


@rule
def states_are_left_alone(energy: Energy, x: Tensor, level: Level, tolerance: float) -> None:
    """Neither an energy nor a score changes the states it is given."""
    for use in (energy, energy.score):
        given = x.clone()
        try:
            use(given, noise_level=level)
        except (RuntimeError, ValueError) as error:
            said = " ".join([str(error), *getattr(error, "__notes__", ())])
            if "in place" in said or "in-place" in said:
                raise BrokenError(changed_states(energy)) from error
            raise
        if not torch.equal(given, x):
            broken(changed_states(energy))


@rule
def energies_do_not_change(energy: Energy, x: Tensor, level: Level, tolerance: float) -> None:
    """The same state has the same energy at every call, and no global generator is drawn from."""
    random = torch.get_rng_state()
    first, second = (energy(x.clone(), noise_level=level) for _ in range(2))
    advice = "switch off dropout (.eval()), and draw noise from no generator"
    if not torch.equal(first, second):
        worst = float((first - second).abs().max())
        broken(f"two calls differ by {worst:.3g} nats: {advice}")
    if not torch.equal(random, torch.get_rng_state()):
        broken(f"it draws from the global generator: {advice}")


@rule
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
            broken(f"it takes no batch of {len(states)}, {error}: {advice}")
        for name, got, wanted in (
            ("energy", energy(states.clone(), noise_level=level), together[index]),
            ("score", energy.score(states.clone(), noise_level=level), scores[index]),
        ):
            if not torch.allclose(got, wanted, rtol=tolerance, atol=tolerance):
                worst = float((got - wanted).abs().max())
                company = "alone" if len(index) == 1 else "in another order"
                broken(
                    f"{company} its {name} is off by {worst:.3g}: {advice}",
                )


@rule
def score_is_minus_the_slope(energy: Energy, x: Tensor, level: Level, tolerance: float) -> None:
    """-∂E/∂x is what differences of energies say; of an energy without values it is all there is."""
    if not energy.has_value:
        return
    wide, start = energy, x
    try:
        wide, start = copy.deepcopy(energy).double(), x.double()
        wide(start, noise_level=like(level, start))
    except (RuntimeError, TypeError):  # it works in its own precision only
        wide, start = energy, x
    level = like(level, start)
    step = 1e-4 if wide(start, noise_level=level).dtype == torch.float64 else 1e-2
    generator = torch.Generator(x.device).manual_seed(0)
    direction = torch.randn(x.shape, generator=generator, dtype=start.dtype, device=x.device)
    up, down = (wide(start + s * direction, noise_level=level).double() for s in (step, -step))
    slope = -flat(wide.score(start, noise_level=level) * direction).sum(1).double()
    rise = (up - down) / (2 * step)
    allowed = max(10 * tolerance, 0.01) * rise.abs() + max(20 * tolerance, 0.02)
    if ((rise - slope).abs() > allowed).any():
        i = int((rise - slope).abs().argmax())
        broken(
            f"along one direction state {i} rises by {float(rise[i]):.5g} nats a unit, and its score "
            f"says {float(slope[i]):.5g}: keep tensors attached, and check gradients written by hand"
        )


@rule
def scores_are_like_states(energy: Energy, x: Tensor, level: Level, tolerance: float) -> None:
    """A score has shape, type and device of its states, is finite, and leaves no gradient at parameters."""
    mine = copy.deepcopy(energy).requires_grad_(True)
    score = mine.score(x.clone(), noise_level=level)
    if (score.shape, score.dtype, score.device) != (x.shape, x.dtype, x.device):
        got = (tuple(score.shape), score.dtype, score.device)
        broken(
            f"of states {tuple(x.shape)}, {x.dtype}, on {x.device}, got {got}",
        )
    if not score.isfinite().all():
        broken("a score of finite states is finite")
    if any(p.grad is not None for p in mine.parameters()):
        broken("a score leaves gradients at the parameters")


@rule
def each_row_may_have_its_noise_level(energy: Energy, x: Tensor, level: Level, tolerance: float) -> None:
    """Noise levels (batch,) give each state the energy it has at its own."""
    if not energy.noise_conditioned or level is None:
        return
    each = level * torch.linspace(0.8, 4.0, len(x), dtype=x.dtype, device=x.device)
    together = energy(x.clone(), noise_level=each)
    alone = torch.cat([energy(x[i : i + 1], noise_level=s) for i, s in enumerate(each)])
    if not torch.allclose(together, alone, rtol=tolerance, atol=tolerance):
        worst = float((together - alone).abs().max())
        broken(
            f"with a level a row, energies are off by {worst:.3g}",
        )


@rule
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
                broken(
                    f"evaluated {how}, its {name} is off by {worst:.3g}",
                )


EnergyRule = Callable[[Energy, Tensor, Level, float], None]

ENERGY_RULES: Mapping[str, EnergyRule] = {
    each.__name__: each
    for each in (
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


def like(level: Level, x: Tensor) -> Level:
    return None if level is None else level.to(x)
