"""Objectives of the trainer against closed forms: what each recovers, and how they agree."""

import math

import pytest
import torch
from torch import nn

import composable_ebm as ceb
from composable_ebm.experts.networks import ConfinedEnergy
from composable_ebm.sampling.diagnostics import fisher_divergence
from composable_ebm.train.objectives.base import Setting
from composable_ebm.train.objectives.contrastive import ContrastiveDivergence
from composable_ebm.train.objectives.denoising import DenoisingAtOneLevel
from composable_ebm.train.objectives.over_levels import ContrastiveOverLevels
from composable_ebm.train.objectives.recovery import Recovery, RecoveryLikelihood
from composable_ebm.train.objectives.score_matching import ScoreMatching, SlicedScoreMatching

COVARIANCE = torch.tensor([[1.0, 0.6, 0.0], [0.6, 1.5, -0.3], [0.0, -0.3, 0.5]])
SAMPLES = (
    torch.randn(4000, 3, generator=torch.Generator().manual_seed(0)) @ torch.linalg.cholesky(COVARIANCE).T
)


class QuadraticEnergy(nn.Module):
    """E(x) = ½ xᵀPx, P symmetric, one value."""

    def __init__(self, dimension=3):
        super().__init__()
        self.root = nn.Parameter(torch.eye(dimension))

    @property
    def precision(self):
        return (self.root + self.root.T) / 2

    def forward(self, x):
        return ((x @ self.precision) * x).sum(1, keepdim=True) / 2


class Experts(nn.Module):
    """A product of experts, linear in its parameters: E(x) = Σₖ θₖ log cosh(wₖᵀx)."""

    def __init__(self, filters):
        super().__init__()
        self.filters = filters
        self.theta = nn.Parameter(torch.ones(len(filters)) / 2)

    def features(self, x):
        u = x @ self.filters.T
        return u.abs() + torch.log1p(torch.exp(-2 * u.abs())) - math.log(2)

    def forward(self, x):
        return (self.features(x) @ self.theta)[:, None]


def phase(objective, batch, dimension=3, seed=11):
    generator = torch.Generator().manual_seed(seed)
    return objective.begin(Setting((dimension,), 1, (-3.0, 3.0), batch, ceb.Langevin(0.1), generator))


def minimise(objective, network, x, seed=11):
    """The minimum over all of `x`, by a second-order method: the directions are drawn once."""
    optimiser = torch.optim.LBFGS(network.parameters(), lr=1.0, max_iter=60, line_search_fn="strong_wolfe")
    y = torch.zeros(len(x), dtype=torch.long)

    def closure():
        optimiser.zero_grad()
        loss, _ = phase(objective, len(x), x.shape[1], seed).loss(network, network, x, y)
        loss.backward()
        return loss

    optimiser.step(closure)
    return network


# -- a Gaussian ------------------------------------------------------------------------------------


def test_exact_score_matching_recovers_the_precision_of_a_gaussian():
    network = minimise(ScoreMatching(trace="exact"), QuadraticEnergy(), SAMPLES)
    # In closed form the minimum over these very samples is the inverse of their second moments.
    expected = torch.linalg.inv(SAMPLES.T @ SAMPLES / len(SAMPLES))
    assert torch.allclose(network.precision, expected, atol=2e-3)
    assert torch.allclose(network.precision, torch.linalg.inv(COVARIANCE), atol=0.25)


@pytest.mark.parametrize(
    "objective",
    [
        ScoreMatching(num_probes=4),
        SlicedScoreMatching(num_slices=4),
        SlicedScoreMatching(num_slices=8, variance_reduction=False),
    ],
    ids=["hutchinson", "sliced", "sliced, without variance reduction"],
)
def test_estimated_score_matching_recovers_the_precision_of_a_gaussian(objective):
    network = minimise(objective, QuadraticEnergy(), SAMPLES)
    expected = torch.linalg.inv(SAMPLES.T @ SAMPLES / len(SAMPLES))
    assert torch.allclose(network.precision, expected, atol=0.15)


def test_denoising_at_one_level_recovers_the_precision_of_the_blurred_gaussian():
    sigma = 0.5
    network = minimise(DenoisingAtOneLevel(noise_level=sigma), QuadraticEnergy(), SAMPLES)
    expected = torch.linalg.inv(COVARIANCE + sigma**2 * torch.eye(3))
    assert torch.allclose(network.precision, expected, atol=0.12)


