"""Kernels against closed forms: one contract for all, and the limits their docstrings state.

Many chains, few steps: a variance over 200,000 chains has a relative standard error of 0.3 %.
"""

import itertools
import json
import math

import pytest
import torch
from helpers import Counted, Quadratic, Wide, points, variance_error

import composable_ebm as ceb
from composable_ebm.energy.base import Axes
from composable_ebm.potential.potential import Potential, Tally
from composable_ebm.sampling import Noise
from composable_ebm.sampling.chain import Chain
from composable_ebm.sampling.kernel import Dynamics
from composable_ebm.sampling.schedule import Schedule, constant, geometric, karras, linear

CHAINS = 200_000
KERNELS = [
    ceb.Langevin(0.1),
    ceb.Langevin(0.1, noise_scale=0.3, grad_clip=1.0, clamp=(-2, 2), noise_first=True),
    ceb.MALA(0.2),
    ceb.HMC(0.5, num_leapfrog=3),
    ceb.UnderdampedLangevin(0.3, friction=2.0),
    ceb.LeimkuhlerMatthews(0.1),
]


def run(energy, kernel, start, num_steps, seed=0, **options):
    """A chain that has taken some steps from `start`."""
    noise = Noise((torch.Generator().manual_seed(seed), len(start)))
    chain = ceb.Chain(energy, start, kernel, noise, num_steps=num_steps, **options)
    chain.advance(num_steps)
    return chain


def exact(precision, mean, temperature, seed=9):
    return mean + points(CHAINS, (1,), seed) * math.sqrt(temperature / precision)


# --- one contract for every sampler --------------------------------------------------------------


@pytest.fixture(params=KERNELS, ids=lambda k: type(k).__name__)
def kernel(request):
    return request.param


def test_step_keeps_shape_and_dtype(kernel):
    x = points(5, (2, 3), dtype=torch.float64)
    energy = ceb.from_callable(lambda s: s.square().flatten(1).sum(1))
    state = run(energy, kernel, x, 3).state
    assert state.x.shape == x.shape
    assert {t.dtype for t in state if t is not None} == {torch.float64}
    assert state.energy.shape == (5,)


def test_same_seed_gives_the_same_samples_and_another_seed_others(kernel):
    one, same, other = (run(Quadratic(), kernel, torch.zeros(6, 1), 5, seed).x for seed in (1, 1, 2))
    torch.testing.assert_close(one, same, rtol=0, atol=0)
    assert (one != other).any()


def test_step_takes_as_many_gradients_as_it_says(kernel):
    tally = Tally()
    potential = Potential(Quadratic(), tallies=[tally])
    noise = Noise((torch.Generator().manual_seed(0), 4))
    state = kernel.init(potential, torch.zeros(4, 1), noise)
    before = tally.gradients
    kernel.step(potential, state, noise, kernel.dynamics(state.x))
    assert tally.gradients - before == kernel.gradients_per_step


def test_state_holds_energy_and_gradient_of_its_states(kernel):
    chain = run(Quadratic(3.0), kernel, points(6, (1,)), 4)
    energy, gradient = chain.potential(chain.x)
    if kernel.energy_is_current:
        torch.testing.assert_close(chain.state.energy, energy)
        torch.testing.assert_close(chain.state.gradient, gradient)
    else:
        assert not torch.allclose(chain.state.energy, energy)


def test_rows_with_their_own_step_size_and_temperature_run_as_if_alone(kernel):
    x, rows = points(3, (2,)), [(0.1, 1.0), (0.05, 0.5), (0.2, 2.0)]
    energy = Quadratic(1.5, dimension=2)

    def walk(start, dynamics, sources):
        noise = Noise(*sources)
        potential = Potential(energy)
        state = ceb.sampling.State(start, *potential(start), torch.zeros_like(start))
        for _ in range(20):
            state, _ = kernel.step(potential, state, noise, dynamics)
        return state.x

    def generator(i):
        return torch.Generator().manual_seed(i)

    eta, temperature = torch.tensor(rows).T
    together = walk(x, Dynamics(eta, temperature), [(generator(i), 1) for i in range(3)])
    for i in range(3):
        alone = walk(x[i : i + 1], Dynamics(eta[i], temperature[i]), [(generator(i), 1)])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-5, atol=1e-5)


