"""Toy experts for the tests of the mixer: three families, one of them with a base."""

import base64
import io

import torch
from helpers import card, network
from PIL import Image

import composable_ebm as ceb
from composable_ebm.experts.networks.diffused import DiffusedEnergy

SHORT = {"kernel": "Langevin", "step_size": 0.1, "num_steps": 7}


def toy_cards():
    shape = (1, 16, 16)
    made = [
        card("digit", tuple("0123456789"), "Toys", shape),
        card("slanted", ("upright", "slanted"), "Toys", shape),
        card("thick", ("thin", "thick"), "Toys", shape, failures="Makes blobs."),
        card("body", ("image",), "Yard", shape, attribute="image", sampler=SHORT),
        card("hat", ("bare", "hat"), "Yard", shape, weight=4.0, sampler=SHORT, data="Yard/train, 9 images"),
        card("hue", ("red", "green", "blue"), "Yard", shape, sampler=SHORT),
        card("cat", ("cat",), "Zoo", shape),
    ]
    return {each.full_name: each for each in made}


def write_models(folder):
    """Saves the toys, and returns the folder."""
    for seed, (name, each) in enumerate(toy_cards().items()):
        ceb.save_expert(folder / name, network(each, seed), each)
    return folder


def diffused(name, values, seed, **changes):
    """A noise-conditioned expert with random weights."""
    torch.manual_seed(seed)
    net = DiffusedEnergy((1, 4, 4), len(values), hidden=8, components=4, noise_range=(0.02, 10.0))
    torch.nn.init.zeros_(net.quadratic_head.weight)  # which could fall for ever, untrained
    if net.value_head is not None:
        torch.nn.init.normal_(net.value_head.weight)
    anneal = {"noise_level": {"knots": [[0, 10.0], [1, 0.02]], "between": "karras"}}
    anneal |= {"noise_power": 2.0, "predict": True}
    sampler = {"kernel": "Langevin", "step_size": 0.3, "num_steps": 20, "anneal": anneal}
    description = card(name, values, sampler=sampler, noise_conditioned=True, **changes)
    return ceb.Expert.standing(net.eval(), description)


def decode(uri):
    """The picture in a data URI."""
    head, content = uri.split(",", 1)
    assert head == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(content)))