# -- a product of experts --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def product():
    """Filters at a right angle, so that samples are exact: sech(u) and sech²(u)/2 along them."""
    generator = torch.Generator().manual_seed(1)
    u = torch.rand(2, 6000, generator=generator).clamp(1e-6, 1 - 1e-6)
    along = torch.stack([(math.pi / 2 * u[0]).tan().log(), torch.logit(u[1]) / 2], dim=1)
    angle = 0.5
    filters = torch.tensor([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    return filters, along @ filters


def test_exact_score_matching_recovers_a_product_of_experts(product):
    filters, x = product
    network = minimise(ScoreMatching(trace="exact"), Experts(filters), x)
    # J is quadratic in θ: its minimum over these samples is G⁻¹b.
    u = x @ filters.T
    slopes = u.tanh()
    gram = (slopes.T @ slopes / len(x)) * (filters @ filters.T)
    curvature = (1 - u.tanh().square()).mean(0)
    assert torch.allclose(network.theta, torch.linalg.solve(gram, curvature), atol=1e-3)
    assert torch.allclose(network.theta, torch.tensor([1.0, 2.0]), atol=0.1)


def test_fisher_divergence_falls_to_zero_at_the_truth(product):
    filters, x = product
    truth, network = Experts(filters), Experts(filters)
    truth.theta.data = torch.tensor([1.0, 2.0])

    def energy(net):
        return ceb.from_callable(lambda z: net(z)[:, 0], event_shape=(2,))

    before = fisher_divergence(energy(network), energy(truth), x)
    assert fisher_divergence(energy(truth), energy(truth), x) == 0
    u = (x @ filters.T).tanh()
    by_hand = ((u * torch.tensor([0.5, 1.5])).square().sum(1) / 2).mean().item()
    assert before == pytest.approx(by_hand, rel=1e-4)
    minimise(ScoreMatching(), network, x)
    assert fisher_divergence(energy(network), energy(truth), x) < 0.01 * before


# -- how they agree --------------------------------------------------------------------------------


@pytest.fixture
def deep():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 16), nn.SiLU(), nn.Linear(16, 16), nn.SiLU(), nn.Linear(16, 1))


def value(objective, network, x):
    loss, _ = phase(objective, len(x)).loss(network, network, x, torch.zeros(len(x), dtype=torch.long))
    return loss.item()


def test_the_trace_is_that_of_the_hessian(deep):
    x = SAMPLES[:5]

    def scalar(z):
        return deep(z[None])[0, 0]

    hessians = torch.stack([torch.func.hessian(scalar)(row) for row in x])
    gradients = torch.stack([torch.func.grad(scalar)(row) for row in x])
    trace = hessians.diagonal(dim1=1, dim2=2).sum(1)
    expected = (gradients.square().sum(1) / 2 - trace).mean().item()
    assert value(ScoreMatching(trace="exact"), deep, x) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    "objective",
    [
        ScoreMatching(),
        SlicedScoreMatching(),
        SlicedScoreMatching(variance_reduction=False),
    ],
    ids=["hutchinson", "sliced", "without variance reduction"],
)
def test_estimates_of_the_trace_are_unbiased(deep, objective):
    x = SAMPLES[:1]
    exact = value(ScoreMatching(trace="exact"), deep, x)
    assert value(objective, deep, x.expand(20_000, 3)) == pytest.approx(exact, abs=0.005)


def test_variance_reduction_reduces_variance():
    network, x = QuadraticEnergy(), SAMPLES[:1]

    def spread(objective):
        drawn = [phase(objective, 1, seed=seed) for seed in range(200)]
        y = torch.zeros(1, dtype=torch.long)
        return torch.stack([p.loss(network, network, x, y)[0].detach() for p in drawn]).std()

    plain, reduced = spread(SlicedScoreMatching(variance_reduction=False)), spread(SlicedScoreMatching())
    assert reduced < 0.9 * plain
    # Signs have vᵀv = dimension exactly: of a multiple of the identity they know the trace.
    assert spread(ScoreMatching()) < 1e-6


