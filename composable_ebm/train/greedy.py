"""Greedy training of a stack of RBMs: each learns the hidden units of the one below."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from composable_ebm.data import LabelledImages
from composable_ebm.data.ranges import rescaled
from composable_ebm.experts.expert import Expert
from composable_ebm.experts.networks.rbm import RBM
from composable_ebm.train.config import TrainConfig
from composable_ebm.train.trainer import train

CHUNK = 4096

__all__ = ["hidden_data", "train_layers"]


@torch.no_grad()
def hidden_data(network: RBM, data: LabelledImages) -> LabelledImages:
    """The hidden units of an RBM on a data set, as images (n, 1, 1, hidden) for the next RBM to learn.

    Pixels are the probabilities p(h = 1 | v) as grey levels, from which training draws bits.
    """
    parts = []
    for index in torch.arange(len(data)).split(CHUNK):
        probability = network.features(rescaled(data.batch(index), network.data_range))
        parts.append((probability * 255).round().byte())
    images = torch.cat(parts)[:, None, None]
    return LabelledImages(images, data.labels, data.values, f"hidden units of {data.name}")


def train_layers(
    configs: Sequence[TrainConfig],
    below: Sequence[Expert] = (),
    data: tuple[LabelledImages, LabelledImages] | None = None,
) -> list[Expert]:
    """Trains RBMs one above the other, from the lowest up.

    Args:
        configs: One for each new layer; the data that the first names are what the lowest layer sees.
        below: Layers that are trained already, from the lowest up.
        data: Images to learn from and held-out ones, in place of those that `configs` name.
    Returns:
        All layers, `below` first.
    Reference:
        Hinton, Osindero and Teh (2006), section 4.
    """
    if not configs:
        return list(below)
    seen = configs[0].data
    data = data or (seen.load("train"), seen.load("validation"))
    layers: list[Expert] = []
    for expert in below:
        layers.append(expert)
        data = (hidden_data(expert.network, data[0]), hidden_data(expert.network, data[1]))  # type: ignore
    for config in configs:
        layers.append(train(config, data=data))
        network = layers[-1].network
        assert isinstance(network, RBM)
        data = (hidden_data(network, data[0]), hidden_data(network, data[1]))
    return layers
