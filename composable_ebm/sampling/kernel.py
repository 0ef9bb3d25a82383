"""What every sampler is: one Markov kernel, a pure function of tensors.

    init(potential, x)                     -> state            what the next step needs
    step(potential, state, noise, dynamics) -> (state, info)   info: what one may want to look at

A kernel leaves exp(-E(x)/T) invariant, or nearly so. It never loops (the engine does), never draws
from a global generator (`noise` draws), and never reads a number off the device: step size,
temperature and noise scale arrive as tensors, so moving them costs nothing.

Symbols used by all kernels: η step_size, T temperature, ξ standard normal noise, g = ∂E/∂x.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from composable_ebm.energy import Energy, require_values
from composable_ebm.potential.potential import Potential

__all__ = ["Dynamics", "Info", "Kernel", "Noise", "Potential", "State", "expand"]


class State(NamedTuple):
    """Where the chains are: states, their energies and gradients, and momenta where there are any."""

    x: Tensor
    energy: Tensor
    gradient: Tensor
    momentum: Tensor | None = None


class Info(NamedTuple):
    """What happened in a step. `acceptance`: probability of acceptance, (batch,), or None."""

    acceptance: Tensor | None = None


class Dynamics(NamedTuple):
    """The numbers of a step, as tensors () or (batch,).

    Attributes:
        step_size: η.
        temperature: T.
        noise_scale: That of noise that is decoupled from the step.
        axes: Orthonormal directions along which steps have a length of their own, (axes, size), for kernels
            that have `along_axes`.
        steps: η along each, (axes,) or (batch, axes).
    """

    step_size: Tensor
    temperature: Tensor
    noise_scale: Tensor | None = None
    axes: Tensor | None = None
    steps: Tensor | None = None


class Noise:
    """Random draws for a batch, each block of rows from its own generator.

    A request draws the same noise whatever else is in the batch: its rows come from its generator
    alone, in one draw of its own shape.

    Args:
        sources: (generator, number of rows) for each block, in order.
    """

    def __init__(self, *sources: tuple[torch.Generator, int]) -> None:
        self.sources = sources

    def normal(self, like: Tensor) -> Tensor:
        """Standard normal, shape, dtype and device of `like`."""
        return self._draw(torch.randn, like.shape[1:], like)

    def uniform(self, like: Tensor) -> Tensor:
        """Uniform on [0, 1), one a row of `like`, shape (batch,)."""
        return self._draw(torch.rand, torch.Size(), like)

    def uniforms(self, like: Tensor) -> Tensor:
        """Uniform on [0, 1), shape, dtype and device of `like`."""
        return self._draw(torch.rand, like.shape[1:], like)

    def number(self, like: Tensor) -> Tensor:
        """One number, uniform on [0, 1), (), from the first block's generator."""
        return torch.rand((), generator=self.sources[0][0], dtype=like.dtype, device=like.device)

    def bits(self, probability: Tensor) -> Tensor:
        """1 with the given probabilities, (batch, *event), and 0 otherwise."""
        u = self.uniforms(probability)
        return torch.lt(u, probability, out=u)

    def binomial(self, count: Tensor, probability: Tensor) -> Tensor:
        """How many of `count` bits are 1, for `count` () or (batch,) and probabilities (batch, units)."""
        blocks, start = [], 0
        for generator, rows in self.sources:
            p = probability[start : start + rows]
            n = count if count.ndim == 0 else count[start : start + rows, None]
            start += rows
            # A read of `count` would wait for the device; on a CPU single bits are the faster draw.
            if not n.is_cuda and bool((n == 1).all()):
                u = torch.rand(p.shape, generator=generator, dtype=p.dtype, device=p.device)
                blocks.append(torch.lt(u, p, out=u))
            else:
                blocks.append(torch.binomial(n.expand_as(p).contiguous(), p, generator=generator))
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks)

    def _draw(self, draw: Callable[..., Tensor], event: Sequence[int], like: Tensor) -> Tensor:
        blocks = [
            draw((rows, *event), generator=generator, dtype=like.dtype, device=like.device)
            for generator, rows in self.sources
        ]
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks)


def expand(value: Tensor, x: Tensor) -> Tensor:
    """A value () or (batch,) shaped to broadcast over the states `x`, (batch, *event)."""
    return value.reshape(-1, *[1] * (x.ndim - 1)) if value.ndim else value


