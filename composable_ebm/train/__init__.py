"""Training: one expert at a time, each from its own configuration."""

from composable_ebm.train.config import TrainConfig, read_config
from composable_ebm.train.objectives import ContrastiveDivergence
from composable_ebm.train.trainer import Trainer, TrainingDivergedError, train

__all__ = ["ContrastiveDivergence", "TrainConfig", "Trainer", "TrainingDivergedError", "read_config", "train"]
