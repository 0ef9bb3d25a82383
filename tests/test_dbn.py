"""Deep belief networks: how layers fit, what goes up and down, and greedy training."""

from dataclasses import replace

import pytest
import torch
from bit_helpers import rbm, rbm_training
from torch import nn

from composable_ebm.boltzmann import DeepBelief
from composable_ebm.data import LabelledImages
from composable_ebm.data.bars import bars_and_stripes
from composable_ebm.energy.bits import bit_states
from composable_ebm.experts.networks.rbm import RBM
from composable_ebm.train import train_layers
from composable_ebm.train.config import RBM as Sizes
from composable_ebm.train.greedy import hidden_data


def stack():
    """4 visible units, 3 hidden ones, and 2 above."""
    return DeepBelief([rbm(0, hidden=3, size=4), rbm(1, hidden=2, size=3)])


def test_samples_match_the_joint_distribution_by_enumeration():
    network = stack()
    first, top = network.layers
    h, v = bit_states(3), bit_states(4)
    with torch.no_grad():
        above = (-top.free_energy()(h)).softmax(0)
        told = first.conditionals()
        on = (told.field + h @ told.weight.T).sigmoid()  # (states of h, visible)
        given = torch.where(v[:, None] == 1, on, 1 - on).prod(2)
        marginal = (given @ above) @ v
    images, run = network.sample(num_chains=20_000, num_steps=30)
    torch.testing.assert_close(images.mean(0), marginal, atol=0.015, rtol=0)
    assert run.samples.shape == (20_000, 3)


def test_the_layer_above_starts_as_good_as_the_one_below():
    # A top RBM whose weights are the transpose of the lower one's, and biases swapped, is the lower
    # RBM read from above: the network then has exactly its distribution (Hinton et al., section 3).
    first = rbm(0, hidden=3, size=4)
    tied = RBM((3,), hidden=4)
    with torch.no_grad():
        tied.weight.copy_(first.weight.T)
        tied.visible_bias.copy_(first.hidden_bias)
        tied.hidden_bias.copy_(first.visible_bias)
        v = bit_states(4)
        marginal = (-first.free_energy()(v)).softmax(0) @ v
    images, _ = DeepBelief([first, tied]).sample(num_chains=20_000, num_steps=30)
    torch.testing.assert_close(images.mean(0), marginal, atol=0.015, rtol=0)


def test_features_go_up_layer_by_layer():
    network, x = stack(), torch.rand(6, 4)
    first, top = network.layers
    torch.testing.assert_close(network.features(x, 1), first.features(x).detach())
    torch.testing.assert_close(network.features(x), top.features(first.features(x)).detach())


def test_one_layer_is_the_rbm_itself():
    net = rbm(0, size=4)
    images, run = DeepBelief([net]).sample(num_chains=8, num_steps=5)
    torch.testing.assert_close(images, run.samples)


def test_layers_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="a layer of 4 visible units does not fit on 3 hidden ones"):
        DeepBelief([rbm(0, size=4), rbm(1, size=4)])
    for layers in ([], [rbm(visible="reals")], [rbm(values=3)]):
        with pytest.raises(ValueError, match="made of RBMs of bits without values"):
            DeepBelief(layers)


def test_it_is_no_energy():
    with pytest.raises(TypeError):
        rbm().free_energy() + stack()
    assert isinstance(stack(), nn.Module)


def test_hidden_data_are_the_probabilities_of_the_hidden_units():
    images = (bars_and_stripes(2) * 255).byte()
    net = rbm(0, size=4)
    lifted = hidden_data(net, LabelledImages(images, {}, {}, "bars"))
    assert lifted.images.shape == (6, 1, 1, 3)
    expected = net.features(images.flatten(1) / 255).detach()
    torch.testing.assert_close(lifted.images.flatten(1) / 255, expected, atol=0.003, rtol=0)


def test_greedy_training_stacks_rbms(tmp_path):
    images = (bars_and_stripes(3) * 255).byte()
    data = LabelledImages(images, {}, {}, "bars")
    config = rbm_training(tmp_path, num_iterations=60)
    second = replace(config, name="second", network=Sizes(hidden=6))
    layers = train_layers([config, second], data=(data, data))
    network = DeepBelief([layer.network for layer in layers])
    assert [tuple(layer.weight.shape) for layer in network.layers] == [(9, 8), (8, 6)]
    samples, _ = network.sample(num_chains=4, num_steps=10)
    assert samples.shape == (4, 1, 3, 3)
    assert network.features(images[:5].float() / 255).shape == (5, 6)
