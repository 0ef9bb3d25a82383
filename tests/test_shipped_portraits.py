"""The family of portraits as it ships: one codec, one base, and a density with a floor."""

import pytest
import torch

import composable_ebm as ceb
from composable_ebm.experts.catalogue import cards

NAMES = sorted(n for n, c in cards()[0].items() if c.family == "portraits" and c.name != "base")


@pytest.fixture(scope="module")
def base():
    return ceb.load_expert("portraits/base")


def test_all_share_one_codec_and_one_base(base):
    assert {"portraits/smile", "portraits/glasses", "portraits/beard"} <= set(NAMES)
    for name in NAMES:
        expert = ceb.load_expert(name)
        assert expert.codec is base.codec
        assert expert.marginal() is None or expert.marginal().key == base.key


def test_samples_are_pictures(base):
    out = ceb.sample(base, num_chains=2, num_steps=40, seed=0)
    assert out.samples.shape == (2, 8, 8, 8)
    assert out.images.shape == (2, 3, 64, 64)


def test_grey_hair_has_less_colour_than_other_hair(base):
    grey = ceb.load_expert("portraits/grey_hair")
    pair = [ceb.sample(ceb.given(base, e), num_chains=48, seed=0).images for e in (grey, ~grey)]
    top = [x[:, :, 8:16, 20:44] for x in pair]  # where hair is
    colour = [(x.amax(1) - x.amin(1)).mean() for x in top]
    assert colour[0] < 0.95 * colour[1]


def test_descent_from_noise_ends_near_the_energies_of_data(base):
    low, high = base.energy_range
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 8, 8, 8, generator=generator)
    for step in torch.logspace(0.3, -1.5, 150):
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(base(x).sum(), x)
        x = x - step * gradient / gradient.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
    energies = base(x.detach())
    assert energies.min() > low - 50
    assert energies.max() < high
