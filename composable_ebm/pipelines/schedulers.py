"""A scheduler of `diffusers`: which noise levels it walks, and what its network expects to be shown."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from composable_ebm.energy.parametrisation import (
    PURE_NOISE,
    Flow,
    Parametrisation,
    Preconditioned,
    VariancePreserving,
)

FLOW = "flow_prediction"
SPACED_IN_LOG = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")

__all__ = ["learns_variance", "noise_levels", "parametrisation_of"]


def parametrisation_of(scheduler: Any, time_scale: float = 1000.0) -> Parametrisation:
    """How networks that were trained under a scheduler are asked.

    Args:
        scheduler: Of a pipeline.
        time_scale: What the network of a flow calls t = 1.
    Raises:
        ValueError: If it is of no kind that is known here.
    """
    config, kind = scheduler.config, type(scheduler).__name__
    predicts = config.get("prediction_type", "epsilon")
    if "sigma_data" in config:
        noise_range = (config["sigma_min"], config["sigma_max"])
        return Preconditioned(
            noise_range, config["sigma_data"], sign=-1.0 if predicts == "v_prediction" else 1.0
        )
    if kind.startswith("FlowMatch") or predicts == FLOW:
        return Flow(time_scale)
    if hasattr(scheduler, "alphas_cumprod"):
        spaced = any(config.get(name) for name in SPACED_IN_LOG) or "interpolation_type" not in config
        return VariancePreserving(
            scheduler.alphas_cumprod, predicts, log_linear=spaced or config["interpolation_type"] != "linear"
        )
    raise ValueError(
        f"{kind} has neither `alphas_cumprod` nor `sigma_data`, and matches no flow: give the scheduler that "
        "the network was trained with: pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)."
    )


def learns_variance(scheduler: Any) -> bool:
    """Whether networks under this scheduler answer a variance after the mean."""
    return str(scheduler.config.get("variance_type", "")).startswith("learned")


def noise_levels(
    scheduler: Any, parametrisation: Parametrisation, num_steps: int, options: Mapping[str, Any]
) -> list[float]:
    """The noise levels σ that a scheduler walks in so many steps, falling, without the last 0.

    Args:
        scheduler: Of a pipeline; it is not changed.
        parametrisation: What its networks are asked by.
        num_steps: Steps. Schedulers that visit a level twice, as Heun's does, have fewer levels.
        options: For its `set_timesteps`, besides the number.
    """
    walker = copy.deepcopy(scheduler)
    walker.set_timesteps(**{"num_inference_steps": num_steps, **options})
    sigmas = getattr(walker, "sigmas", None)
    if isinstance(parametrisation, VariancePreserving) and not _has_levels(walker, num_steps):
        levels = parametrisation.sigma(torch.as_tensor(np.asarray(walker.timesteps, dtype=np.float64)))
    else:
        levels = torch.as_tensor(np.asarray(sigmas, dtype=np.float64))
    if isinstance(parametrisation, Flow):
        levels = levels[levels > 0]
        levels = levels / (1 - levels).clamp(min=1 / (1 + PURE_NOISE))
    falling: list[float] = []
    for level in levels[levels > 0].clamp(max=parametrisation.noise_range[1]).tolist():
        if not falling or level < falling[-1]:
            falling.append(level)
    return falling


def _has_levels(walker: Any, num_steps: int) -> bool:
    """Whether its `sigmas` are those of the run, and not a table of the training."""
    sigmas = getattr(walker, "sigmas", None)
    return sigmas is not None and len(sigmas) in (num_steps + 1, 2 * num_steps)
