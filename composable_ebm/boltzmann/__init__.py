"""Boltzmann machines: binary units with couplings, and what is stacked from restricted ones."""

from composable_ebm.boltzmann.deep_belief import DeepBelief
from composable_ebm.boltzmann.learning import BoltzmannLearning
from composable_ebm.boltzmann.machine import BoltzmannMachine

__all__ = ["BoltzmannLearning", "BoltzmannMachine", "DeepBelief"]
