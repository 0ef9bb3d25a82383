"""The Gaussian skeleton: right on data of full rank, finite on data of none."""

import pytest
import torch
from helpers import card

import composable_ebm as ceb
from composable_ebm.data import LabelledImages
from composable_ebm.experts.expert import Expert
from composable_ebm.experts.networks import ConfinedEnergy, DiffusedEnergy, DiffusedPatches, DiffusedWindows
from composable_ebm.experts.networks.skeleton import principal_axes
from composable_ebm.sampling.schedule import karras
from composable_ebm.train.export import floored


def of_rank(rank, n, size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(n, rank, generator=generator) * torch.linspace(3, 1, rank)
    return weights @ torch.randn(rank, size, generator=generator) / size**0.5


@pytest.mark.parametrize(
    ("n", "size"), [(300, 60), (60, 300), (1100, 1100)], ids=["covariance", "gram", "subspace"]
)
def test_principal_axes_are_those_of_the_singular_value_decomposition(n, size):
    x = of_rank(40, n, size)
    x = x - x.mean(0)
    axes = principal_axes(x, 20)
    torch.testing.assert_close(axes.T @ axes, torch.eye(20), atol=1e-5, rtol=0)
    _, values, directions = torch.linalg.svd(x, full_matrices=False)
    torch.testing.assert_close((x @ axes).norm(dim=0), values[:20].flip(0), rtol=1e-3, atol=0)
    assert (axes.T @ directions[:20].T).norm().item() == pytest.approx(20**0.5, rel=1e-3)


PICTURES = {
    "black and white": lambda: of_rank(40, 200, 256).sign().reshape(200, 1, 16, 16),
    "constant": lambda: torch.ones(50, 1, 16, 16),
    "two pictures": lambda: torch.stack([torch.ones(1, 16, 16), -torch.ones(1, 16, 16)]),
    "discs on white": lambda: torch.ones(500, 1, 16, 16).index_fill_(3, torch.tensor([3, 4]), -1.0),
    "fewer than components": lambda: of_rank(10, 10, 768).reshape(10, 3, 16, 16),
}


@pytest.mark.parametrize("pictures", PICTURES.values(), ids=PICTURES)
def test_skeletons_of_low_rank_and_constant_backgrounds_are_finite(pictures):
    x = pictures()
    network = DiffusedEnergy(x.shape[1:], hidden=8, components=64)
    network.fit(x)
    x = x[:2].clone().requires_grad_()
    for level in (0.02, 0.3, 10.0):
        energy = network(x, torch.tensor(level))
        (gradient,) = torch.autograd.grad(energy.sum(), x)
        assert energy.isfinite().all()
        assert gradient.isfinite().all()
        assert network.denoiser_error(torch.tensor(level)) > 0


def test_chains_begin_as_noisy_data_does_and_not_around_zero():
    """At σ = 10 data far from zero is still far from zero, and wide where it is wide."""
    generator = torch.Generator().manual_seed(0)
    axes = torch.linalg.qr(torch.randn(48, 48, generator=generator)).Q
    stds = torch.linspace(0.1, 20, 48)
    data = 12 * torch.ones(48) + (torch.randn(4000, 48, generator=generator) * stds) @ axes.T
    network = DiffusedEnergy((3, 4, 4), hidden=8, components=8, noise_range=(0.02, 10.0))
    network.fit(data.reshape(-1, 3, 4, 4))
    start = network.prior(torch.randn(20_000, 3, 4, 4, generator=generator), 10.0).flatten(1)
    along = (start - start.mean(0)) @ axes
    assert torch.allclose(start.mean(0), torch.full((48,), 12.0), atol=1.5)
    expected = (stds.square() + 100).sqrt()
    assert torch.allclose(along.std(0)[-6:], expected[-6:], rtol=0.1)


@pytest.mark.parametrize("kind", [DiffusedEnergy, ConfinedEnergy, DiffusedPatches])
def test_a_skeleton_taken_anew_is_that_of_the_other_data_along_the_axes_it_has(kind):
    """A base that learned from other pictures first began its chains a ninth of a deviation too dark."""
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(4000, 1, 8, 8, generator=generator) * 0.3
    sizes = {DiffusedEnergy: {"components": 20}, DiffusedPatches: {"patch": 4, "components": 8}}.get(kind, {})
    network = kind(event_shape=(1, 8, 8), hidden=8, **sizes)
    network.fit(data)
    axes, variances = network.axes.clone(), network.variances.clone()
    network.refit(2 * data + 0.5)
    torch.testing.assert_close(network.axes, axes)
    assert network.mean.mean().item() == pytest.approx(0.5, abs=0.01)
    assert network.spread.item() == pytest.approx(0.6, rel=0.02)
    torch.testing.assert_close(network.variances, 4 * variances, rtol=1e-3, atol=0)


class Wide(ceb.Energy):
    """N(4, diag(400, 1)) with noise: wider than the first noise level, and far from zero."""

    noise_conditioned, event_shape = True, (2,)
    mean, variances = torch.tensor([4.0, 4.0]), torch.tensor([400.0, 1.0])

    def energy(self, x, noise_level=None):
        noise = torch.zeros(()) if noise_level is None else noise_level.square().reshape(-1, 1)
        return ((x - self.mean).square() / (self.variances + noise)).sum(1) / 2

    def prior(self, noise, noise_level):
        return self.mean + (self.variances + noise_level**2).sqrt() * noise


def test_a_flow_from_the_prior_ends_in_the_data():
    """From N(0, σ²) it would end at a mean of 0.1 and a deviation of 9."""
    levels = ceb.Schedule(noise_level=karras(10.0, 0.1), predict=True, num_levels=200)
    sampler = ceb.Annealed(ceb.Still(), levels)
    for energy in (Wide(), Wide() + ceb.from_callable(lambda x: 0 * x.sum(1), event_shape=(2,))):
        out = ceb.sample(energy, num_chains=4000, sampler=sampler, num_steps=200, seed=0)
        assert out.samples.mean(0).tolist() == pytest.approx([4.0, 4.0], abs=1.0)
        assert out.samples.std(0).tolist() == pytest.approx([20.0, 1.0], rel=0.05)


# --- floors ----------------------------------------------------------------------------------------

RANGE = (0.05, 5.0)
KINDS = {
    "perceptron": lambda values: DiffusedEnergy((1, 8, 8), values, 16, 8, RANGE),
    "windows": lambda values: DiffusedWindows((1, 8, 8), values, 16, 1, components=8, noise_range=RANGE),
    "patches": lambda values: DiffusedPatches((1, 8, 8), values, 4, 16, 8, 8, RANGE),
}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def falling(kind, values, shaken=0.2):
    """A network whose energies fall without end, and data."""
    torch.manual_seed(0)
    network = KINDS[kind](values)
    x = of_rank(20, 200, 64).reshape(200, 1, 8, 8)
    network.fit(x)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(shaken * torch.randn(parameter.shape))
        network.quadratic_head.weight.mul_(3)
    return network.requires_grad_(False), x


def marginal(network, x, level):
    return -(-network(x, torch.tensor(level))).logsumexp(1)


@pytest.mark.parametrize("values", [1, 3])
def test_a_floor_changes_nothing_above_and_no_energy_lies_below(kind, values):
    network, x = falling(kind, values)
    far = torch.cat([x, 3 * x, 100 * x])
    before = network(far, torch.tensor(0.05))
    least = float(marginal(network, x, 0.05).median())
    network.set_floor([least, least])
    after, above = network(far, torch.tensor(0.05)), marginal(network, far, 0.05)
    assert (above >= least - 1e-3 * abs(least)).all()
    kept = (-(-before).logsumexp(1) > least) & (torch.arange(len(far)) < len(x))
    assert 20 < kept.sum() < len(x)
    torch.testing.assert_close(after[kept], before[kept])
    assert type(network)(**network.options).floor == network.floor


@pytest.mark.parametrize("values", [1, 3])
def test_descent_comes_back_from_far_away_and_ends_on_the_floor(kind, values):
    network, x = falling(kind, values)
    network.set_floor([float(marginal(network, x, level).min()) - 50 for level in RANGE])
    far = 30 * x[:16]
    lowest = torch.full((16,), torch.inf)
    for i in range(300):
        far = far.detach().requires_grad_()
        energy = marginal(network, far, RANGE[0])
        lowest = torch.minimum(lowest, energy.detach())
        (gradient,) = torch.autograd.grad(energy.sum(), far)
        length = gradient.flatten(1).norm(dim=1).clamp(min=1e-9).reshape(-1, 1, 1, 1)
        far = far - 3 * 0.01 ** (i / 300) * gradient / length
    assert (lowest >= network.floor[0] - 1e-3 * abs(network.floor[0])).all()
    assert far.flatten(1).norm(dim=1).max() < 30 * x.flatten(1).norm(dim=1).max()


def test_a_floor_that_training_sets_leaves_data_alone_and_is_near_them_between_its_levels(kind):
    network, x = falling(kind, 2, shaken=0.05)
    pictures = (127.5 + 30 * x).round().clamp(0, 255).byte()
    data = LabelledImages(pictures, {}, {}, "blots")
    network.fit(data.batch(torch.arange(len(data))))
    described = card("blots", ("a", "b"), event_shape=(1, 8, 8), network={"type": "DiffusedEnergy"})
    network = floored(Expert.standing(network, described), data).network
    levels = network.levels_of_floor()
    x = data.batch(torch.arange(len(data)))
    for i in (0, 3, 150, 383):  # the first interval, two between and the last
        between = (levels[i] * levels[i + 1]).sqrt()
        kept, floor = network.floor, float(network.floor_at(between[None]))
        with_floor = network(x, between)
        network.set_floor(())
        without = network(x, between)
        network.set_floor(kept)
        assert torch.equal(with_floor, without)
        lowest = float(-(-without).logsumexp(1).max())
        assert lowest - floor == pytest.approx(network.floor_below, abs=0.3)


def test_a_floor_rises_quadratically_where_the_network_falls(kind):
    network, x = falling(kind, 1)
    network.set_floor([0.0, 0.0])
    one, two = (marginal(network, scale * x[:8], 0.5) for scale in (1e4, 2e4))
    assert (two / one > 3.9).all()
