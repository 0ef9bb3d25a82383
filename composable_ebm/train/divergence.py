"""Trainings that diverge: what is said, and what is not written."""

from __future__ import annotations

from dataclasses import fields

from torch import nn

from composable_ebm.train.config import TrainConfig

__all__ = ["TrainingDivergedError", "advice", "finite"]


class TrainingDivergedError(RuntimeError):
    """A training that diverged again and again; the last good expert was written, if there was one."""


def finite(network: nn.Module) -> bool:
    """Whether all weights and buffers are numbers."""
    return all(bool(value.isfinite().all()) for value in network.state_dict().values())


def advice(config: TrainConfig) -> str:
    """What to change after a divergence, of what there is to change."""
    objective = {f.name for f in fields(config.objective)}
    higher = [f"--objective.{n.replace('_', '-')}" for n in ("energy_l2", "data_noise") if n in objective]
    more = [f"--objective.{n.replace('_', '-')}" for n in ("cd_steps", "langevin_steps") if n in objective]
    parts = [
        f"a lower --optimiser.learning-rate (now {config.optimiser.learning_rate:g})",
        f"a lower --optimiser.grad-clip (now {config.optimiser.grad_clip:g})",
        *([f"a higher {' or '.join(higher)}"] if higher else []),
        *([f"more {' or '.join(more)}"] if more else []),
    ]
    return f"Try {', or '.join(parts)}, with --fresh."
