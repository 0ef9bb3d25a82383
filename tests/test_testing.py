"""The contracts that ship: what keeps them passes, and each way of breaking them is called by its name."""

import dataclasses

import pytest
import torch
from helpers import gaussians
from torch import nn

import composable_ebm as ceb
from composable_ebm.sampling.kernel import Info, State
from composable_ebm.testing import ContractError, check_energy, check_kernel

x = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))


class Own(ceb.Energy):
    """A user's energy, which is right."""

    event_shape = (2,)

    def energy(self, x, noise_level=None):
        return x.square().sum(1) / 2


class WrongGradient(Own):
    def energy(self, x, noise_level=None):
        return super().energy(x) + x.detach()[:, 0].square()


class WrongShape(Own):
    def energy(self, x, noise_level=None):
        return x.square()


class OneForAll(Own):
    def energy(self, x, noise_level=None):
        return x.square().sum()


class InPlace(Own):
    def energy(self, x, noise_level=None):
        x.data.clamp_(-0.5, 0.5)
        return super().energy(x)


class Coupled(Own):
    def energy(self, x, noise_level=None):
        return super().energy(x - x.mean(0))


class Random(Own):
    def energy(self, x, noise_level=None):
        return super().energy(nn.functional.dropout(x, 0.5))


class Infinite(Own):
    def energy(self, x, noise_level=None):
        return super().energy(x) / 0


class DeafToRows(Own):
    noise_conditioned = True

    def energy(self, x, noise_level=None):
        return super().energy(x) * (1 if noise_level is None else noise_level.max())


WRONG = {
    WrongGradient: "score_is_minus_the_slope.*state . rises by .* and its score says",
    WrongShape: r"energies_are_numbers.*of 6 states it must give \(6,\) energies, got \(6, 2\)",
    OneForAll: r"energies_are_numbers.*got \(\)",
    InPlace: "states_are_left_alone.*InPlace changes the states that it is given in place",
    Coupled: "rows_do_not_know_of_each_other.*its energy is off by .*: normalisation over the batch",
    Random: "energies_do_not_change.*two calls differ by .*: switch off dropout",
    Infinite: "energies_are_numbers.*energies of finite states are finite",
    DeafToRows: "each_row_may_have_its_noise_level.*energies are off by",
}


def test_what_is_right_passes():
    a, b, _ = gaussians()
    for energy in (Own(), a + 0.5 * b, ceb.from_score(lambda x: -x, event_shape=(2,))):
        check_energy(energy, x)
    check_energy(Own(), x.double())


@pytest.mark.parametrize("kind", WRONG, ids=lambda kind: kind.__name__)
def test_wrong_energy_is_caught_by_name(kind):
    with pytest.raises(ContractError, match=f"^{kind.__name__} breaks `{WRONG[kind]}"):
        check_energy(kind(), x)


def test_network_with_batch_norm_in_training_mode_is_caught():
    net = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.SiLU(), nn.Linear(8, 1)).train()
    energy = ceb.from_callable(net, name="mine", event_shape=(2,))
    with pytest.raises(ContractError, match="mine breaks `rows_do_not_know_of_each_other`"):
        check_energy(energy, x)
    check_energy(energy.eval(), x)


def test_one_state_is_too_few():
    with pytest.raises(ValueError, match="`x` must hold at least two states, got 1"):
        check_energy(Own(), x[:1])


@dataclasses.dataclass(frozen=True)
class Walk(ceb.Kernel):
    """A user's kernel: random walk Metropolis."""

    needs_energy = True
    temperature_at = 1.0

    def step(self, potential, state, noise, dynamics):
        moved = State(state.x + dynamics.step_size * noise.normal(state.x), state.energy, state.gradient)
        new = State(moved.x, *potential(moved.x))
        gap = self.temperature_at * (state.energy - new.energy) / dynamics.temperature
        chance = gap.clamp(max=0).exp().nan_to_num(nan=0.0)
        taken = noise.uniform(state.x) < chance
        parts = [
            torch.where(taken.reshape(-1, *[1] * (a.ndim - 1)), b, a)
            for a, b in zip(state[:3], new[:3], strict=True)
        ]
        return State(*parts), Info(chance)


class Hot(Walk):
    temperature_at = 0.9


class Global(Walk):
    def step(self, potential, state, noise, dynamics):
        state = state._replace(x=state.x + 0.01 * torch.randn(state.x.shape) * (potential.mask is None))
        return super().step(potential, state._replace(energy=potential(state.x)[0]), noise, dynamics)


class Overwriting(Walk):
    def step(self, potential, state, noise, dynamics):
        state.x.add_(0.1 * noise.normal(state.x))
        return super().step(potential, state, noise, dynamics)


class Loose(Walk):
    def step(self, potential, state, noise, dynamics):
        new, info = super().step(potential, state, noise, dynamics)
        return new._replace(x=new.x + 1e-3), info


class Silent(Walk):
    def step(self, potential, state, noise, dynamics):
        return super().step(potential, state, noise, dynamics)[0], Info()


def test_right_kernels_pass():
    check_kernel(Walk(0.5))
    check_kernel(ceb.Langevin(0.3), variance=1 / (1 - 0.3))
    check_kernel(ceb.DMALA(0.4), variance=None)


@pytest.mark.parametrize(
    ("kernel", "variance", "message"),
    [
        (Hot(0.8), 1.0, "Hot.* breaks `law_stays`: after six .* the variance is .* standard errors off"),
        (ceb.Langevin(0.3), 1.0, "Langevin.* breaks `law_stays`.*the variance is"),
        (Global(0.5), 1.0, "Global.* breaks `(steps_are|draws_come)"),
        (Overwriting(0.5), 1.0, "Overwriting.* breaks `steps_are_functions_of_their_arguments`"),
        (Loose(0.5), 1.0, "Loose.* breaks `held_parts_stay`"),
        (
            Silent(0.5),
            1.0,
            "Silent.* breaks `steps_keep_shapes_and_types`: it compares energies, and",
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, ceb.Kernel) else "",
)
def test_wrong_kernel_is_caught_by_name(kernel, variance, message):
    with pytest.raises(ContractError, match=message):
        check_kernel(kernel, variance=variance)
