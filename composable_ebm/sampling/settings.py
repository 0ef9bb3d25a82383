"""A sampler as plain values, as stored in an expert's file and written in a config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields

from composable_ebm.sampling.annealed import Annealed
from composable_ebm.sampling.engine import Sampler
from composable_ebm.sampling.hmc import HMC
from composable_ebm.sampling.kernel import Kernel
from composable_ebm.sampling.langevin import Langevin
from composable_ebm.sampling.mala import MALA
from composable_ebm.sampling.underdamped import UnderdampedLangevin
from composable_ebm.schedules import Schedule, cosine, hold_then

KERNELS: tuple[type[Kernel], ...] = (Langevin, MALA, HMC, UnderdampedLangevin)

__all__ = ["from_settings"]


def from_settings(settings: Mapping, factor: float = 1.0) -> tuple[Sampler, int]:
    """The sampler and number of steps that `settings` describe.

    Args:
        settings: "kernel" and its arguments, "num_steps", and "cooldown": the share of the run, at
            its end, in which step and noise fall to 2 % of their values.
        factor: Multiplies the step size.
    Raises:
        ValueError: If the kernel or an argument is unknown.
    """
    values = dict(settings)
    name, num_steps = values.pop("kernel", None), int(values.pop("num_steps", 0))
    cooldown = float(values.pop("cooldown", 0.0))
    kernels = {kernel.__name__: kernel for kernel in KERNELS}
    if name not in kernels:
        raise ValueError(f"unknown sampler {name!r}; there are {', '.join(kernels)}.")
    known = {field.name for field in fields(kernels[name])}
    if unknown := sorted(set(values) - known):
        raise ValueError(f"{name} has no setting {', '.join(unknown)}; it has {', '.join(sorted(known))}.")
    kernel = kernels[name](**values).scaled(factor)
    if not cooldown:
        return kernel, num_steps
    return Annealed(kernel, Schedule(step_scale=hold_then(cosine(1.0, 0.02), 1 - cooldown))), num_steps
