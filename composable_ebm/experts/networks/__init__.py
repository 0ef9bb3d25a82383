"""The networks of experts, one a file, and the registry of those that a checkpoint may name."""

from __future__ import annotations

from torch import nn

from composable_ebm.experts.networks.classifier import NoisyClassifier
from composable_ebm.experts.networks.confined import ConfinedEnergy
from composable_ebm.experts.networks.convolutional import ConvEnergy
from composable_ebm.experts.networks.denoiser import Denoiser
from composable_ebm.experts.networks.diffused import DiffusedEnergy
from composable_ebm.experts.networks.patches import DiffusedPatches
from composable_ebm.experts.networks.rbm import RBM
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
]

NETWORKS: dict[str, type[nn.Module]] = {
    network.__name__: network
    for network in (
        *(ConfinedEnergy, ConvEnergy, Denoiser, DiffusedEnergy),
        *(DiffusedPatches, DiffusedWindows, NoisyClassifier, RBM),
    )
}
"""The networks that a checkpoint may name, by the name of their class."""