def test_in_one_dimension_hutchinson_is_exact():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(1, 8), nn.SiLU(), nn.Linear(8, 1))
    x, y = torch.randn(7, 1), torch.zeros(7, dtype=torch.long)
    losses = [
        phase(ScoreMatching(trace=trace), 7, 1).loss(network, network, x, y)[0].item()
        for trace in ("exact", "hutchinson")
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_an_exact_trace_of_an_image_is_refused(deep):
    network = nn.Sequential(nn.Flatten(), nn.Linear(300, 1))
    x = torch.randn(2, 3, 10, 10)
    with pytest.raises(ValueError, match=r"a backward pass for each of 300 components: use ScoreMatching"):
        value(ScoreMatching(trace="exact"), network, x)


# -- recovery likelihood ---------------------------------------------------------------------------


class BlurredGaussian(nn.Module):
    """E(x, σ) = (x - μ)²/(2(v + σ²)), whose truth is known at every level."""

    noise_range = (0.3, 2.0)

    def __init__(self):
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(()))
        self.log_variance = nn.Parameter(torch.zeros(()))

    def forward(self, x, noise_level):
        return (x - self.mean).square() / (2 * (self.log_variance.exp() + noise_level[:, None].square()))


def of_gaussian_data(num_values=1):
    """A network that has learned nothing, which is exact for data like these, and the data."""
    x = torch.randn(4000, 1, 2, 3, generator=torch.Generator().manual_seed(3)) * 0.7 + 0.4
    network = ConfinedEnergy((1, 2, 3), num_values, hidden=8, noise_range=(0.2, 4.0))
    network.fit(x)
    return network, x


def over_levels(network, x, y, rounds, **options):
    """Figures of so many rounds without learning, and the phase."""
    generator = torch.Generator().manual_seed(7)
    setting = Setting((1, 2, 3), 3, None, 128, ceb.Langevin(0.1), generator)
    at_work = ContrastiveOverLevels(num_levels=8, buffer_size=256, **options).begin(setting)
    figures = []
    for _ in range(rounds):
        rows = torch.randint(len(x), (128,), generator=generator)
        figures.append(at_work.loss(network, network, x[rows], y[rows])[1])
    return figures, at_work


def test_chains_over_levels_have_the_energies_of_data_where_the_energy_is_right():
    network, x = of_gaussian_data()
    y = torch.zeros(len(x), dtype=torch.long)
    gaps = torch.stack([f["energy_gap"] for f in over_levels(network, x, y, 60)[0]])
    assert abs(float(gaps.mean())) < 3 * float(gaps.std()) / 60**0.5 + 0.05
    with torch.no_grad():  # half as sharp: data lie where the energy says they need not
        network.variances.mul_(4)
    wrong = torch.stack([f["energy_gap"] for f in over_levels(network, x, y, 60)[0]])
    assert float(wrong.mean()) > 0.3


def test_chains_over_levels_take_the_labels_of_data_and_go_on_where_they_were():
    network, x = of_gaussian_data(3)
    y = torch.where(torch.rand(len(x), generator=torch.Generator().manual_seed(1)) < 0.8, 2, 0)
    figures, at_work = over_levels(network, x, y, 30)
    shares = torch.bincount(at_work.labels, minlength=3) / len(at_work.labels)
    torch.testing.assert_close(shares, torch.tensor([0.2, 0.0, 0.8]), rtol=0, atol=0.08)
    assert float(torch.stack([f["chains_still"] for f in figures]).mean()) < 0.3
    other = ContrastiveOverLevels(num_levels=8, buffer_size=256).begin(at_work.setting)
    other.load_state_dict({name: value.clone() for name, value in at_work.state_dict().items()})
    state = at_work.generator.get_state()
    one = at_work.loss(network, network, x[:128], y[:128])[0]
    at_work.generator.set_state(state)
    assert other.loss(network, network, x[:128], y[:128])[0].equal(one)


def test_chains_over_levels_begin_where_a_sampler_would_have_brought_them():
    network, x = of_gaussian_data()
    torch.manual_seed(0)
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    y = torch.zeros(len(x), dtype=torch.long)
    _, at_work = over_levels(network, x, y, 1, rho=3.0)
    levels = torch.linspace(4.0 ** (1 / 3), 0.2 ** (1 / 3), 8) ** 3
    below = at_work.place > 3
    sigma, g = levels[at_work.place[below]], torch.Generator().manual_seed(5)
    with torch.no_grad():
        of_chains = network(at_work.chains[below], sigma).mean()
        of_gaussian = network(
            torch.stack([network.prior(torch.randn(1, 1, 2, 3, generator=g), float(s))[0] for s in sigma]),
            sigma,
        ).mean()
    assert float(of_chains) < float(of_gaussian) - 0.3