def test_settings_describe_the_kernel_and_build_it_again(kernel):
    again, num_steps = ceb.sampling.from_settings({**kernel.settings(), "num_steps": 7})
    assert again == kernel
    assert num_steps == 7


def test_still_leaves_the_reverse_diffusion_alone_at_one_gradient_a_level():
    mean, spread, levels = 0.7, 0.5, 40
    normal = ceb.analytic.Gaussian([mean], [spread**2])
    start = points(50, (1,)) * 20.0
    schedule = Schedule(noise_level=karras(20.0, 0.01), predict=True)
    chain = run(normal, ceb.Annealed(ceb.Still(), schedule), start, levels)
    assert chain.block.tally.gradients == levels + 1

    x, sigmas = start, [*schedule.values(schedule.noise_level, levels), 0.0]
    for sigma, after in itertools.pairwise(sigmas):  # Euler's method on dx/dσ = (x - D)/σ
        denoised = x + sigma**2 * normal.score(x, noise_level=torch.tensor(sigma))
        x = x + (after - sigma) * (x - denoised) / sigma
    torch.testing.assert_close(chain.x, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("eta", [0.3, 1.0, 1.8])
def test_averaged_noise_leaves_every_variance_as_it_is_at_every_stable_step(eta):
    kernel = ceb.LeimkuhlerMatthews(eta, temperature=0.8)
    chain = run(Quadratic(1.0), kernel, points(4000, (1,)), 60)
    drawn = torch.cat([chain.advance(3).clone() for _ in range(20)])
    assert drawn.var().item() == pytest.approx(0.8, rel=0.03)
    # Langevin itself is 1 / (1 - η/2) too wide.


def held_at(sigma, start, mask=None, steps=1):
    """Chains that stay at one noise level, of a density of variance 900 along one coordinate."""
    levels = Schedule(noise_level=constant(sigma), noise_power=2)
    sampler = ceb.Annealed(ceb.LeimkuhlerMatthews(0.3), levels)
    noise = Noise((torch.Generator().manual_seed(1), len(start)))
    wide = Wide([900.0, 1.0, 4.0])
    chain = Chain(wide, start, sampler, noise, num_steps=10_000, mask=mask, record=False)
    chain.advance(steps)
    return chain


def test_longer_steps_along_wide_axes_forget_sooner_and_leave_every_variance_as_it_is():
    sigma, n = 10.0, 4000
    exact = torch.tensor([900.0, 1.0, 4.0]) + sigma**2
    start = points(n, (3,)) * exact.sqrt()
    chain = held_at(sigma, start)
    correlation = (chain.x * start).mean(0) / exact
    # A step keeps 1 - η: where data add nothing to the noise that is 0.7, of the wide axis 0.97 without.
    assert correlation.tolist() == pytest.approx([0.85, 0.7, 0.71], abs=0.05)
    drawn = torch.cat([chain.advance(3).clone() for _ in range(30)])
    assert drawn.var(0).tolist() == pytest.approx(exact.tolist(), rel=0.03)


def test_wide_axes_are_found_in_any_order():
    levels = Schedule(noise_level=constant(10.0), noise_power=2)
    sampler = ceb.Annealed(ceb.LeimkuhlerMatthews(0.3), levels)
    energy, start = Wide([900.0, 1.0, 4.0]), points(4, (3,))
    found = energy.principal_axes(3)
    energy.principal_axes = lambda size: Axes(found.directions.flip(0), found.variances.flip(0))
    noise = Noise((torch.Generator().manual_seed(1), 4))
    chain = Chain(energy, start, sampler, noise, num_steps=10, record=False)
    steps = chain.block.scheduled().steps
    assert steps.max().item() == pytest.approx(1.5 * 10.0**2)  # the longest that there is


def test_masked_chains_take_no_steps_along_axes_of_whole_states():
    start = torch.full((50, 3), 5.0)
    chain = held_at(10.0, start, mask=torch.tensor([0.0, 1.0, 1.0]), steps=5)
    assert (chain.x[:, 0] == 5).all()
    assert (chain.x[:, 1:] != 5).all()


# --- closed forms --------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("noise_first", [False, True])
def test_langevin_variance_matches_closed_form_at_a_large_step(temperature, noise_first):
    p, eta, mean = 4.0, 0.35, 0.7  # ηp = 1.4: the variance is 3.3 times the exact one
    kernel = ceb.Langevin(eta, temperature=temperature, noise_first=noise_first)
    x = run(Quadratic(p, mean), kernel, exact(p, mean, temperature), 25).x
    expected = temperature / (p * (1 - eta * p / 2))
    if noise_first:  # the state is seen after the drift, which contracts by 1 - ηp
        expected *= (1 - eta * p) ** 2
    assert variance_error(x, expected) < 0.01
    assert abs(float(x.mean()) - mean) < 4 * math.sqrt(expected / CHAINS)


@pytest.mark.parametrize(("start", "temperature"), [("exact", 0.5), ("exact", 2.0), ("zero", 1.0)])
@pytest.mark.parametrize("family", [ceb.MALA, ceb.HMC, ceb.UnderdampedLangevin])
def test_adjusted_and_splitting_kernels_have_the_exact_variance(family, temperature, start):
    p, mean = 4.0, 0.7
    kernel = {
        ceb.MALA: ceb.MALA(0.3, temperature=temperature),
        # Frequency √p, in units where the momentum has temperature 1: the mass is T.
        ceb.HMC: ceb.HMC(0.75 * math.sqrt(temperature), temperature=temperature, num_leapfrog=3),
        ceb.UnderdampedLangevin: ceb.UnderdampedLangevin(0.7, temperature=temperature, friction=1.0),
    }[family]
    x = exact(p, mean, temperature) if start == "exact" else torch.zeros(CHAINS, 1)
    chain = run(Quadratic(p, mean), kernel, x, 10 if start == "exact" else 40)
    assert variance_error(chain.x, temperature / p) < 0.01
    assert abs(float(chain.x.mean()) - mean) < 4 * math.sqrt(temperature / p / CHAINS)
    if chain.trace().acceptance is not None:
        # The step is large enough for a wrong acceptance to show.
        assert 0.5 < float(chain.trace().acceptance[-1].mean()) < 0.97


@pytest.mark.parametrize("kernel", [ceb.MALA(0.15), ceb.HMC(0.4, num_leapfrog=3)], ids=["MALA", "HMC"])
def test_correlated_gaussian_has_its_covariance(kernel):
    covariance = torch.tensor([[1.0, 0.6], [0.6, 0.5]])
    target = ceb.analytic.Gaussian([1.0, -1.0], covariance)
    x = run(target, kernel, target.draw(40_000, torch.Generator().manual_seed(5)), 15).x
    torch.testing.assert_close(torch.cov(x.T), covariance, rtol=0, atol=0.02)
    torch.testing.assert_close(x.mean(0), torch.tensor([1.0, -1.0]), rtol=0, atol=0.02)


def test_product_of_experts_is_sampled_from_its_closed_form():
    # Precisions 2 and 6 at -1 and 1, the second with weight 1/2: precision 5, mean 0.2.
    product = Quadratic(2.0, -1.0) + 0.5 * Quadratic(6.0, 1.0)
    x = run(product, ceb.HMC(0.5, num_leapfrog=3), exact(5.0, 0.2, 1.0), 12).x
    assert variance_error(x, 1 / 5) < 0.01
    assert abs(float(x.mean()) - 0.2) < 4 * math.sqrt(0.2 / CHAINS)


def test_modes_of_a_mixture_are_visited_in_proportion_to_their_weights():
    left, right = ceb.analytic.Gaussian(-1.2, 0.3), ceb.analytic.Gaussian(1.2, 0.3)
    mix = ceb.mixture([left, right], weights=[3, 1])
    start = torch.where(torch.arange(20_000) % 2 == 0, -1.2, 1.2)[:, None]
    x = run(mix, ceb.HMC(0.4, num_leapfrog=4), start, 60).x
    beyond = float(torch.distributions.Normal(1.2, math.sqrt(0.3)).cdf(torch.tensor(0.0)))
    expected = 0.75 * (1 - beyond) + 0.25 * beyond
    assert abs(float((x < 0).float().mean()) - expected) < 4 * math.sqrt(0.19 / 20_000)


def test_first_moments_in_a_double_well():
    well = ceb.analytic.DoubleWell(barrier=1.5)
    truth = well.draw(100_000, torch.Generator().manual_seed(1))
    x = run(well, ceb.MALA(0.15), well.draw(50_000, torch.Generator().manual_seed(2)), 15).x
    for statistic in (torch.abs, torch.square, lambda s: s**4):
        spread = float(statistic(truth).std()) * math.sqrt(1 / 100_000 + 1 / 50_000)
        assert abs(float(statistic(x).mean() - statistic(truth).mean())) < 4 * spread


# --- limits that the docstrings state ------------------------------------------------------------


class Constant(ceb.Energy):
    """Flat, so that every proposal is accepted."""

    def energy(self, x, noise_level=None):
        return 0 * x.flatten(1).sum(1)


def test_mala_with_every_step_accepted_is_langevin():
    x = points(6)
    one = run(Constant(), ceb.MALA(0.2, temperature=0.7), x, 1)
    noise = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(one.x, x + math.sqrt(2 * 0.2 * 0.7) * noise)
    # And where some are rejected, the accepted ones are those of Langevin.
    target = Quadratic(2.0, dimension=2)
    adjusted, plain = (
        run(target, k(0.4, temperature=0.7), points(100), 1).x for k in (ceb.MALA, ceb.Langevin)
    )
    moved = (adjusted != points(100)).any(dim=1)
    assert 50 < int(moved.sum()) < 100
    torch.testing.assert_close(adjusted[moved], plain[moved])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_hmc_with_one_leapfrog_step_is_mala(temperature):
    epsilon = 0.6
    target = ceb.analytic.GaussianMixture([[0.0, 1.0], [1.0, -1.0]], 0.4)
    hmc = ceb.HMC(epsilon, temperature=temperature, num_leapfrog=1)
    mala = ceb.MALA(epsilon**2 / (2 * temperature), temperature=temperature)
    one, two = (run(target, k, points(200), 20) for k in (hmc, mala))
    torch.testing.assert_close(one.trace().acceptance, two.trace().acceptance, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(one.x, two.x, rtol=1e-3, atol=1e-4)
    assert one.trace().acceptance.min() < 0.9


def test_underdamped_at_infinite_friction_is_langevin_with_averaged_noise():
    h, temperature = 0.4, 0.8
    kernel = ceb.UnderdampedLangevin(h, temperature=temperature, friction=1e4)
    target = Quadratic(2.0)
    chain = run(target, kernel, points(50, (1,)), 12)
    generator = torch.Generator().manual_seed(0)
    xi = [torch.randn(50, 1, generator=generator) for _ in range(13)]  # the first is the momentum
    x = points(50, (1,))
    for step in range(12):
        gradient = 2.0 * x
        last = xi[step] if step else xi[0] + h / 2 * gradient / math.sqrt(temperature)
        x = x - h**2 / 2 * gradient + h * math.sqrt(temperature) * (xi[step + 1] + last) / 2
    torch.testing.assert_close(chain.x, x, rtol=1e-4, atol=1e-4)


def test_decoupled_noise_at_the_coupled_scale_is_plain_langevin():
    eta = 0.05
    one = run(Quadratic(), ceb.Langevin(eta, noise_scale=math.sqrt(2 * eta)), points(6, (1,)), 20).x
    torch.testing.assert_close(one, run(Quadratic(), ceb.Langevin(eta), points(6, (1,)), 20).x)


def test_langevin_without_noise_descends():
    x = run(Quadratic(2.0), ceb.Langevin(0.1, noise_scale=0.0), torch.ones(3, 1), 10).x
    torch.testing.assert_close(x, torch.full((3, 1), 0.8**10))


def test_noise_first_takes_the_gradient_after_the_noise():
    eta, s = 0.1, 0.3
    x = points(6, (1,))
    noise = torch.randn(6, 1, generator=torch.Generator().manual_seed(0))
    y = x + s * noise
    first = run(Quadratic(2.0), ceb.Langevin(eta, noise_scale=s, noise_first=True), x, 1)
    torch.testing.assert_close(first.x, y - eta * 2 * y)
    torch.testing.assert_close(first.trace().energy[0], y.square().sum(1))
    last = run(Quadratic(2.0), ceb.Langevin(eta, noise_scale=s), x, 1)
    torch.testing.assert_close(last.x, x - eta * 2 * x + s * noise)


def test_gradient_is_clipped_element_by_element():
    energy = ceb.from_callable(lambda x: 100 * x[:, 0] + 0.01 * x[:, 1])
    x = run(energy, ceb.Langevin(1.0, noise_scale=0.0, grad_clip=0.03), torch.zeros(2, 2), 1).x
    torch.testing.assert_close(x, torch.tensor([[-0.03, -0.01]] * 2))


@pytest.mark.parametrize("noise_first", [False, True])
def test_clamp_keeps_states_between_its_bounds(noise_first):
    seen = []
    energy = ceb.from_callable(lambda x: seen.append(x.detach()) or -3 * x.sum(1), event_shape=(2,))
    kernel = ceb.Langevin(0.5, clamp=(-1, 0.5), noise_first=noise_first)
    x = run(energy, kernel, torch.zeros(50, 2), 5).x
    assert x.max() == 0.5
    assert x.min() >= -1
    assert all(y.abs().max() <= 1 for y in seen)


def test_implied_temperature_is_that_of_the_coupled_dynamics():
    assert ceb.Langevin(10.0, noise_scale=0.005).implied_temperature == pytest.approx(1.25e-6)
    assert ceb.Langevin(0.1, temperature=0.3).implied_temperature == 0.3
    assert ceb.MALA(0.1, temperature=2.0).implied_temperature == 2.0


def test_implied_temperature_is_what_a_decoupled_chain_shows():
    kernel = ceb.Langevin(0.01, noise_scale=0.2)  # T = 2
    x = run(Quadratic(), kernel, exact(1.0, 0.0, 2.0), 30).x
    assert variance_error(x, 2 / (1 - 0.005)) < 0.01


def test_scaled_kernel_keeps_its_temperature():
    kernel = ceb.Langevin(10.0, noise_scale=0.005).scaled(0.25)
    assert kernel.step_size == 2.5
    assert kernel.implied_temperature == pytest.approx(1.25e-6)
    assert ceb.MALA(0.2, temperature=3.0).scaled(0.5) == ceb.MALA(0.1, temperature=3.0)


# --- adaptation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [0.1, 3.0])
@pytest.mark.parametrize(
    ("family", "target", "options"),
    [(ceb.MALA, 0.574, {}), (ceb.HMC, 0.8, {"num_leapfrog": 3})],
)
def test_warm_up_reaches_the_target_acceptance(start, family, target, options):
    energy = Quadratic(4.0, dimension=10)
    out = ceb.sample(
        energy,
        init=points(200, (10,)) / 2,
        sampler=family(start, target_acceptance=target, **options),
        num_warmup=120,
        num_steps=60,
    )
    assert out.acceptance_rate == pytest.approx(target, abs=0.05)
    after = out.trace.step_size[120:]
    assert after.min() == after.max()  # adaptation ends with the warm-up
    assert out.num_steps == 180


def test_without_warm_up_the_step_size_stays():
    out = ceb.sample(Quadratic(), num_steps=5, sampler=ceb.MALA(0.3, target_acceptance=0.6))
    torch.testing.assert_close(out.trace.step_size, torch.full((5,), 0.3))


# --- annealing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("curve", ["temperature", "step_scale"])
def test_annealed_at_constant_one_is_the_kernel_itself(kernel, curve):
    annealed = ceb.Annealed(kernel, Schedule(**{curve: constant(1.0)}))
    one, two = (run(Quadratic(), k, points(6, (1,)), 8).x for k in (annealed, kernel))
    torch.testing.assert_close(one, two, rtol=0, atol=0)


@pytest.mark.parametrize("family", [ceb.Langevin, ceb.MALA, ceb.HMC, ceb.UnderdampedLangevin])
def test_annealed_temperature_multiplies_that_of_the_kernel(family):
    annealed = ceb.Annealed(family(0.2, temperature=0.5), Schedule(temperature=constant(3.0)))
    target, x = Quadratic(), points(6, (1,))
    if family is ceb.UnderdampedLangevin:  # its first momentum is drawn at the kernel's own temperature
        chain = run(target, annealed, exact(1.0, 0.0, 1.5), 40)
        assert variance_error(chain.x, 1.5) < 0.01
        return
    one, two = run(target, annealed, x, 8).x, run(target, family(0.2, temperature=1.5), x, 8).x
    torch.testing.assert_close(one, two)


def test_step_scale_multiplies_the_step_and_decoupled_noise():
    annealed = ceb.Annealed(ceb.Langevin(0.2, noise_scale=0.4), Schedule(step_scale=constant(0.5)))
    plain = ceb.Langevin(0.1, noise_scale=0.2)
    one, two = (run(Quadratic(), k, points(6, (1,)), 8).x for k in (annealed, plain))
    torch.testing.assert_close(one, two)


def test_each_level_of_noise_reaches_noise_conditioned_energies_only():
    inner = Counted(Quadratic())
    silent = ceb.from_callable(lambda x: x.square().sum(1))  # would fail on a second argument
    schedule = Schedule(noise_level=geometric(1.0, 0.01), num_levels=3)
    run(inner + silent, ceb.Annealed(ceb.Langevin(0.1), schedule), torch.zeros(2, 1), 6)
    # At the start and after each step; a new level is evaluated at the state that it finds.
    assert inner.levels == pytest.approx([1, 1, 1, 0.1, 0.1, 0.1, 0.01, 0.01, 0.01])


@pytest.mark.parametrize("kernel", [ceb.Langevin(0.2), ceb.MALA(0.3), ceb.HMC(0.5, num_leapfrog=2)])
def test_annealing_ends_in_the_undiffused_density(kernel):
    target = ceb.analytic.Gaussian(0.5, 0.5)
    schedule = Schedule(noise_level=linear(2.0, 0.0), num_levels=5)
    x = run(target, ceb.Annealed(kernel, schedule), 3 * points(30_000, (1,)), 60).x
    bias = 1 - 0.2 / 0.5 / 2 if isinstance(kernel, ceb.Langevin) else 1
    assert variance_error(x, 0.5 / bias) < 0.03


def test_noise_level_changes_the_target_at_once():
    # One exact step of a chain at its new level: the gradient must not be the one of the old level.
    target = ceb.analytic.Gaussian(0.0, 1.0)
    schedule = Schedule(noise_level=linear(3.0, 0.0), num_levels=2)
    x = run(target, ceb.Annealed(ceb.Langevin(0.5, noise_scale=0.0), schedule), torch.ones(1, 1), 2).x
    torch.testing.assert_close(x, torch.full((1, 1), (1 - 0.5 / 10) * (1 - 0.5)))


def test_annealed_kernel_with_a_target_adapts_until_its_last_level():
    schedule = Schedule(temperature=geometric(4.0, 1.0), num_levels=4)
    kernel = ceb.Annealed(ceb.MALA(3.0, target_acceptance=0.6), schedule)
    chain = run(Quadratic(dimension=5), kernel, points(300, (5,)), 120)
    step_size = chain.trace().step_size
    assert step_size[90:].min() == step_size[90:].max()
    assert step_size[:90].unique().numel() > 80
    assert float(chain.trace().acceptance[90:].mean()) == pytest.approx(0.6, abs=0.07)


def test_schedule_reaches_both_ends_whatever_the_number_of_steps():
    for num_steps in (2, 3, 10, 50):
        for num_levels in (None, 2, 10):
            values = Schedule(num_levels=num_levels).values(linear(5.0, 1.0), num_steps)
            assert (values[0], values[-1]) == (5.0, 1.0)
    assert Schedule(num_levels=2).levels(6) == [0, 0, 0, 1, 1, 1]


def test_curves_have_the_values_of_their_formulas():
    ceb_curves = ceb.schedules
    assert [linear(2.0, 4.0)(t) for t in (0, 0.5, 1)] == [2, 3, 4]
    assert geometric(1.0, 0.01)(0.5) == pytest.approx(0.1)
    assert [ceb_curves.cosine(1.0, 0.0)(t) for t in (0, 0.5, 1)] == pytest.approx([1, 0.5, 0])
    held = ceb_curves.hold_then(linear(1.0, 0.0), 0.5)
    assert [held(t) for t in (0, 0.5, 0.75, 1)] == [1, 1, 0.5, 0]


def test_curve_runs_through_its_knots():
    curve = ceb.schedules.through((0, 1.0), (0.1, 0.25), (1, 0.01))
    assert [curve(t) for t in (0, 0.05, 0.1, 1)] == pytest.approx([1, 0.5, 0.25, 0.01])
    assert repr(curve) == "through((0, 1), (0.1, 0.25), (1, 0.01), between='geometric')"


def test_stored_settings_give_the_sampler_back_scaled_to_the_composition():
    curve = ceb.schedules.hold_then(ceb.schedules.cosine(1.0, 0.02), 0.75)
    stored = ceb.Annealed(ceb.Langevin(0.4, noise_scale=0.1), ceb.Schedule(step_scale=curve))
    settings = json.loads(json.dumps({**ceb.sampling.to_settings(stored), "num_steps": 40}))
    assert ceb.sampling.from_settings(settings) == (stored, 40)
    sampler, num_steps = ceb.sampling.from_settings(settings, 0.5)
    step_size = run(Quadratic(), sampler, torch.zeros(1, 1), num_steps).trace().step_size
    torch.testing.assert_close(step_size[:29], torch.full((29,), 0.2))
    torch.testing.assert_close(step_size[-1], torch.tensor(0.2 * 0.02))


def test_stored_particles_are_particles_again():
    levels = ceb.Schedule(noise_level=ceb.schedules.karras(10.0, 0.02), predict=True, num_levels=20)
    stored = ceb.Particles(
        ceb.MALA(0.1), levels, num_particles=500, per_chain=3.0, threshold=0.5, verdict=True
    )
    settings = json.loads(json.dumps({**ceb.sampling.to_settings(stored), "num_steps": 40}))
    assert ceb.sampling.from_settings(settings) == (stored, 40)
    carried = ceb.Particles(ceb.MALA(0.1), levels, carrier=Quadratic())
    with pytest.raises(ValueError, match="cannot be stored"):
        ceb.sampling.to_settings(carried)


# --- other libraries -----------------------------------------------------------------------------


def short_run(kernel, start, num_steps=50):
    """Ours, with the draws that a library with the global generator would make."""
    target = Quadratic(1.5, 0.3, dimension=4)
    return run(target, kernel, start, num_steps, seed=11).x


@pytest.mark.parametrize("options", [{}, {"noise_scale": 0.02, "grad_clip": 0.4, "clamp": (-1.0, 1.0)}])
def test_langevin_walks_as_in_ebmkit(options):
    ebm = pytest.importorskip("ebm")
    x, target = points(16, (4,)), Quadratic(1.5, 0.3, dimension=4)
    torch.manual_seed(11)
    theirs = ebm.samplers.LangevinDynamics(step_size=0.05, steps=50, **options).sample(target, x)
    torch.testing.assert_close(short_run(ceb.Langevin(0.05, **options), x), theirs, rtol=1e-5, atol=1e-5)


def test_langevin_walks_as_in_torchebm():
    pytest.importorskip("torchebm")
    from torchebm.core import BaseModel
    from torchebm.samplers import LangevinDynamics

    class Model(BaseModel):
        def forward(self, x):
            return 1.5 / 2 * (x - 0.3).square().sum(1)

    x = points(16, (4,))
    torch.manual_seed(11)
    theirs = LangevinDynamics(Model(), step_size=0.05).sample(x=x.clone(), n_steps=50)
    torch.testing.assert_close(short_run(ceb.Langevin(0.05), x), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (ceb.MALA(0.3), ("MALA", {"step_size": 0.3})),
        (ceb.HMC(0.7, num_leapfrog=2), ("HMC", {"step_size": 0.7, "leapfrog_steps": 2})),
    ],
    ids=["MALA", "HMC"],
)
def test_adjusted_kernels_accept_as_often_as_in_ebmkit(ours, theirs):
    ebm = pytest.importorskip("ebm")
    name, options = theirs
    target, x = Quadratic(4.0, dimension=3), points(50_000, (3,)) / 2
    sampler = getattr(ebm.samplers, name)(steps=3, **options)
    moved = sampler.sample(target, x)
    chain = run(target, ours, x, 3)
    assert float(chain.trace().acceptance[-1].mean()) == pytest.approx(sampler.last_accept_rate, abs=0.01)
    assert variance_error(moved, float(chain.x.var(dim=0).mean())) < 0.02


# --- what is said about wrong settings -----------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ceb.Langevin(0), "`step_size` of Langevin must be positive and finite, got 0"),
        (lambda: ceb.MALA(math.inf), "`step_size` of MALA must be positive and finite, got inf"),
        (lambda: ceb.HMC("0.1"), "`step_size` of HMC must be positive and finite, got '0.1'"),
        (lambda: ceb.HMC(0.1, temperature=-1), "`temperature` of HMC must be positive and finite, got -1"),
        (
            lambda: ceb.MALA(0.1, target_acceptance=1.0),
            "`target_acceptance` must be between 0 and 1, got 1.0",
        ),
        (lambda: ceb.HMC(0.1, num_leapfrog=0), "`num_leapfrog` must be a whole number of at least 1, got 0"),
        (lambda: ceb.HMC(0.1, num_leapfrog=2.5), "`num_leapfrog` must be a whole number"),
        (lambda: ceb.Langevin(0.1, noise_scale=-1), "`noise_scale` must be at least 0 and finite, got -1"),
        (lambda: ceb.Langevin(0.1, noise_scale=1, temperature=2), "or a noise_scale .* not both"),
        (lambda: ceb.Langevin(0.1, grad_clip=0), "`grad_clip` must be positive, got 0"),
        (lambda: ceb.Langevin(0.1, clamp=(1, -1)), r"`clamp` must be \(low, high\) with low < high"),
        (lambda: ceb.Langevin(0.1, clamp=(0, 1, 2)), r"`clamp` must be \(low, high\)"),
        (lambda: ceb.Langevin(0.1, target_acceptance=0.5), "accepts every step .* use MALA"),
        (lambda: ceb.UnderdampedLangevin(0.1, target_acceptance=0.5), "accepts every step .* use HMC"),
        (lambda: ceb.LeimkuhlerMatthews(0.1, target_acceptance=0.5), "accepts every step .* use MALA"),
        (lambda: ceb.UnderdampedLangevin(0.1, friction=0), "`friction` must be positive and finite, got 0"),
        (lambda: geometric(1.0, 0.0), "a geometric curve needs positive values"),
        (lambda: ceb.schedules.through((0.1, 1), (1, 2)), r"knots must rise from 0 to 1, got \[0.1, 1.0\]"),
        (lambda: ceb.schedules.through((0, 1), (0.5, 2), (0.5, 3), (1, 2)), "knots must rise from 0 to 1"),
        (lambda: ceb.schedules.Curve([(0, 1)]), "knots must rise from 0 to 1"),
        (
            lambda: ceb.schedules.through((0, 1), (1, 2), between="cubic"),
            "one of linear, geometric, cosine, karras, got",
        ),
        (lambda: ceb.schedules.hold_then(constant(1.0), 1.0), r"`share` must be in \[0, 1\), got 1.0"),
        (lambda: Schedule(num_levels=0), "`num_levels` must be at least 1, got 0"),
        (lambda: Schedule().values(linear(1.0, -1.0), 5), "finite and at least 0, got -0.5 at step 3"),
        (lambda: Schedule().values(constant(math.nan), 5), "finite and at least 0, got nan at step 0"),
        (
            lambda: ceb.sampling.from_settings({"kernel": "NUTS"}),
            "unknown sampler 'NUTS'; there are Langevin, ",
        ),
        (lambda: ceb.sampling.from_settings({}), "unknown sampler None"),
        (
            lambda: ceb.sampling.from_settings({"kernel": "MALA", "step_size": 1, "clamp": 1}),
            "MALA has no setting clamp; it has step_size, target_acceptance, temperature",
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
