"""The energy over overlapping windows: its skeleton in closed form, its windows, and who hears of whom."""

import pytest
import torch

from composable_ebm.experts.networks.windows import DiffusedWindows
from composable_ebm.train.objectives.base import Setting
from composable_ebm.train.objectives.denoising import DenoisingScoreMatching

SIZES = {"hidden": 16, "blocks": 1, "stride": 4, "overlap": 1, "components": 6}


@pytest.fixture
def network():
    network = DiffusedWindows((2, 8, 12), num_values=3, **SIZES)
    network.fit(torch.randn(300, 2, 8, 12))
    for parameter in network.parameters():
        parameter.data.normal_(std=0.2)
    return network


@pytest.mark.parametrize("sigma", [0.02, 0.7, 10.0])
def test_without_what_is_learned_it_is_a_gaussian(network, sigma):
    for head in (network.linear_head, network.quadratic_head, network.value_head):
        for parameter in head.parameters():
            parameter.data.zero_()
    size = 2 * 8 * 12
    x = torch.randn(5, 2, 8, 12)
    outside = torch.eye(size) - network.axes.T @ network.axes
    covariance = network.axes.T @ network.variances.diag() @ network.axes + network.residual * outside
    noisy = torch.distributions.MultivariateNormal(network.mean, covariance + sigma**2 * torch.eye(size))
    expected = noisy.log_prob(network.mean) - noisy.log_prob(x.flatten(1))
    energies = network(x, torch.tensor(sigma))
    torch.testing.assert_close(energies, expected[:, None].expand(5, 3), rtol=2e-4, atol=1e-3)


def test_windows_overlap_and_see_nothing_outside():
    network = DiffusedWindows((1, 4, 4), hidden=8, blocks=1, stride=2, overlap=1, components=2)
    x = torch.arange(1.0, 17.0).view(1, 1, 4, 4)
    assert network.windows(x)[0].tolist() == [
        [0, 0, 0, 0, 0, 1, 2, 3, 0, 5, 6, 7, 0, 9, 10, 11],
        [0, 0, 0, 0, 2, 3, 4, 0, 6, 7, 8, 0, 10, 11, 12, 0],
        [0, 5, 6, 7, 0, 9, 10, 11, 0, 13, 14, 15, 0, 0, 0, 0],
        [6, 7, 8, 0, 10, 11, 12, 0, 14, 15, 16, 0, 0, 0, 0, 0],
    ]  # fmt: skip


def test_windows_hear_of_each_other_through_the_layers_over_places(network):
    def heard(x):
        """How the energy's slope at one corner changes with the opposite corner."""
        x = x.requires_grad_()
        (slope,) = torch.autograd.grad(network(x)[:, 0].sum(), x, create_graph=True)
        (change,) = torch.autograd.grad(slope[0, 0, 0, 0], x)
        return change[0, :, -2:, -2:].abs().max()

    network.axes.zero_()  # the Gaussian knows all of the image
    x = torch.randn(1, 2, 8, 12)
    assert heard(x) > 1e-4
    for block in network.blocks:
        block.places.data.zero_()
    assert heard(x) == 0


def test_each_state_has_its_own_noise_level(network):
    x, sigma = torch.randn(4, 2, 8, 12), torch.tensor([0.05, 0.3, 2.0, 9.0])
    alone = torch.cat([network(x[i : i + 1], sigma[i]) for i in range(4)])
    torch.testing.assert_close(network(x, sigma), alone, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(network(x), network(x, torch.tensor(network.noise_range[0])))


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="images of 28x30 do not divide into windows 4 pixels apart"):
        DiffusedWindows((1, 28, 30))
    with pytest.raises(ValueError, match="`hidden` must be divisible by 8, got 12"):
        DiffusedWindows((1, 28, 28), hidden=12)


def test_it_learns_strokes_in_seconds():
    generator = torch.Generator().manual_seed(0)
    x = torch.full((256, 1, 12, 12), -1.0)
    rows = torch.randint(12, (256,), generator=generator)
    x[torch.arange(256), 0, rows] = 1.0
    network = DiffusedWindows((1, 12, 12), hidden=32, blocks=1, components=4)
    network.fit(x)
    phase = DenoisingScoreMatching().begin(Setting((1, 12, 12), 1, (-1, 1), 32, None, generator))
    optimiser = torch.optim.Adam(network.parameters(), 5e-3)
    losses = []
    for _ in range(150):
        batch = x[torch.randint(256, (32,), generator=generator)]
        loss, figures = phase.loss(network, network, batch, torch.zeros(32, dtype=torch.long))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(figures["denoising"]))
    assert sum(losses[-20:]) < 0.6 * sum(losses[:20])  # 1 is the Gaussian of four components
