"""The Gaussian skeleton: right on data of full rank, finite on data of none."""

import pytest
import torch

from composable_ebm.experts.networks import DiffusedEnergy
from composable_ebm.experts.networks.skeleton import principal_axes


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