def test_low_levels_count_for_less_in_contrast():
    """Far below the width of data an energy counts by σ over that width, and nowhere by more than 1."""
    network, x = of_gaussian_data()
    y = torch.zeros(len(x), dtype=torch.long)
    with torch.no_grad():
        network.variances.mul_(4)
    figures, _ = over_levels(network, x, y, 40, denoising=0.0)
    loss, gap = (float(torch.stack([f[name] for f in figures]).mean()) for name in ("loss", "energy_gap"))
    assert 0.1 * gap < -loss < 0.9 * gap


def test_denoising_beside_contrast_is_that_of_score_matching():
    """Where the Gaussian skeleton is the truth, its error is what is left: a loss of γ."""
    network, x = of_gaussian_data()
    y = torch.zeros(len(x), dtype=torch.long)
    both, alone = (over_levels(network, x, y, 40, denoising=rate)[0] for rate in (10.0, 0.0))
    assert float(torch.stack([f["denoising"] for f in both]).mean()) == pytest.approx(1.0, abs=0.1)
    losses = [float(torch.stack([f["loss"] for f in each]).mean()) for each in (both, alone)]
    assert losses[0] - losses[1] == pytest.approx(10.0, abs=1.0)
    network.mean += 0.5
    wrong, _ = over_levels(network, x, y, 40, denoising=10.0)
    assert float(torch.stack([f["denoising"] for f in wrong]).mean()) > 1.1


def test_recovery_likelihood_recovers_mean_and_variance():
    network = BlurredGaussian()
    objective = RecoveryLikelihood(langevin_steps=15, step_size=0.3, num_levels=4)
    at_work = phase(objective, 512, 1)
    optimiser = torch.optim.Adam(network.parameters(), lr=0.03)
    generator = torch.Generator().manual_seed(5)
    y, path = torch.zeros(512, dtype=torch.long), []
    for _ in range(250):
        x = 0.8 + 0.5 * torch.randn(512, 1, generator=generator)
        loss, figures = at_work.loss(network, network, x, y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        path.append((network.mean.item(), network.log_variance.exp().item()))
    mean, variance = torch.tensor(path[100:]).mean(0).tolist()
    assert mean == pytest.approx(0.8, abs=0.06)
    assert variance == pytest.approx(0.25, abs=0.06)
    assert figures["chains_diverged"] == 0


def test_recovery_energy_is_the_conditional_of_its_docstring():
    network = BlurredGaussian()
    x, noisier = torch.randn(4, 1), torch.randn(4, 1)
    sigma, spread = torch.tensor([0.3, 0.5, 1.0, 1.5]), torch.tensor([0.2, 0.4, 0.6, 0.8])
    energy = Recovery(network, torch.zeros(4, dtype=torch.long), sigma, noisier, spread)
    expected = x[:, 0].square() / (2 * (1 + sigma**2)) + (x - noisier)[:, 0].square() / (2 * spread**2)
    assert torch.allclose(energy(x), expected)


# -- settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ScoreMatching(trace="full"), '`trace` must be "exact" or "hutchinson"'),
        (lambda: ScoreMatching(num_probes=0), "`num_probes` must be at least 1"),
        (lambda: SlicedScoreMatching(num_slices=0), "`num_slices` must be at least 1"),
        (lambda: SlicedScoreMatching(data_noise=-1), "`data_noise` and `classification` must be at least 0"),
        (lambda: DenoisingAtOneLevel(noise_level=0), "`noise_level` must be positive"),
        (lambda: RecoveryLikelihood(step_size=3), "`step_size` must be between 0 and 2, got 3"),
        (lambda: ContrastiveOverLevels(num_levels=1), "`num_levels` at least 2, got 5, 2048 and 1"),
        (lambda: ContrastiveOverLevels(step_size=0.0), "`step_size` and `rho` must be positive, `class"),
        (lambda: ContrastiveOverLevels(denoising=-1.0), "`denoising` at least 0, got 0.15, 2.0, 0.5 and -1"),
        (lambda: RecoveryLikelihood(langevin_steps=0), "`langevin_steps` and `num_levels`"),
        (lambda: ContrastiveDivergence(cd_steps=0), "`cd_steps` and `buffer_size`"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
