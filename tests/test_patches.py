"""The energy over patches: its skeleton in closed form, and what its patches share."""

import pytest
import torch

from composable_ebm.data import shapes
from composable_ebm.experts import Card, Expert, load_expert, save_expert
from composable_ebm.experts.networks.patches import DiffusedPatches
from composable_ebm.train.objectives.base import Setting
from composable_ebm.train.objectives.denoising import DenoisingScoreMatching

SIZES = {"patch": 4, "hidden": 16, "components": 6, "context": 8}


@pytest.fixture
def network():
    network = DiffusedPatches((3, 8, 12), num_values=3, **SIZES)
    network.fit(torch.randn(300, 3, 8, 12))
    for parameter in network.parameters():
        parameter.data.normal_(std=0.2)
    return network


def skeleton_alone(network):
    for head in (network.linear_head, network.quadratic_head, network.value_head):
        for parameter in head.parameters():
            parameter.data.zero_()
    return network


def test_patches_are_squares_of_the_image_row_by_row():
    network = DiffusedPatches((1, 4, 6), patch=2, hidden=4, components=2, context=4)
    x = torch.arange(24.0).view(1, 1, 4, 6)
    assert network.patches(x)[0].tolist() == [
        [0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11], [12, 13, 18, 19], [14, 15, 20, 21], [16, 17, 22, 23]
    ]  # fmt: skip


@pytest.mark.parametrize("sigma", [0.02, 0.7, 10.0])
def test_without_what_is_learned_it_is_a_gaussian_at_every_patch(network, sigma):
    skeleton_alone(network)
    x = torch.randn(5, 3, 8, 12)
    axes, outside = network.axes, torch.eye(48) - network.axes.T @ network.axes
    covariance = axes.T @ network.variances.diag() @ axes + network.residual * outside
    noisy = torch.distributions.MultivariateNormal(network.mean, covariance + sigma**2 * torch.eye(48))
    at_mean = noisy.log_prob(network.mean)
    expected = (at_mean - noisy.log_prob(network.patches(x))).sum(1)
    energies = network(x, torch.tensor(sigma))
    torch.testing.assert_close(energies, expected[:, None].expand(5, 3), rtol=2e-4, atol=1e-3)


def test_fit_finds_mean_and_components_over_all_places():
    generator = torch.Generator().manual_seed(0)
    direction = torch.nn.functional.normalize(torch.randn(48, generator=generator), dim=0)
    patches = 0.3 + torch.randn(4000, 6, 1, generator=generator) * direction
    patches[:, 0] += 0.6  # a mean that only some images would show
    x = torch.nn.functional.pixel_shuffle(patches.mT.reshape(4000, 48, 2, 3), 4)
    network = DiffusedPatches((3, 8, 12), **SIZES)
    network.fit(x)
    torch.testing.assert_close(network.patches(x), patches)
    torch.testing.assert_close(network.mean, torch.full((48,), 0.4), atol=0.05, rtol=0)
    assert network.variances.argmax() == len(network.variances) - 1
    assert network.variances[-1] > 0.9


def test_energy_does_not_depend_on_where_a_patch_lies_unless_the_context_says_so(network):
    x = torch.randn(4, 3, 8, 12)
    moved = torch.cat([x[..., 4:], x[..., :4]], dim=-1)
    assert not torch.allclose(network(x), network(moved), rtol=1e-4)
    network.scatter.weight.data.zero_()
    network.scatter.bias.data.zero_()
    network.value_head.weight.data.zero_()
    torch.testing.assert_close(network(x), network(moved), rtol=1e-5, atol=1e-4)


def test_each_state_has_its_own_noise_level(network):
    x, sigma = torch.randn(4, 3, 8, 12), torch.tensor([0.05, 0.3, 2.0, 9.0])
    alone = torch.cat([network(x[i : i + 1], sigma[i]) for i in range(4)])
    torch.testing.assert_close(network(x, sigma), alone, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(network(x), network(x, torch.tensor(network.noise_range[0])))


def test_image_that_does_not_divide_into_patches_is_refused():
    with pytest.raises(ValueError, match="images of 28x28 do not divide into patches of side 8"):
        DiffusedPatches((1, 28, 28))


def test_saved_and_loaded_it_is_the_same(network, tmp_path):
    card = Card(
        family="test", name="patches", attribute="a", values=("x", "y", "z"), event_shape=(3, 8, 12),
        data_range=(-1.0, 1.0), network={"type": "DiffusedPatches", **network.options},
        noise_conditioned=True,
    )  # fmt: skip
    save_expert(tmp_path / "test" / "patches", network, card)
    loaded = load_expert(tmp_path / "test" / "patches")
    x, sigma = torch.randn(3, 3, 8, 12), torch.tensor(0.4)
    here = Expert.standing(network, card)
    for value in (*card.values, "any"):
        torch.testing.assert_close(
            loaded[value](x, noise_level=sigma), here[value](x, noise_level=sigma), rtol=0, atol=0
        )


def test_it_learns_scenes_in_seconds():
    data = shapes.load("train", num_images=1000)
    network = DiffusedPatches(data.event_shape, hidden=32, components=24, context=8)
    network.fit(data.batch(torch.arange(len(data))))
    generator = torch.Generator().manual_seed(0)
    phase = DenoisingScoreMatching().begin(Setting(data.event_shape, 1, (-1, 1), 32, None, generator))
    optimiser = torch.optim.Adam(network.parameters(), 4e-3)
    losses = []
    for _ in range(120):
        index = torch.randint(len(data), (32,), generator=generator)
        loss, _ = phase.loss(network, network, data.batch(index), torch.zeros_like(index))
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        losses.append(loss.item())
    # 1 is what the Gaussian skeleton reaches.
    assert sum(losses[-20:]) / 20 < 0.8
