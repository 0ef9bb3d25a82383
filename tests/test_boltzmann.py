"""The Boltzmann machine against sums over all of its states, on bars and stripes."""

import math

import pytest
import torch
from bit_helpers import machine

import composable_ebm as ceb
from composable_ebm.boltzmann import BoltzmannLearning, BoltzmannMachine
from composable_ebm.data.bars import bars_and_stripes
from composable_ebm.energy.bits import bit_states
from composable_ebm.sampling import Noise


def test_energy_is_the_formula_of_the_layers():
    m = machine(visible=3, hidden=2)
    s = bit_states(5)
    v, h = s[:, :3], s[:, 3:]
    lateral_v, lateral_h, across = m.coupling[:3, :3], m.coupling[3:, 3:], m.coupling[:3, 3:]
    for block in (lateral_v, lateral_h):
        torch.testing.assert_close(block, block.T)
        assert (block.diag() == 0).all()
    quadratic = ((v @ lateral_v) * v).sum(1) + ((h @ lateral_h) * h).sum(1) + 2 * ((v @ across) * h).sum(1)
    torch.testing.assert_close(m(s), -quadratic / 2 - s @ m.biases)


def test_energy_is_the_textbook_sum_over_pairs():
    m, s = machine(), bit_states(5)
    pairs = sum(w * s[:, i] * s[:, k] for w, i, k in zip(m.couplings, m.pairs[0], m.pairs[1], strict=True))
    torch.testing.assert_close(m(s), -pairs - s @ m.biases)


def test_without_lateral_couplings_it_is_an_rbm():
    from composable_ebm.experts.networks.rbm import RBM

    m = machine(lateral=False)
    net = RBM((3,), hidden=2)
    with torch.no_grad():
        net.weight.copy_(m.coupling[:3, 3:])
        net.visible_bias.copy_(m.biases[:3])
        net.hidden_bias.copy_(m.biases[3:])
    v = bit_states(3)
    torch.testing.assert_close(m.free_energy(v), net.free_energy()(v))


def test_probabilities_of_all_images_sum_to_one():
    m = machine(visible=4, hidden=3)
    assert float(m.log_likelihood(bit_states(4)).exp().sum().detach()) == pytest.approx(1, abs=1e-5)


def test_gradient_of_the_likelihood_is_clamped_less_free_statistics():
    # Exactly: expectations by enumeration on one side, autograd through the enumeration on the other.
    m, data = machine(), torch.tensor([[1.0, 0, 1], [1, 1, 1], [0, 0, 0]])
    m.log_likelihood(data).mean().backward()
    s = bit_states(5)
    with torch.no_grad():
        joint = (-m(s)).softmax(0)
        clamped = torch.zeros_like(joint)
        for v in data:
            fits = (s[:, :3] == v).all(1)
            clamped += fits * joint / joint[fits].sum() / len(data)
    for weights, sign in ((clamped, 1), (joint, -1)):
        pairs = (weights[:, None] * s).T @ s
        m.biases.grad -= sign * weights @ s
        m.couplings.grad -= sign * pairs[tuple(m.pairs)]
    torch.testing.assert_close(m.biases.grad, torch.zeros(5), atol=1e-6, rtol=0)
    torch.testing.assert_close(m.couplings.grad, torch.zeros(len(m.couplings)), atol=1e-6, rtol=0)


def test_chains_estimate_that_gradient():
    m, data = machine(), torch.tensor([[1.0, 0, 1], [1, 1, 1], [0, 0, 0]])
    m.log_likelihood(data).mean().backward()
    learning = BoltzmannLearning(m, data.repeat(2000, 1), num_chains=6000, clamped_sweeps=10, free_sweeps=20)
    biases, couplings = learning.gradient()
    torch.testing.assert_close(biases, m.biases.grad, atol=0.03, rtol=0)  # 4 standard errors
    torch.testing.assert_close(couplings, m.couplings.grad, atol=0.03, rtol=0)


