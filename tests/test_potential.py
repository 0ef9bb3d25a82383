"""The potential is a value: what it gives depends on what it is given, and `at` leaves it alone."""

import pytest
import torch
from helpers import points
from test_engine import binary, expert

import composable_ebm as ceb
from composable_ebm.potential.evaluating import evaluating
from composable_ebm.potential.potential import Potential, Tally
from composable_ebm.potential.rows import Plans


@pytest.fixture
def mix():
    return expert(seed=1)["0"] + 2 * binary(seed=2)


def test_another_value_leaves_the_first_one_alone(mix):
    x, potential = points(3, (1, 4, 4)), Potential(mix, torch.tensor([1.0, 2.0]))
    before = potential(x)
    mask = torch.zeros(1, 4, 4)
    other = potential.at(coefficients=torch.tensor([3.0, 0.0]), noise_level=torch.tensor(0.5), mask=mask)
    energy, gradient = other(x)
    assert not gradient.any()
    torch.testing.assert_close(energy, 3 * expert(seed=1)["0"](x, noise_level=torch.tensor(0.5)))
    for one, two in zip(potential(x), before, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)
    assert (potential.noise_level, potential.mask) == (None, None)
    assert other.plan is potential.plan  # weights are laid out once


def test_energy_and_gradient_are_those_of_the_composition(mix):
    x, level = points(3, (1, 4, 4)), torch.tensor(0.3)
    energy, gradient = Potential(mix, torch.tensor([1.0, 2.0])).at(noise_level=level)(x)
    torch.testing.assert_close(energy, mix(x, noise_level=level))
    torch.testing.assert_close(-gradient, mix.score(x, noise_level=level))


def test_rows_have_compositions_of_their_own():
    thick, wide = binary("thick", seed=2), binary("wide", seed=3)
    energies, sizes = [thick + wide, ceb.given(thick, ~wide), wide], [2, 1, 3]
    x, tallies = points(6, (1, 4, 4)), [Tally(), Tally(), Tally()]
    potential = Plans().potential_of_rows(energies, sizes, x, tallies=tallies)
    energy, gradient = potential(x)
    parts = zip(energies, x.split(sizes), energy.split(sizes), gradient.split(sizes), strict=True)
    for own, states, said, slope in parts:
        torch.testing.assert_close(said, own(states))
        torch.testing.assert_close(-slope, own.score(states))
    assert [tally.gradients for tally in tallies] == [1, 1, 1]


def test_plans_are_made_once_for_all_weights(mix):
    plans, x = Plans(), points(2, (1, 4, 4))
    for weight in (1.0, 0.5, -2.0):
        energy = mix.operands[0] + weight * mix.operands[1]
        torch.testing.assert_close(plans.potential_of_rows([energy], [2], x)(x)[0], energy(x))
    assert plans.made == 1


def test_weights_that_move_between_spells_of_evaluating_are_seen(mix):
    x, potential = points(2, (1, 4, 4)), Potential(mix, torch.tensor([1.0, 2.0]))
    for _ in range(2):
        with evaluating(mix.modules()):
            for _ in range(2):
                torch.testing.assert_close(potential(x)[0], mix(x))
        with torch.no_grad():
            for parameter in mix.parameters():
                parameter.mul_(1.5)
