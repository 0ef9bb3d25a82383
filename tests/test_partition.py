"""Normalising constants: estimates against closed forms."""

import math

import pytest
import torch

import composable_ebm as ceb
from composable_ebm.partition import calibrate, log_z_difference


def shifted(energy: ceb.Energy, nats: float) -> ceb.Energy:
    """The same density, its Z multiplied by exp(-nats)."""
    return ceb.from_callable(lambda x: energy(x) + nats, name="shifted", event_shape=energy.event_shape)


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
