"""Compose energy-based models after training: `smile + 2*glasses`, sampled by one engine.

import composable_ebm as ceb

three = ceb.load_expert("digits/digit")[3]
thick = ceb.load_expert("digits/thick")
out = ceb.sample(three + thick, num_chains=16, seed=0)
"""

from composable_ebm import analytic, diagnostics, schedules
from composable_ebm.adapters import from_callable, from_classifier
from composable_ebm.energy import Energy, Mixture, Not, Sum, log_ratio, mixture, negate, ratio
from composable_ebm.experts import Card, CheckpointError, Expert, given, load_expert, save_expert
from composable_ebm.experts.catalogue import catalogue
from composable_ebm.partition import calibrate, log_z_difference
from composable_ebm.recipe import RecipeError, parse
from composable_ebm.sampling import (
    HMC,
    MALA,
    Annealed,
    Chain,
    ChainDivergedError,
    Kernel,
    Langevin,
    Noise,
    SampleResult,
    UnderdampedLangevin,
    sample,
)
from composable_ebm.schedules import Schedule

__version__ = "0.1.0"

__all__ = [
    "HMC",
    "MALA",
    "Annealed",
    "Card",
    "Chain",
    "ChainDivergedError",
    "CheckpointError",
    "Energy",
    "Expert",
    "Kernel",
    "Langevin",
    "Mixture",
    "Noise",
    "Not",
    "RecipeError",
    "SampleResult",
    "Schedule",
    "Sum",
    "UnderdampedLangevin",
    "analytic",
    "calibrate",
    "catalogue",
    "diagnostics",
    "from_callable",
    "from_classifier",
    "given",
    "load_expert",
    "log_ratio",
    "log_z_difference",
    "mixture",
    "negate",
    "parse",
    "ratio",
    "sample",
    "save_expert",
    "schedules",
]
