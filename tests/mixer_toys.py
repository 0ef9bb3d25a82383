"""Toy experts for the tests of the mixer: three families, one of them with a base."""

from helpers import card, network

import composable_ebm as ceb

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
