"""Sampling: kernels, one engine that runs them, and the results."""

from composable_ebm.sampling.annealed import Annealed
from composable_ebm.sampling.chain import Chain
from composable_ebm.sampling.dmala import DMALA
from composable_ebm.sampling.engine import Engine
from composable_ebm.sampling.gibbs import Gibbs
from composable_ebm.sampling.hmc import HMC
from composable_ebm.sampling.kernel import Dynamics, Info, Kernel, Noise, State
from composable_ebm.sampling.langevin import Langevin
from composable_ebm.sampling.leimkuhler_matthews import LeimkuhlerMatthews
from composable_ebm.sampling.live import Live
from composable_ebm.sampling.mala import MALA
from composable_ebm.sampling.particles import Particles, Weighted
from composable_ebm.sampling.result import SampleResult
from composable_ebm.sampling.run import Frame, Run
from composable_ebm.sampling.sample import sample
from composable_ebm.sampling.settings import from_settings, to_settings
from composable_ebm.sampling.still import Still
from composable_ebm.sampling.trace import ChainDivergedError
from composable_ebm.sampling.underdamped import UnderdampedLangevin

__all__ = [
    "DMALA",
    "HMC",
    "MALA",
    "Annealed",
    "Chain",
    "ChainDivergedError",
    "Dynamics",
    "Engine",
    "Frame",
    "Gibbs",
    "Info",
    "Kernel",
    "Langevin",
    "LeimkuhlerMatthews",
    "Live",
    "Noise",
    "Particles",
    "Run",
    "SampleResult",
    "State",
    "Still",
    "UnderdampedLangevin",
    "Weighted",
    "from_settings",
    "sample",
    "to_settings",
]