@dataclass(frozen=True)
class Kernel(ABC):
    """A Markov kernel and its settings.

    Args:
        step_size: η > 0; its unit is the kernel's own, see there.
        temperature: T > 0 in exp(-E/T).
        target_acceptance: Step sizes adapt towards it while the engine warms up; None for kernels
            that accept everything.
    Raises:
        ValueError: If a setting is not positive and finite.
    """

    step_size: float
    temperature: float = 1.0
    target_acceptance: float | None = None

    needs_energy: ClassVar[bool] = False
    """Whether steps are accepted or not by the energies at both ends, not by gradients alone."""

    along_axes: ClassVar[bool] = False
    """Whether steps may have lengths of their own along some axes, see `Dynamics.axes`."""

    def __post_init__(self) -> None:
        for name in ("step_size", "temperature"):
            value = getattr(self, name)
            if not (isinstance(value, (int, float)) and 0 < value < math.inf):
                raise ValueError(
                    f"`{name}` of {type(self).__name__} must be positive and finite, got {value!r}."
                )
        if self.target_acceptance is not None and not 0 < self.target_acceptance < 1:
            raise ValueError(f"`target_acceptance` must be between 0 and 1, got {self.target_acceptance}.")

    # How many gradients one step takes, and whether state.energy belongs to state.x after it.
    @property
    def gradients_per_step(self) -> int:
        return 1

    @property
    def energy_is_current(self) -> bool:
        return True

    @property
    def implied_temperature(self) -> float:
        """The T whose Langevin dynamics has this step and noise."""
        return self.temperature

    def dynamics(self, x: Tensor) -> Dynamics:
        """The settings as tensors on the device of `x`."""
        return Dynamics(*(x.new_full((), v) for v in (self.step_size, self.temperature)))

    def scaled(self, factor: float) -> Self:
        """The same kernel for an energy 1/factor times as steep: `factor` times the step η."""
        return replace(self, step_size=self.step_size * factor)

    def settings(self) -> dict[str, object]:
        """What differs from the defaults, as plain values that a JSON file can hold."""
        kept = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return {"kernel": type(self).__name__, **kept}

    def __str__(self) -> str:
        return _call(type(self).__name__, {k: v for k, v in self.settings().items() if k != "kernel"})

    def check(self, energy: Energy) -> None:
        """Raises ValueError where this kernel cannot move the states of `energy`."""
        if self.needs_energy:
            require_values(f"{type(self).__name__} accepts steps by differences of energy", [energy])
        if energy.binary:
            raise ValueError(
                f"{type(self).__name__} takes real steps, and {energy} lives on bits: use Gibbs() where its "
                "conditionals have a closed form, or the relaxation DMALA(step_size=0.2), which follows the "
                "same gradient from bit to bit and samples any differentiable energy of bits."
            )

    def suited(self, energy: Energy, coefficients: Tensor) -> Kernel:
        """This kernel, or what takes its place by default where it cannot sample `energy`."""
        return self

    def init(self, potential: Potential, x: Tensor, noise: Noise) -> State:
        """The state of chains that stand at `x`."""
        return State(x, *potential(x))

    @abstractmethod
    def step(
        self, potential: Potential, state: State, noise: Noise, dynamics: Dynamics
    ) -> tuple[State, Info]:
        """One transition of every chain."""


def _call(name: str, arguments: dict[str, object]) -> str:
    texts = {k: f"{v:g}" if isinstance(v, float) else str(v) for k, v in arguments.items()}
    return f"{name}({', '.join(f'{k}={v}' for k, v in texts.items())})"


def metropolis(old: State, new: State, log_alpha: Tensor, noise: Noise) -> tuple[State, Info]:
    """Accepts `new` with probability min(1, exp(log_alpha)), chain by chain; NaN is never accepted."""
    probability = log_alpha.clamp(max=0).exp().nan_to_num(nan=0.0)
    accepted = noise.uniform(old.x) < probability
    chosen = [
        None if a is None or b is None else torch.where(expand(accepted, a), b, a)
        for a, b in zip(old, new, strict=True)
    ]
    return State(*chosen), Info(probability)  # type: ignore[arg-type]
