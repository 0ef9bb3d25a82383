"""The energies with known answers: are the answers right?"""

import math

import pytest
import torch
from helpers import points

from composable_ebm.energy.analytic import Box, DoubleWell, Gaussian, GaussianMixture, Rings

FAMILIES = {
    "gaussian": Gaussian([0.2, -0.3], [[0.5, 0.2], [0.2, 0.3]]),
    "mixture": GaussianMixture([[-1.0, 0.0], [0.5, 1.0], [1.0, -1.0]], 0.1, weights=[1, 2, 3]),
    "box": Box([-1.0, -0.5], [0.5, 1.5], softness=0.2),
    "double_well": DoubleWell(barrier=3.0, dimension=2),
    "rings": Rings([0.8, 2.0], width=0.2),
}


@pytest.fixture(params=FAMILIES)
def energy(request):
    return FAMILIES[request.param]


def grid(reach=6.0, side=601):
    axis = torch.linspace(-reach, reach, side)
    return torch.cartesian_prod(axis, axis), (axis[1] - axis[0]) ** 2


def test_density_integrates_to_one(energy):
    x, cell = grid()
    assert float((-energy(x)).exp().double().sum() * cell) == pytest.approx(1, abs=2e-4)


def test_draws_have_the_moments_of_the_density(energy):
    x, cell = grid()
    density = (-energy(x)).exp().double() * cell
    drawn = energy.draw(100_000, torch.Generator().manual_seed(0)).double()
    for statistic in (lambda s: s, torch.square, torch.abs, lambda s: s.prod(dim=1, keepdim=True)):
        values = statistic(x.double())
        exact = (density[:, None] * values).sum(0)
        spread = ((density[:, None] * values.square()).sum(0) - exact.square()).sqrt()
        assert ((statistic(drawn).mean(0) - exact).abs() < 4 * spread / math.sqrt(len(drawn))).all()


def test_energy_range_holds_nearly_all_samples(energy):
    low, high = energy.energy_range
    e = energy(energy.draw(50_000, torch.Generator().manual_seed(1)))
    assert float(((e >= low) & (e <= high)).float().mean()) == pytest.approx(0.998, abs=0.0015)


def test_draws_come_from_the_generator_alone(energy):
    before = torch.get_rng_state()
    one, two = (energy.draw(5, torch.Generator().manual_seed(3)) for _ in range(2))
    torch.testing.assert_close(one, two, rtol=0, atol=0)
    torch.testing.assert_close(torch.get_rng_state(), before, rtol=0, atol=0)


def test_gaussian_is_that_of_torch():
    mean, covariance = (
        torch.tensor([0.2, -0.3, 1.0]),
        torch.tensor([[2.0, 0.5, 0], [0.5, 1, 0.1], [0, 0.1, 0.3]]),
    )
    expected = -torch.distributions.MultivariateNormal(mean, covariance).log_prob(points(8, (3,)))
    torch.testing.assert_close(Gaussian(mean, covariance)(points(8, (3,))), expected)


@pytest.mark.parametrize("covariance", [0.5, [0.5, 0.5], [[0.5, 0.0], [0.0, 0.5]]])
def test_covariance_may_be_a_variance_variances_or_a_matrix(covariance):
    torch.testing.assert_close(
        Gaussian([0.0, 0.0], covariance)(points()), Gaussian([0.0, 0.0], 0.5)(points())
    )


@pytest.mark.parametrize("level", [0.1, 1.0, 3.0])
def test_diffused_gaussian_has_the_noise_added_to_its_covariance(level):
    covariance = torch.tensor([[0.5, 0.2], [0.2, 0.3]])
    diffused = Gaussian([0.2, -0.3], covariance + level**2 * torch.eye(2))
    noisy = Gaussian([0.2, -0.3], covariance)(points(), noise_level=torch.tensor(level))
    torch.testing.assert_close(noisy, diffused(points()))


@pytest.mark.parametrize("level", [0.1, 0.7])
@pytest.mark.parametrize("energy", [Box([-1.0], [0.5], softness=0.2), GaussianMixture([[-1.0], [1.0]], 0.1)])
def test_diffused_energy_is_that_of_the_convolved_density(energy, level):
    axis = torch.linspace(-8, 8, 4001)
    density = (-energy(axis[:, None])).exp()
    x = torch.linspace(-2, 2, 9)
    kernel = torch.distributions.Normal(0.0, level).log_prob(x[:, None] - axis).exp()
    convolved = (kernel * density).sum(1) * (axis[1] - axis[0])
    noisy = energy(x[:, None], noise_level=torch.tensor(level))
    torch.testing.assert_close((-noisy).exp(), convolved, rtol=1e-3, atol=1e-5)


def test_each_row_may_have_its_own_noise_level():
    x, levels = points(5), torch.tensor([0.1, 0.5, 1.0, 2.0, 4.0])
    for energy in (FAMILIES["mixture"], FAMILIES["box"]):
        alone = [energy(x[i : i + 1], noise_level=levels[i]) for i in range(5)]
        torch.testing.assert_close(energy(x, noise_level=levels), torch.cat(alone))


def test_energies_stay_finite_far_outside():
    far = torch.tensor([[50.0, -80.0], [-100.0, 100.0]])
    for energy in FAMILIES.values():
        assert energy(far).isfinite().all()
        assert energy.score(far).isfinite().all()
        assert ((energy.score(far) * far).sum(1) < 0).all()  # pulls back


def test_box_is_flat_inside_and_half_as_likely_at_a_wall():
    box = Box([-1.0], [1.0], softness=0.05)
    inside, wall = box(torch.tensor([[0.0], [0.5]])), box(torch.tensor([[1.0]]))
    torch.testing.assert_close(inside, torch.full((2,), math.log(2)))
    torch.testing.assert_close(wall - inside[0], torch.tensor([math.log(2)]))


def test_wells_are_as_deep_as_the_barrier_says():
    well = DoubleWell(barrier=3.0)
    heights = well(torch.tensor([[-1.0], [0.0], [1.0]]))
    torch.testing.assert_close(heights - heights[0], torch.tensor([0.0, 3.0, 0.0]))


def test_score_at_the_centre_of_the_rings_is_finite():
    assert Rings()(torch.zeros(1, 2)).isfinite()
    assert Rings().score(torch.zeros(1, 2)).isfinite().all()
