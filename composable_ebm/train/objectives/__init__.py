"""What a training may minimise, one objective a file."""

from composable_ebm.train.objectives.base import Figures, Objective, Phase, Setting
from composable_ebm.train.objectives.classification import NoisyClassification
from composable_ebm.train.objectives.contrastive import ContrastiveDivergence
from composable_ebm.train.objectives.denoising import DenoisingAtOneLevel, DenoisingScoreMatching
from composable_ebm.train.objectives.over_levels import ContrastiveOverLevels
from composable_ebm.train.objectives.reconstruction import Reconstruction
from composable_ebm.train.objectives.recovery import RecoveryLikelihood
from composable_ebm.train.objectives.score_matching import ScoreMatching, SlicedScoreMatching

__all__ = [
    "ContrastiveDivergence",
    "ContrastiveOverLevels",
    "DenoisingAtOneLevel",
    "DenoisingScoreMatching",
    "Figures",
    "NoisyClassification",
    "Objective",
    "Phase",
    "Reconstruction",
    "RecoveryLikelihood",
    "ScoreMatching",
    "Setting",
    "SlicedScoreMatching",
]
