"""Compose energy-based models after training: `smile + 2*glasses`, sampled by one engine.

import composable_ebm as ceb

three = ceb.load_expert("contrastive_digits/digit")[3]
thick = ceb.load_expert("contrastive_digits/thick")
out = ceb.sample(three + thick, num_chains=16, seed=0)
"""

from composable_ebm.energy import (
    Codec,
    Energy,
    Mixture,
    Not,
    Sum,
    analytic,
    given,
    log_ratio,
    mixture,
    negate,
    ratio,
)
from composable_ebm.energy.adapters import from_callable, from_classifier
from composable_ebm.energy.autoencoder import from_autoencoder
from composable_ebm.energy.bits import on_bits
from composable_ebm.energy.diffusion import from_denoiser, from_diffusers, from_noise_predictor, from_score
from composable_ebm.energy.text_image import from_clip
from composable_ebm.experts import (
    Card,
    CheckpointError,
    Expert,
    load_expert,
    push_to_hub,
    register_network,
    save_expert,
)
from composable_ebm.experts.catalogue import catalogue
from composable_ebm.experts.joint import from_joint_classifier
from composable_ebm.experts.recipe import RecipeError, parse
from composable_ebm.partition.calibrate import calibrate, log_z_difference
from composable_ebm.partition.log_z import exact_log_z, log_z
from composable_ebm.pipelines import from_pipeline
from composable_ebm.sampling import (
    DMALA,
    HMC,
    MALA,
    Annealed,
    Chain,
    ChainDivergedError,
    Engine,
    Frame,
    Gibbs,
    Kernel,
    Langevin,
    LeimkuhlerMatthews,
    Live,
    Noise,
    Particles,
    Run,
    SampleResult,
    Still,
    UnderdampedLangevin,
    diagnostics,
    sample,
)
from composable_ebm.sampling import schedule as schedules
from composable_ebm.sampling.schedule import Schedule

__version__ = "0.1.0"

__all__ = [
    "DMALA",
    "HMC",
    "MALA",
    "Annealed",
    "Card",
    "Chain",
    "ChainDivergedError",
    "CheckpointError",
    "Codec",
    "Energy",
    "Engine",
    "Expert",
    "Frame",
    "Gibbs",
    "Kernel",
    "Langevin",
    "LeimkuhlerMatthews",
    "Live",
    "Mixture",
    "Noise",
    "Not",
    "Particles",
    "RecipeError",
    "Run",
    "SampleResult",
    "Schedule",
    "Still",
    "Sum",
    "UnderdampedLangevin",
    "analytic",
    "calibrate",
    "catalogue",
    "diagnostics",
    "exact_log_z",
    "from_autoencoder",
    "from_callable",
    "from_classifier",
    "from_clip",
    "from_denoiser",
    "from_diffusers",
    "from_joint_classifier",
    "from_noise_predictor",
    "from_pipeline",
    "from_score",
    "given",
    "load_expert",
    "log_ratio",
    "log_z",
    "log_z_difference",
    "mixture",
    "negate",
    "on_bits",
    "parse",
    "push_to_hub",
    "ratio",
    "register_network",
    "sample",
    "save_expert",
    "schedules",
]
