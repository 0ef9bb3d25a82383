"""Training: one expert at a time, each from its own configuration."""

from composable_ebm.processes import leave
from composable_ebm.train.config import TrainConfig
from composable_ebm.train.greedy import train_layers
from composable_ebm.train.objectives.contrastive import ContrastiveDivergence
from composable_ebm.train.reading import read_config
from composable_ebm.train.trainer import Trainer, TrainingDivergedError, train

__all__ = [
    "ContrastiveDivergence",
    "TrainConfig",
    "Trainer",
    "TrainingDivergedError",
    "leave",
    "read_config",
    "train",
    "train_layers",
]
