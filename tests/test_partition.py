"""Normalising constants: estimates against closed forms."""

import math

import pytest
import torch

import composable_ebm as ceb
from composable_ebm.partition.calibrate import LogZ, calibrate, log_z_difference, log_z_over_noise
from composable_ebm.sampling.schedule import Curve, Schedule


def shifted(energy: ceb.Energy, nats: float) -> ceb.Energy:
    """The same density, its Z multiplied by exp(-nats)."""
    return ceb.from_callable(lambda x: energy(x) + nats, name="shifted", event_shape=energy.event_shape)


@pytest.mark.parametrize("first", [torch.float32, torch.float64])
@pytest.mark.parametrize("second", [torch.float32, torch.float64, torch.bfloat16])
def test_log_z_differences_of_any_two_precisions_are_estimated(first, second):
    a = ceb.analytic.Gaussian([0.0, 0.0]).to(first)
    linear = torch.nn.Linear(2, 1).to(second)
    torch.nn.init.zeros_(linear.weight), torch.nn.init.ones_(linear.bias)
    b = a + ceb.from_callable(linear, event_shape=(2,), name="one")
    found = ceb.log_z_difference(a, b, ceb.MALA(0.3), num_chains=32, num_levels=4, burn_in=4)
    assert found.value == pytest.approx(-1, abs=0.02)


def test_log_z_difference_of_far_gaussians_is_exact_to_its_error():
    a = ceb.analytic.Gaussian([0.0, 0.0], 1.0)
    b = shifted(ceb.analytic.Gaussian([4.0, 0.0], 0.5), 3.0)
    found = log_z_difference(a, b, ceb.MALA(0.3), num_chains=400, burn_in=200)
    assert found.value == pytest.approx(-3.0, abs=5 * found.error)
    assert found.error < 0.1
    assert found.forward == pytest.approx(found.backward, abs=0.5)


def test_log_z_difference_of_a_weighted_energy_is_the_gaussian_integral():
    # exp(-E/4) of a standard normal in d dimensions: log Z = (d/2) log 2π (1/4 - 1) ... by hand below.
    a = ceb.analytic.Gaussian([0.0, 0.0], 1.0)
    log_z = (2 / 2) * math.log(2 * math.pi * 4) - 0.25 * (2 / 2) * math.log(2 * math.pi)
    found = log_z_difference(a, 0.25 * a, ceb.MALA(0.5), num_chains=400, burn_in=200)
    assert found.value == pytest.approx(log_z, abs=5 * found.error + 1e-3)


def test_calibrated_mixture_draws_the_proportions_asked_for():
    a = ceb.analytic.Gaussian([-1.0], 0.3)
    b = shifted(ceb.analytic.Gaussian([1.0], 0.3), 2.0)
    plain = ceb.mixture([a, b], weights=[0.25, 0.75])
    right = calibrate(plain, ceb.MALA(0.2), num_chains=400, burn_in=200)
    x = torch.linspace(-6, 6, 4001)[:, None]

    def share_of_b(e):
        return float((-e(x)).exp()[x[:, 0] > 0].sum() / (-e(x)).exp().sum())

    truth = share_of_b(ceb.mixture([a, b], weights=[0.25, 0.75], log_z=[0, -2]))
    assert abs(share_of_b(plain) - truth) > 0.3
    assert share_of_b(right) == pytest.approx(truth, abs=0.03)


def test_only_mixtures_are_calibrated_and_only_at_temperature_one():
    a = ceb.analytic.Gaussian([0.0], 1.0)
    with pytest.raises(TypeError, match="only a mixture has proportions"):
        calibrate(a, ceb.MALA(0.1))
    with pytest.raises(ValueError, match="use a kernel at temperature 1"):
        log_z_difference(a, a, ceb.MALA(0.1, temperature=2.0))


class Unnormalised(ceb.Energy):
    """The same density at every noise level, its Z another one at each."""

    noise_conditioned = True

    def __init__(self, inner, log_z):
        super().__init__()
        self.inner, self.log_z, self.event_shape = inner, log_z, inner.event_shape

    def energy(self, x, noise_level=None):
        sigma = torch.tensor(0.02) if noise_level is None else noise_level
        return self.inner(x, noise_level=noise_level) - self.log_z(sigma)


def wavy(sigma):
    return -2 - 1.5 * torch.sin(2 * sigma.log())


ANNEALED = ceb.Annealed(
    ceb.Langevin(0.3),
    Schedule(
        noise_level=Curve(((0.0, 10.0), (1.0, 0.02)), "karras"), noise_power=2.0, predict=True, num_levels=40
    ),
)


def test_log_z_over_noise_is_the_constant_of_each_level_while_components_overlap():
    a = ceb.analytic.Gaussian([-1.0, 0.0], 0.01)
    b = Unnormalised(ceb.analytic.Gaussian([1.0, 0.0], 0.01), wavy)
    levels, log_z = log_z_over_noise([a, b], ANNEALED, num_steps=80, num_chains=512)
    overlap = levels > 0.7
    assert int(overlap.sum()) > 5
    assert not log_z[:, 0].any()
    assert torch.allclose(log_z[overlap, 1], wavy(levels[overlap]), atol=0.25)


def test_an_annealed_mixture_needs_log_z_at_every_level():
    share = 0.8
    a = ceb.analytic.Gaussian([-1.0, 0.0], 0.01)
    b = Unnormalised(ceb.analytic.GaussianMixture([[1.0, 0.3], [1.0, -0.3]], 0.01), wavy)
    plain = ceb.mixture([a, b], weights=[share, 1 - share])
    right = calibrate(plain, ANNEALED, num_steps=80, num_chains=600)

    def share_of_a(mixture):
        x = ceb.sample(mixture, num_chains=2000, num_steps=80, sampler=ANNEALED, seed=1).samples
        return float((x[:, 0] < 0).float().mean())

    assert abs(share_of_a(plain) - share) > 0.1
    assert share_of_a(right) == pytest.approx(share, abs=0.035)


def test_log_z_is_interpolated_between_levels_and_held_beyond():
    energy = LogZ(torch.tensor([10.0, 1.0, 0.1]), torch.tensor([3.0, 1.0, 0.0]))
    x = torch.zeros(2, 5)
    assert energy(x).tolist() == [0, 0]
    for level, expected in ((1.0, 1.0), (10.0**0.5, 2.0), (100.0, 3.0), (0.01, 0.0)):
        assert energy(x, noise_level=torch.tensor(level)).tolist() == pytest.approx([expected] * 2, abs=1e-5)


def test_log_z_over_noise_is_refused_where_there_is_no_noise():
    a = ceb.analytic.Gaussian([0.0], 1.0)
    cooling = ceb.Annealed(ceb.Langevin(0.1), Schedule(temperature=Curve(((0, 2.0), (1, 1.0)))))
    with pytest.raises(ValueError, match="needs a sampler annealed over noise levels"):
        calibrate(a | a, cooling, num_steps=10)
    with pytest.raises(ValueError, match="takes no noise level: calibrate with a kernel"):
        calibrate(a | shifted(a, 1.0), ANNEALED, num_steps=10)
