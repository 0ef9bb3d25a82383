"""Restricted Boltzmann machines: free energies, log Z, and training by the shared trainer."""

import math

import pytest
import torch
from bit_helpers import Network, machine, rbm, rbm_training
from torch.nn import functional as F

import composable_ebm as ceb
from composable_ebm.energy.bits import bit_states
from composable_ebm.experts.networks.rbm import RBM
from composable_ebm.partition.log_z import exact_log_z, log_z


def joint_energy(net, v, h, value=0):
    """E(v, h) as the textbook writes it, (states of v, states of h)."""
    if net.binary:
        visible, interaction = -(v @ net.visible_bias), v @ net.weight @ h.T
    else:
        visible = (v - net.visible_bias).square().sum(1) / (2 * net.scale**2)
        interaction = v @ net.weight @ h.T / net.scale
    hidden = h @ net.hidden_bias
    if net.value_weight is not None:
        hidden, visible = hidden + h @ net.value_weight[value], visible - net.value_bias[value]
    return visible[:, None] - hidden - interaction


@pytest.mark.parametrize("visible", ["bits", "reals"])
@pytest.mark.parametrize("values", [1, 3])
def test_free_energy_sums_the_hidden_bits_out(visible, values):
    net = rbm(values=values, visible=visible)
    net.scale = 0.7 if visible == "reals" else 1.0
    v = torch.randint(2, (6, 5)).float() if visible == "bits" else torch.randn(6, 5)
    h = bit_states(3)
    for y in range(values):
        truth = -torch.logsumexp(-joint_energy(net, v, h, y), 1)
        torch.testing.assert_close(net(v)[:, y], truth)
        torch.testing.assert_close(net.free_energy(y)(v), truth)
        torch.testing.assert_close(net.conditionals(y).energy(v), truth)


def test_features_are_the_hidden_conditionals():
    net, h = rbm(), bit_states(3)
    v = torch.randint(2, (6, 5)).float()
    posterior = (-joint_energy(net, v, h)).softmax(1) @ h
    torch.testing.assert_close(net.features(v), posterior)


def test_fitted_biases_are_the_log_odds_of_the_data():
    net = RBM((4,), hidden=2)
    net.fit(torch.tensor([[0.0, 1, 1, 0.5], [0, 1, 0, 0.5]]))
    torch.testing.assert_close(net.visible_bias[2:], torch.zeros(2))
    assert float(net.visible_bias[0].detach()) == pytest.approx(math.log(0.01 / 0.99), rel=1e-4)


def mixture_of(net):
    """The Gaussians that an RBM of reals mixes, one for each state of its hidden bits: log weights, means."""
    h = bit_states(len(net.hidden_bias))
    means = net.visible_bias + net.noise * h @ net.weight.T
    squares = means.square().sum(1) - net.visible_bias.square().sum()
    return (h @ net.hidden_bias + squares / (2 * net.noise**2)).detach(), means.detach()


@pytest.mark.parametrize(
    ("kernel", "chains", "steps"), [(ceb.Gibbs(), 40_000, 40), (ceb.MALA(step_size=0.3), 10_000, 250)]
)
def test_both_kernels_on_reals_match_the_mixture_of_gaussians_it_is(kernel, chains, steps):
    # Continuous, and with conditionals in closed form: block Gibbs and Langevin sample one density.
    net = rbm(hidden=2, size=2, visible="reals")
    net.scale = 0.6
    log_weight, means = mixture_of(net)
    weight = log_weight.softmax(0)
    mean = weight @ means
    covariance = (weight[:, None] * (means - mean)).T @ (means - mean) + net.scale**2 * torch.eye(2)
    out = ceb.sample(net.free_energy(), init=torch.randn(chains, 2), num_steps=steps, sampler=kernel, seed=0)
    torch.testing.assert_close(out.samples.mean(0), mean, atol=0.03, rtol=0)
    torch.testing.assert_close(out.samples.T.cov(), covariance, atol=0.06, rtol=0.03)


@pytest.mark.parametrize("learned", [False, True])
def test_density_of_reals_is_normalised_by_quadrature(learned):
    net = RBM((2,), hidden=3, visible="reals", scale=0.4, learn_scale=learned)
    with torch.no_grad():
        for p in net.parameters():
            p.normal_(-0.3, 0.5, generator=torch.Generator().manual_seed(p.ndim))
    axis = torch.linspace(-9, 9, 1201)
    x = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        total = torch.logsumexp(-net.free_energy()(x), 0) + 2 * math.log(axis[1] - axis[0])
    log_weight, _ = mixture_of(net)
    closed = torch.logsumexp(log_weight, 0) + math.log(2 * math.pi) + 2 * torch.as_tensor(net.noise).log()
    closed = closed.detach()
    assert float(total) == pytest.approx(float(closed), abs=1e-4)
    assert exact_log_z(net.free_energy()) == pytest.approx(float(closed), abs=1e-4)


