"""The networks of experts, one a file, and the registry of those that a checkpoint may name."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from composable_ebm.experts.networks.classifier import NoisyClassifier
from composable_ebm.experts.networks.confined import ConfinedEnergy
from composable_ebm.experts.networks.convolutional import ConvEnergy
from composable_ebm.experts.networks.denoiser import Denoiser
from composable_ebm.experts.networks.diffused import DiffusedEnergy
from composable_ebm.experts.networks.patches import DiffusedPatches
from composable_ebm.experts.networks.rbm import RBM
from composable_ebm.experts.networks.regions import RegionClassifier
from composable_ebm.experts.networks.windows import DiffusedWindows

__all__ = [
    "NETWORKS",
    "RBM",
    "ConfinedEnergy",
    "ConvEnergy",
    "Denoiser",
    "DiffusedEnergy",
    "DiffusedPatches",
    "DiffusedWindows",
    "NoisyClassifier",
    "RegionClassifier",
    "register_network",
]

NETWORKS: dict[str, type[nn.Module]] = {
    network.__name__: network
    for network in (
        *(ConfinedEnergy, ConvEnergy, Denoiser, DiffusedEnergy),
        *(DiffusedPatches, DiffusedWindows, NoisyClassifier, RBM, RegionClassifier),
    )
}
"""The networks that a checkpoint may name, by the name of their class."""

N = TypeVar("N", bound=type[nn.Module])


def register_network(network: N) -> N:
    """Lets `save_expert` write, and `load_expert` read, networks of a class of your own.

    A card names the class and the arguments that build it; importing the module that registers it is all
    that whoever loads the expert has to do first.

    Args:
        network: A class of modules x -> (batch, values), or (x, noise_level) -> (batch, values).
    Returns:
        The class itself, so that this is a decorator too.
    Raises:
        TypeError: If it is no class of modules.
        ValueError: If another class has that name.
    Example:
        >>> @register_network
        ... class MyEnergy(nn.Module):
        ...     def __init__(self, hidden: int = 64): ...
        >>> save_expert(folder, MyEnergy(32), Card(..., network={"type": "MyEnergy", "hidden": 32}))
    """
    if not (isinstance(network, type) and issubclass(network, nn.Module)):
        raise TypeError(f"`network` must be a class of modules, got {network!r}.")
    name, known = network.__name__, NETWORKS.get(network.__name__)
    places = {(each.__module__, each.__qualname__) for each in (network, known) if each is not None}
    if known is not None and len(places) > 1:  # a class defined again, as in a notebook, takes its own place
        raise ValueError(f"there is another network called {name}, in {known.__module__}: rename one.")
    NETWORKS[name] = network
    return network
