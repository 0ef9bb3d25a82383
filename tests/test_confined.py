"""Energies with a floor, and experts that add an attribute to a density that stands still."""

import pytest
import torch
from helpers import card

import composable_ebm as ceb
from composable_ebm.experts.networks import ConfinedEnergy, NoisyClassifier

SHAPE = (2, 4, 4)


def shaken(network, seed=0, size=0.5):
    """With weights far larger than training gives."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    return network.eval().requires_grad_(False)


def data(num=500, seed=1):
    x = torch.randn(num, *SHAPE, generator=torch.Generator().manual_seed(seed))
    return x * torch.linspace(0.1, 3, 4) + 1


def confined(num_values=1, seed=0, size=0.5):
    network = ConfinedEnergy(SHAPE, num_values, hidden=16)
    network.fit(data())
    return shaken(network, seed, size)


@pytest.mark.parametrize("num_values", [1, 3])
@pytest.mark.parametrize("sigma", [0.1, 1.0, 10.0])
def test_no_state_lies_below_zero(num_values, sigma):
    network = confined(num_values)
    x = torch.cat([data(50, 2), 1e-3 * data(50, 3), 1e3 * data(50, 4)])
    assert (network(x, torch.tensor(sigma)) >= 0).all()


def test_energy_rises_quadratically_far_away():
    network = confined(size=0.1)
    direction = data(8, 5)
    far = [network(scale * direction, torch.tensor(0.5))[:, 0] for scale in (1e6, 2e6)]
    torch.testing.assert_close(far[1] / far[0], torch.full((8,), 4.0), rtol=0.05, atol=0)


def test_descent_does_not_leave_for_ever():
    network = confined(size=1.0)
    x = 5 * data(32, 6)
    for _ in range(200):
        x = x.detach().requires_grad_()
        energy = network(x)[:, 0]
        (gradient,) = torch.autograd.grad(energy.sum(), x)
        x = x - 0.1 * gradient / gradient.flatten(1).norm(dim=1).clamp(min=1e-9).reshape(-1, 1, 1, 1)
    assert (network(x.detach()) >= 0).all()
    assert (x.abs() < 100).all()


def test_a_floor_ends_every_descent_and_changes_nothing_above():
    network, free = confined(), confined()
    levels = network.levels_of_floor()
    floor = torch.stack([free(data(), level)[:, 0].median() for level in levels])
    network.set_floor(floor.tolist())
    x = torch.cat([data(200, 2), 3 * data(200, 3)])
    for level, least in zip(levels, floor, strict=True):
        torch.testing.assert_close(
            network(x, level), free(x, level).clamp(min=float(least)), rtol=1e-3, atol=1e-2
        )
    between = (levels[2] * levels[3]).sqrt()
    lowest = network(data(), between).min()
    torch.testing.assert_close(lowest, (floor[2] + floor[3]) / 2, rtol=1e-3, atol=1e-2)
    each = torch.tensor([0.2, 2.0]).repeat(200)  # a level for each row
    one = torch.cat([network(row[None], level) for row, level in zip(x, each, strict=True)])
    torch.testing.assert_close(network(x, each), one, rtol=1e-3, atol=1e-2)
    again = ConfinedEnergy(**network.options)
    assert again.floor == network.floor
    again.load_state_dict(network.state_dict())
    assert torch.equal(again(x, each), network(x, each))


def test_an_untrained_network_is_the_gaussian_of_the_data():
    network = ConfinedEnergy(SHAPE, hidden=16)
    x = data(2000)
    network.fit(x)
    flat = x.flatten(1)
    covariance = (flat - flat.mean(0)).T @ (flat - flat.mean(0)) / len(flat) + 0.25 * torch.eye(32)
    d = flat[:20] - flat.mean(0)
    expected = (d * torch.linalg.solve(covariance, d.T).T).sum(1) / 2
    torch.testing.assert_close(network(x[:20], torch.tensor(0.5))[:, 0], expected, rtol=1e-3, atol=1e-3)


def test_marginal_over_values_does_not_depend_on_the_head():
    network = confined(3)
    x, level = data(20), torch.tensor(0.5)
    before = -torch.logsumexp(-network(x, level), 1)
    network.backbone.choose.weight.mul_(3)
    torch.testing.assert_close(-torch.logsumexp(-network(x, level), 1), before)


def test_a_level_for_each_row_is_that_level():
    for network in (confined(2), shaken(NoisyClassifier(SHAPE, 3, 8, 1, 8))):
        x, levels = data(4), torch.tensor([0.1, 0.5, 2.0, 10.0])
        rows = [network(x[i : i + 1], levels[i])[0] for i in range(4)]
        torch.testing.assert_close(network(x, levels), torch.stack(rows), rtol=1e-4, atol=1e-4)


def test_a_classifier_gives_probabilities():
    network = shaken(NoisyClassifier(SHAPE, 3, 8, 1, 8))
    outputs = network(data(10), torch.tensor(0.3))
    torch.testing.assert_close((-outputs).exp().sum(1), torch.ones(10))


def test_a_classifier_of_one_value_is_refused():
    with pytest.raises(ValueError, match="at least two values"):
        NoisyClassifier(SHAPE, 1)


# --- experts that stand on a base ------------------------------------------------------------------


@pytest.fixture
def family(tmp_path):
    common = {"event_shape": SHAPE, "data_range": None, "noise_conditioned": True, "sampler": {}}
    network = confined(size=0.05)
    base = card("base", ("image",), **common, network={"type": "ConfinedEnergy", **network.options})
    digest = ceb.save_expert(tmp_path / "toys" / "base", network, base).weights["sha256"]
    for seed, name in enumerate(("smile", "hat")):
        network = shaken(NoisyClassifier(SHAPE, 2, 8, 1, 8), seed)
        options = {"type": "NoisyClassifier", **network.options}
        described = card(name, ("no", "yes"), **common, network=options, base=digest)
        ceb.save_expert(tmp_path / "toys" / name, network, described)
    return tmp_path / "toys"


def load(family):
    return [ceb.load_expert(family / name) for name in ("base", "smile", "hat")]


def test_an_expert_on_a_base_is_the_base_times_a_probability(family):
    base, smile, _ = load(family)
    x, level = data(6), torch.tensor(0.5)
    expected = base(x, noise_level=level) + smile.network(x, level)[:, 1]
    torch.testing.assert_close(smile(x, noise_level=level), expected)
    torch.testing.assert_close(smile.energy(x, level), expected)
    total = -torch.logsumexp(-torch.stack([smile[v](x, noise_level=level) for v in ("no", "yes")]), 0)
    torch.testing.assert_close(total, smile["any"](x, noise_level=level), rtol=1e-3, atol=1e-2)


def test_the_marginal_of_an_expert_on_a_base_is_the_base(family):
    base, smile, _ = load(family)
    assert smile["any"].key == smile.marginal().key == base.key


def test_given_evaluates_the_base_once(family):
    base, smile, hat = load(family)
    mix = ceb.given(base, smile, ~hat)
    assert [leaf.key for leaf in mix.leaves()].count(base.key) == 1
    assert len(list(mix.leaves())) == 3
    x, level = data(6), torch.tensor(0.5)
    expected = base(x, noise_level=level) + smile.network(x, level)[:, 1] + hat.network(x, level)[:, 0]
    torch.testing.assert_close(mix(x, noise_level=level), expected)


def test_moving_an_expert_on_a_base_moves_all_of_it_and_nothing_else(family):
    base, smile, _ = load(family)
    x = data(4)
    before = smile(x)
    wide = (smile + base).double()
    torch.testing.assert_close(wide(x.double()), (before + base(x)).double(), rtol=1e-3, atol=1e-2)
    assert next(smile.network.parameters()).dtype == torch.float32


def test_a_base_that_is_another_is_refused(family):
    network = confined(seed=3, size=0.05)
    described = ceb.experts.store.read_card(family / "base")
    ceb.save_expert(family / "base", network, described)
    with pytest.raises(ceb.CheckpointError, match=r"stands on the base .* Train the expert again"):
        ceb.load_expert(family / "smile")


def test_a_classifier_without_a_base_is_no_energy(family):
    network = shaken(NoisyClassifier(SHAPE, 2, 8, 1, 8))
    options = {"type": "NoisyClassifier", **network.options}
    described = card("lone", ("no", "yes"), event_shape=SHAPE, network=options)
    ceb.save_expert(family / "lone", network, described)
    with pytest.raises(ceb.CheckpointError, match="an energy only beside a density"):
        ceb.load_expert(family / "lone")