def test_a_sum_of_two_is_the_one_with_their_hidden_units_side_by_side():
    a, b = rbm(0), rbm(1, hidden=4)
    both = RBM((5,), hidden=7)
    with torch.no_grad():
        both.weight.copy_(torch.cat([a.weight, b.weight], 1))
        both.hidden_bias.copy_(torch.cat([a.hidden_bias, b.hidden_bias]))
        both.visible_bias.copy_(a.visible_bias + b.visible_bias)
    x = bit_states(5)
    torch.testing.assert_close((a.free_energy() + b.free_energy())(x), both.free_energy()(x))


# --- log Z ---------------------------------------------------------------------------------------


def brute(energy, size=5):
    with torch.no_grad():
        return float(torch.logsumexp(-energy(bit_states(size)), 0))


CASES = {
    "rbm": lambda: rbm(0).free_energy(),
    "value": lambda: rbm(2, values=3).free_energy(2),
    "2*a + b": lambda: 2 * rbm(0).free_energy() + rbm(1).free_energy(),
    "machine": lambda: machine(),
    "with a coupling": lambda: rbm(0).free_energy() - 0.5 * machine(1) + 0.3 * machine(2),
}


@pytest.mark.parametrize("name", CASES)
def test_log_z_by_annealing_matches_enumeration(name):
    energy = CASES[name]()
    found = log_z(energy, num_chains=300, levels=60, burn_in=30)
    assert found.error < 0.05
    assert found.value == pytest.approx(brute(energy), abs=4.5 * found.error)
    assert exact_log_z(energy) == pytest.approx(brute(energy), abs=1e-4)


def test_log_z_of_reals_matches_the_sum_over_hidden_bits():
    energy = rbm(hidden=4, visible="reals", std=0.5).free_energy()
    found = log_z(energy, num_chains=500, levels=100, burn_in=50)
    assert found.value == pytest.approx(exact_log_z(energy), abs=4.5 * found.error)
    assert found.error < 0.05


def test_a_walk_from_the_data_mean_ends_at_the_same_log_z():
    energy = rbm(0).free_energy()
    start = torch.tensor([2.0, -1, 0, 1, 3])
    betas = torch.linspace(0, 1, 101).square().tolist()
    found = log_z(energy, num_chains=300, levels=betas, start=start, burn_in=30)
    assert found.value == pytest.approx(brute(energy), abs=4.5 * found.error)


def test_log_z_difference_of_bits_matches_enumeration():
    a, b = rbm(0).free_energy(), Network()
    found = ceb.log_z_difference(a, b, ceb.DMALA(0.7), num_chains=300, num_levels=80, burn_in=100)
    assert found.value == pytest.approx(brute(b) - brute(a), abs=4.5 * found.error)
    assert found.error < 0.1


def test_log_z_refuses_what_it_cannot_walk():
    a, b = rbm(0).free_energy(name="a"), rbm(1).free_energy(name="b")
    with pytest.raises(ValueError, match="those of network have no closed form"):
        log_z(a + Network())
    with pytest.raises(ValueError, match=r"needs whole weights.* a has 0.5.*log_z_difference"):
        log_z(b + 0.5 * a)
    with pytest.raises(ValueError, match=r"rise from 0 to 1"):
        log_z(a, levels=[0.0, 0.5])
    with pytest.raises(ValueError, match=r"no sum over at most 22 bits"):
        exact_log_z(RBM((30,), hidden=30).free_energy())


# --- training ------------------------------------------------------------------------------------


def test_gradient_of_the_free_energy_is_the_textbook_statistic():
    net = rbm()
    v = torch.randint(2, (6, 5)).float()
    net(v).mean().backward()
    expected = -v.T @ net.features(v).detach() / len(v)
    torch.testing.assert_close(net.weight.grad, expected)


@pytest.mark.parametrize("values", [1, 3])
@pytest.mark.parametrize("options", [{}, {"visible": "reals"}, {"visible": "reals", "learn_scale": True}])
def test_the_closed_form_of_a_training_pass_is_the_gradient_of_the_plain_one(options, values):
    net = RBM((5,), values, 3, **options)
    with torch.no_grad():
        for p in net.parameters():
            p.normal_(generator=torch.Generator().manual_seed(p.ndim))
    x, weight = torch.rand(6, 5).round(), torch.randn(6, values)

    def passed(training):
        net.train(training).zero_grad()
        assert net.only_learns(x) == (training and values == 1)
        outputs = net(x)
        (outputs * weight).sum().backward()
        return outputs, {name: p.grad.clone() for name, p in net.named_parameters()}

    torch.testing.assert_close(passed(True), passed(False))
    assert not net.train().only_learns(x.requires_grad_())  # sampling, or a second derivative


