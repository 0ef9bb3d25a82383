"""Trained energies: networks, their files and their names."""

from composable_ebm.experts.card import Card, CheckpointError
from composable_ebm.experts.catalogue import load_expert
from composable_ebm.experts.expert import Expert
from composable_ebm.experts.hub import push_to_hub
from composable_ebm.experts.networks import ConvEnergy, register_network
from composable_ebm.experts.store import save_expert

__all__ = [
    "Card",
    "CheckpointError",
    "ConvEnergy",
    "Expert",
    "load_expert",
    "push_to_hub",
    "register_network",
    "save_expert",
]
