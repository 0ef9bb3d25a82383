"""A sampler as plain values, as stored in an expert's file and written in a config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields

from composable_ebm.sampling.annealed import Annealed
from composable_ebm.sampling.block import Sampler
from composable_ebm.sampling.dmala import DMALA
from composable_ebm.sampling.gibbs import Gibbs
from composable_ebm.sampling.hmc import HMC
from composable_ebm.sampling.kernel import Kernel
from composable_ebm.sampling.langevin import Langevin
from composable_ebm.sampling.leimkuhler_matthews import LeimkuhlerMatthews
from composable_ebm.sampling.mala import MALA
from composable_ebm.sampling.particles import Particles
from composable_ebm.sampling.schedule import Curve, Schedule
from composable_ebm.sampling.still import Still
from composable_ebm.sampling.underdamped import UnderdampedLangevin

KERNELS: tuple[type[Kernel], ...] = (
    Langevin,
    LeimkuhlerMatthews,
    MALA,
    HMC,
    UnderdampedLangevin,
    Gibbs,
    DMALA,
    Still,
)

CURVES = ("temperature", "noise_level", "step_scale")
WEIGHING = ("num_particles", "per_chain", "threshold", "verdict", "surest")

__all__ = ["from_settings", "to_settings"]


def to_settings(sampler: Sampler) -> dict:
    """A sampler as plain values that a JSON file can hold; `from_settings` reads them back.

    Raises:
        ValueError: If its schedule follows a function that is no `Curve`, or it is particles with a
            `carrier` of their own.
    """
    if isinstance(sampler, Kernel):
        return sampler.settings()
    schedule = sampler.schedule
    anneal: dict[str, object] = {}
    for name in CURVES:
        curve = getattr(schedule, name)
        if isinstance(curve, Curve):
            anneal[name] = {"knots": [list(knot) for knot in curve.knots], "between": curve.between}
        elif curve is not None:
            raise ValueError(f"only a Curve can be stored; {name} follows {curve!r}.")
    for field in fields(Schedule):
        if field.name not in CURVES and (value := getattr(schedule, field.name)) != field.default:
            anneal[field.name] = value
    stored: dict[str, object] = {**sampler.kernel.settings(), "anneal": anneal}
    if isinstance(sampler, Particles):
        if sampler.carrier is not None:
            raise ValueError(f"particles carried by {sampler.carrier} cannot be stored: it is an energy.")
        stored["particles"] = {name: getattr(sampler, name) for name in WEIGHING}
    return stored


def from_settings(settings: Mapping, factor: float = 1.0) -> tuple[Sampler, int]:
    """The sampler and number of steps that `settings` describe.

    Args:
        settings: "kernel" and its arguments; "num_steps"; and "anneal", the curves of a schedule
            ("temperature", "noise_level", "step_scale", each with "knots" and "between") and its
            other fields; and "particles", how they are weighed.
        factor: Multiplies the step size.
    Raises:
        ValueError: If the kernel or an argument is unknown.
    """
    values = dict(settings)
    name, num_steps = values.pop("kernel", None), int(values.pop("num_steps", 0))
    anneal, weighing = dict(values.pop("anneal", {})), values.pop("particles", None)
    kernels = {kernel.__name__: kernel for kernel in KERNELS}
    if name not in kernels:
        raise ValueError(f"unknown sampler {name!r}; there are {', '.join(kernels)}.")
    _refuse_unknown(name, values, [field.name for field in fields(kernels[name]) if field.init])
    kernel = kernels[name](**values).scaled(factor)
    if not anneal:
        return kernel, num_steps
    _refuse_unknown("anneal", anneal, [field.name for field in fields(Schedule)])
    for curve in set(anneal) & set(CURVES):
        anneal[curve] = Curve(anneal[curve]["knots"], anneal[curve]["between"])
    schedule = Schedule(**anneal)
    if weighing is None:
        return Annealed(kernel, schedule), num_steps
    _refuse_unknown("particles", weighing, WEIGHING)
    return Particles(kernel, schedule, **weighing), num_steps


def _refuse_unknown(what: str, values: Mapping, known: Sequence[str]) -> None:
    if unknown := sorted(set(values) - set(known)):
        raise ValueError(f"{what} has no setting {', '.join(unknown)}; it has {', '.join(sorted(known))}.")