def test_gibbs_marginals_match_enumeration_of_a_machine_of_fifteen_units():
    m = machine(3, visible=9, hidden=6)
    with torch.no_grad():
        s = bit_states(15)
        p = (-m(s)).softmax(0)
        pairs = (p[:, None] * s).T @ s
        x = ceb.sample(m, num_chains=4000, num_steps=60, sampler=ceb.Gibbs()).samples
    error = (pairs * (1 - pairs) / 4000).sqrt() + 1e-4
    assert float(((x.T @ x / 4000 - pairs).abs() / error).max()) < 5


def test_learning_raises_the_exact_likelihood_of_bars_and_stripes():
    data = bars_and_stripes(3).flatten(1)
    torch.manual_seed(0)
    m = BoltzmannMachine(9, 4)
    learning = BoltzmannLearning(m, data, num_chains=100, clamped_sweeps=2, free_sweeps=2)
    for i in range(250):
        learning.step(0.2 / (1 + i / 200))
    with torch.no_grad():
        likelihood = m.log_likelihood(data)
    uniform, best = -9 * math.log(2), -math.log(14)
    assert float(likelihood.mean()) > uniform + 2
    assert float(likelihood.exp().sum()) > 0.25  # share of the 14 patterns among 512 images
    assert float(likelihood.mean()) < best


def test_clamped_chains_never_move_the_data():
    data = bars_and_stripes(2).flatten(1)
    m = BoltzmannMachine(4, 3)
    learning = BoltzmannLearning(m, data)
    learning.gradient()
    assert (learning._clamped.x[:, :4] == data).all()
    assert (learning.chains != learning.chains[:1]).any()


def test_completing_an_image_samples_the_pixels_that_are_free():
    m = machine(5, visible=4, hidden=2)
    mask = torch.tensor([0.0, 0, 1, 1, 1, 1])
    start = torch.tensor([1.0, 0, 0, 0, 0, 0]).expand(5000, -1)
    noise = Noise((torch.Generator().manual_seed(0), 5000))
    x = ceb.Chain(m, start, ceb.Gibbs(), noise, mask=mask).advance(40)
    with torch.no_grad():
        s = bit_states(6)
        p = (-m(s)).exp() * (s[:, :2] == start[0, :2]).all(1)
        marginal = (p / p.sum()) @ s
    torch.testing.assert_close(x.mean(0), marginal, atol=0.03, rtol=0)


def test_a_machine_composes_and_is_seen_by_the_algebra():
    a, b = machine(0).named("a"), machine(1).named("b")
    mix = a + 0.5 * b
    assert mix.binary
    assert str(mix) == "a + 0.5*b"
    x = bit_states(5)
    torch.testing.assert_close(mix(x), a(x) + 0.5 * b(x))
    out = ceb.sample(mix, num_chains=10, num_steps=5, sampler=ceb.Gibbs())
    assert out.samples.shape == (10, 5)


def test_bars_and_stripes_are_all_patterns_once():
    images = bars_and_stripes(3)
    assert images.shape == (14, 1, 3, 3)
    assert len(bars_and_stripes(2)) == 6
    constant_columns = (images == images[:, :, :1]).all((1, 2, 3))
    constant_rows = (images == images[..., :1]).all((1, 2, 3))
    assert (constant_columns | constant_rows).all()


@pytest.mark.parametrize("data", [torch.rand(3, 4), torch.zeros(3, 5), torch.zeros(3, 1, 2, 2)])
def test_data_that_are_no_bits_of_the_visible_units_are_refused(data):
    with pytest.raises(ValueError, match=r"`data` must be bits of shape \(cases, 4\)"):
        BoltzmannLearning(BoltzmannMachine(4, 3), data)


def test_a_machine_needs_a_visible_unit_and_few_states():
    with pytest.raises(ValueError, match="needs a visible unit"):
        BoltzmannMachine(0, 3)
    with pytest.raises(ValueError, match="at most 22 bits"):
        BoltzmannMachine(20, 3).log_z()