def test_the_scale_of_reals_is_learned_down_to_the_noise_of_the_data(bars):
    from dataclasses import replace

    from composable_ebm.data import LabelledImages
    from composable_ebm.train import train
    from composable_ebm.train.config import RBM as Sizes

    generator = torch.Generator().manual_seed(0)
    ends = torch.randint(2, (5000, 1), generator=generator) - 0.5
    x = ends + 0.12 * torch.randn(5000, 2, generator=generator)
    images = ((x.clamp(-1, 1) + 1) * 127.5).round().byte().reshape(-1, 1, 1, 2)
    data = LabelledImages(images, {}, {}, "two ends of a diagonal")
    sizes = Sizes(hidden=4, visible="reals", scale=0.05, learn_scale=True)
    config = replace(bars, network=sizes, num_iterations=300)
    network = train(config, data=(data, data)).network
    start = RBM((1, 1, 2), hidden=4, visible="reals", scale=0.05, learn_scale=True)
    start.fit(data.batch(torch.arange(5000)))
    assert float(start.noise.detach()) == pytest.approx(float(x.std()), rel=0.02)
    assert 0.1 < float(network.noise.detach()) < 0.2


@pytest.fixture
def bars(tmp_path):
    return rbm_training(tmp_path, num_iterations=250)


@pytest.fixture
def bars_data(monkeypatch):
    """The trainer's data are bars and stripes."""
    from composable_ebm.data import LabelledImages
    from composable_ebm.data.bars import bars_and_stripes

    images = (bars_and_stripes(3) * 255).byte()
    loaded = LabelledImages(images, {}, {}, "bars")
    monkeypatch.setattr("composable_ebm.train.config.load_data", lambda *_, **__: loaded)
    return images.flatten(1).float() / 255


@pytest.mark.parametrize("persistent", [True, False])
def test_the_trainer_teaches_an_rbm_bars_and_stripes(bars, bars_data, persistent):
    from dataclasses import replace

    from composable_ebm.train import train

    expert = train(replace(bars, objective=replace(bars.objective, persistent=persistent)))
    assert expert.binary
    assert expert.card.data_range == (0.0, 1.0)
    assert expert.card.sampler["kernel"] == "Gibbs"
    with torch.no_grad():
        likelihood = float((-expert(bars_data.reshape(-1, 1, 3, 3))).mean()) - exact_log_z(expert)
    uniform, pixels = -9 * math.log(2), -math.log(14)
    assert uniform + 1.5 < likelihood < pixels
    loaded = ceb.load_expert(bars.model_folder)
    out = ceb.sample(loaded, num_chains=200, num_steps=50)
    patterns = {tuple(row) for row in bars_data.tolist()}
    share = sum(tuple(x) in patterns for x in out.samples.flatten(1).tolist()) / 200
    assert share > 0.15  # 14 of 512 states are 2.7 %
    assert (loaded + loaded).conditionals() is None
    assert float(exact_log_z(2 * loaded)) == pytest.approx(brute_images(2 * loaded), abs=1e-3)


def brute_images(energy):
    with torch.no_grad():
        return float(torch.logsumexp(-energy(bit_states(9).reshape(-1, 1, 3, 3)), 0))


def test_the_replay_buffer_starts_from_bits():
    from composable_ebm.train.replay_buffer import ReplayBuffer

    buffer = ReplayBuffer(50, (4,), 1, (0.0, 1.0), 0.5, torch.Generator().manual_seed(0), binary=True)
    _, states, _ = buffer.draw(50)
    assert set(states.unique().tolist()) == {0.0, 1.0}


def test_training_settings_that_bits_cannot_take_are_refused(bars):
    from dataclasses import replace

    with pytest.raises(ValueError, match=r"takes no noise.*data_noise = 0"):
        replace(bars, objective=replace(bars.objective, data_noise=0.1))


def test_grey_levels_become_the_odds_of_a_white_bit():
    from composable_ebm.data.ranges import as_images, as_states

    grey = torch.tensor([-1.0, -0.5, 1.0]).expand(20_000, 3)
    bits = as_states(grey, (0.0, 1.0), True, torch.Generator().manual_seed(0))
    torch.testing.assert_close(bits.mean(0), torch.tensor([0.0, 0.25, 1.0]), atol=0.015, rtol=0)
    black_and_white = torch.tensor([-1.0, 1.0]).expand(3, 2)
    assert as_states(black_and_white, (0.0, 1.0), True, torch.Generator()).tolist() == [[0, 1]] * 3
    torch.testing.assert_close(as_images(torch.tensor([0.0, 1.0]), (0.0, 1.0)), torch.tensor([-1.0, 1.0]))


def test_values_of_an_attribute_are_rbms_of_one_network():
    net = rbm(values=3)
    x = bit_states(5)
    outputs = net(x)
    fields = net.conditionals(torch.tensor([0, 1, 2] * 10 + [0, 1])).hidden_fields(x)
    expected = -(x @ net.visible_bias) - F.softplus(fields).sum(1)
    rows = torch.tensor([0, 1, 2] * 10 + [0, 1])
    torch.testing.assert_close(outputs.gather(1, rows[:, None])[:, 0], expected - net.value_bias[rows])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"visible": "grey"}, '"bits" or "reals"'),
        ({"hidden": 0}, "at least 1"),
        ({"scale": 0.0}, "positive"),
        ({"learn_scale": True}, "bits have no scale to learn"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RBM((4,), **options)
