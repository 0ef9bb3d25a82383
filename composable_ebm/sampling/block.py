"""A block: the rows of a batch that belong to one run, and how far they are in its schedule.

A batch holds the chains of one run or of several. What differs between runs (the composition, the
noise, the schedule and the place in it, the step size as adapted) belongs to a block; what all
chains have alike (state, energy, gradient, whether they are still finite) is one `Rows`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, Self

import torch
from torch import Tensor

from composable_ebm.energy import Energy, flat
from composable_ebm.potential.potential import Tally
from composable_ebm.sampling.annealed import Annealed
from composable_ebm.sampling.kernel import Dynamics, Info, Kernel, Noise, State, expand
from composable_ebm.sampling.particles import Particles, Population, carried
from composable_ebm.sampling.schedule import Schedule

Sampler = Kernel | Annealed
Held = Literal["clean", "noisy"]

WIDE = 0.05
"""Steps have lengths of their own along axes whose variance is this much of the first level's σ², or more."""
LONGEST = 1.5
"""The longest of them, in σ²."""
DOWN_TO = 0.4
"""Down to this much of the first level. Below it energies are less exact than the flow that leads there."""

PROJECTIONS = 8
"""Directions along which the states of a run are recorded."""

__all__ = [
    "Block",
    "Held",
    "Hold",
    "MaskedNoise",
    "Rows",
    "Sampler",
    "joined",
    "projected",
    "started",
    "together",
]


class Rows(NamedTuple):
    """Chains, one a row.

    Attributes:
        state: States, energies and gradients.
        alive: Whether each is still finite, (batch,).
        bad_step: Step at which each stopped being so, in the count of the batch, -1 for the others.
        largest: Largest finite gradient norm of each, (batch,).
    """

    state: State
    alive: Tensor
    bad_step: Tensor
    largest: Tensor

    @classmethod
    def new(cls, state: State, step: int) -> Self:
        """Chains that stand at `state`; those that are not finite are frozen from the start."""
        count, x = len(state.x), state.x
        alive = torch.ones(count, dtype=torch.bool, device=x.device)
        rows = cls(state, alive, torch.full((count,), -1, device=x.device), x.new_zeros(count))
        return rows.moved(state, step)

    @property
    def gradient_norm(self) -> Tensor:
        """‖∂E/∂x‖ in nats per data unit, (batch,)."""
        return _norm(self.state)

    def moved(self, new: State, step: int | Tensor, norm: Tensor | None = None) -> Self:
        """`new` for the chains that are finite; the others stay where they were, for good."""
        norm = _norm(new) if norm is None else norm
        # A CPU can look without waiting: nearly always there is nothing to hold back, and nothing to copy.
        alike = (self.state.momentum is None) == (new.momentum is None)
        looks = norm.device.type == "cpu" and alike and bool(self.alive.all())
        if looks and math.isfinite(float((new.energy + norm).sum())):
            return type(self)(new, self.alive, self.bad_step, torch.maximum(self.largest, norm))
        finite = new.energy.isfinite() & norm.isfinite()
        bad_step = torch.where(self.alive & ~finite, step, self.bad_step)
        alive = self.alive & finite
        largest = torch.maximum(self.largest, torch.where(finite, norm, 0.0))
        state = State(
            *(
                None if after is None or before is None else torch.where(expand(alive, after), after, before)
                for before, after in zip(self.state, new, strict=True)
            )  # type: ignore[arg-type]
        )
        return type(self)(state, alive, bad_step, largest)

    def counted(self, shift: int) -> Self:
        """The same chains in a batch whose count of steps is ahead by `shift`."""
        bad_step = torch.where(self.bad_step < 0, self.bad_step, self.bad_step + shift)
        return self._replace(bad_step=bad_step) if shift else self

    def split(self, sizes: Sequence[int]) -> list[Self]:
        """The rows of each block."""
        if len(sizes) == 1:
            return [self]
        states = [_split(column, sizes) for column in self.state]
        others = [_split(column, sizes) for column in self[1:]]
        return [
            type(self)(State(*state), *other)
            for state, other in zip(zip(*states, strict=True), zip(*others, strict=True), strict=True)
        ]

    def picked(self, index: Tensor) -> Self:
        """The rows `index`, (any number,), one may come several times."""
        state = State(*(None if column is None else column[index] for column in self.state))  # type: ignore
        return type(self)(state, *(column[index] for column in self[1:]))

    @classmethod
    def cat(cls, parts: Sequence[Self]) -> Self:
        """The rows of several blocks, one after another."""
        if len(parts) == 1:
            return parts[0]
        states = zip(*(part.state for part in parts), strict=True)
        state = State(*(None if column[0] is None else torch.cat(column) for column in states))  # type: ignore
        return cls(state, *(torch.cat(column) for column in zip(*(p[1:] for p in parts), strict=True)))


def _split(column: Tensor | None, sizes: Sequence[int]) -> Sequence[Tensor | None]:
    return [None] * len(sizes) if column is None else column.split(list(sizes))


def _norm(state: State) -> Tensor:
    return torch.linalg.vector_norm(flat(state.gradient), dim=1)


def joined(values: Sequence[Tensor | None], sizes: Sequence[int]) -> Tensor | None:
    """Values of several blocks, () or (rows,) each, as one value a row; that of one block as it is."""
    if len(values) == 1 or values[0] is None:
        return values[0]
    return torch.cat([v.expand(size) for v, size in zip(values, sizes, strict=True) if v is not None])


class MaskedNoise(Noise):
    """Noise that is zero where states are held."""

    def __init__(self, noise: Noise, mask: Tensor) -> None:
        super().__init__(*noise.sources)
        self.mask = mask

    def normal(self, like: Tensor) -> Tensor:
        return super().normal(like) * self.mask


class Hold(NamedTuple):
    """A part of states that is held, with the noise of the level that the rest is at.

        x = m x + (1 - m) (x₀ + σ ε),     ε the same at every level

    So an energy that knows noise levels always sees states that look like its data at that level.

    Attributes:
        mask: m, True where states may move, broadcasting over them.
        states: x₀, (rows, *event).
        noise: ε, (rows, *event).
    Reference:
        Song et al. (2021), arXiv 2011.13456, appendix I.2.
    """

    mask: Tensor
    states: Tensor
    noise: Tensor

    def put(self, x: Tensor, noise_level: Tensor | None) -> Tensor:
        """`x` with the held part in place, at σ () or at no noise at all."""
        held = self.states if noise_level is None else self.states + expand(noise_level, x) * self.noise
        return torch.where(self.mask, x, held)


class Block:
    """One run's part in a batch.

    Args:
        energy: Its composition.
        x: States like those it starts from, (rows, *event).
        sampler: A kernel, or an annealed one.
        noise: Draws for these rows.
        num_steps: Length that a schedule is stretched over; not needed without one.
        ends: Whether the run ends with its schedule. One that does not stays at the last values,
            and never makes the last predictor step, to no noise at all.
        mask: 1 where states may move, 0 where they are held, broadcasting over (rows, *event).
        held: "clean": what is held stays as it is; "noisy": it is clean, and carries the noise of the
            level while there is any.
        num_warmup: Steps at the start in which the step size adapts, if the kernel has a target.
        record: Keeps a trace.
    Attributes:
        sampler: What it follows.
        hold: What is held with noise, if anything is.
        dynamics: Step size, temperature and noise scale, before the schedule's factors.
        num_steps: Steps taken.
        carrier: The density that its rows are particles of, if they are weighed.
        met: Which of its rows met the composition at the last look, (rows,), where there are looks.
        population: Their weights, once they have any.
        tally: Gradients taken of its rows.
        replayed: Steps that were replayed, see `graphs`.
        plain_because: Why the last step that was not replayed was not.
    """

    def __init__(
        self,
        energy: Energy,
        x: Tensor,
        sampler: Sampler,
        noise: Noise,
        *,
        num_steps: int | None = None,
        ends: bool = True,
        mask: Tensor | None = None,
        held: Held = "clean",
        num_warmup: int = 0,
        record: bool = True,
    ) -> None:
        self.energy = energy
        self.size = len(x)
        self.noise = noise if mask is None else MaskedNoise(noise, mask)
        self.mask = mask
        self.hold: Hold | None = None
        if mask is not None and held == "noisy":
            self.hold = Hold(mask.bool(), x.detach().clone(), noise.normal(x))
        self.record = record
        self.history: list[tuple[Tensor | None, ...]] = []
        self.num_steps = 0
        self.tally = Tally()
        self.replayed = 0
        self.plain_because = ""
        self.population: Population | None = None
        self.met: Tensor | None = None
        self.follow(sampler, x, num_steps, ends, num_warmup)

    def follow(
        self,
        sampler: Sampler,
        like: Tensor,
        num_steps: int | None,
        ends: bool = True,
        num_warmup: int = 0,
    ) -> None:
        """Goes on with `sampler`, from the beginning of its schedule."""
        annealed = isinstance(sampler, Annealed)
        if num_steps is None and annealed:
            raise ValueError("an annealed chain needs `num_steps`, the length its schedule is stretched to.")
        count = num_steps or 0
        self.sampler = sampler
        self.kernel = sampler.kernel if isinstance(sampler, Annealed) else sampler
        self.schedule = schedule = sampler.schedule if isinstance(sampler, Annealed) else Schedule()
        self.kernel.check(self.energy)
        self.carrier = carried(sampler, self.energy)
        self.population = None
        if self.energy.binary and schedule.noise_level is not None:
            raise ValueError(f"{self.energy} lives on bits, which carry no noise level: anneal temperature.")
        self.ends = ends
        self.place = 0
        self.levels = schedule.levels(count) if annealed else []
        self.sigmas = schedule.values(schedule.noise_level, count) or []
        self._sigma = like.new_tensor(self.sigmas) if self.sigmas else None
        self._temperature = _table(like, schedule.values(schedule.temperature, count))
        self._scale = _table(like, schedule.values(schedule.step_scale, count))
        self._step_scale = self._scale
        if self._sigma is not None and schedule.noise_power:
            power = self._sigma**schedule.noise_power
            self._step_scale = power if self._scale is None else self._scale * power
        self._moves = self._step_scale is not None or self._temperature is not None
        self.tune(self.kernel, like)
        self.adapt_until = num_warmup
        if annealed and self.levels:
            self.adapt_until = max(num_warmup, self.levels.index(self.levels[-1]))

    def tune(self, kernel: Kernel, like: Tensor) -> None:
        """Steps by `kernel`, with its own step size, and along the axes of the composition as it now is.

        Where a part is held, or chains never end, all directions have the same step.
        """
        self.kernel = kernel
        self.dynamics = kernel.dynamics(like)
        self._variances: Tensor | None = None
        whole = self.ends and self.mask is None
        if not (whole and kernel.along_axes and self.sigmas):
            return
        found = self.energy.principal_axes(math.prod(like.shape[1:]))
        if found is None:
            return
        wide = (found.variances > WIDE * self.sigmas[0] ** 2).nonzero()
        if len(wide):
            # From the first of them on, so that runs of one base share one tensor, and a batch.
            start = int(wide[0])
            self._variances = found.variances[start:].to(like)
            self.dynamics = self.dynamics._replace(axes=found.directions[start:].to(like))

    # -- the place in the schedule ------------------------------------------------------------------

    @property
    def stepping(self) -> str:
        """How its steps ran, in a line; nothing where none could have been captured."""
        if not (self.replayed or self.plain_because):
            return ""
        reason = f"; the others one by one: {self.plain_because}" if self.plain_because else ""
        return f"{self.replayed} of {self.num_steps} steps replayed from a captured graph{reason}"

    @property
    def noise_level(self) -> Tensor | None:
        """σ now, (), or None without a curve for it."""
        return self._at(self._sigma)

    @property
    def sigma(self) -> float | None:
        """The same as a number."""
        return self.sigmas[min(self.place, len(self.sigmas) - 1)] if self.sigmas else None

    @property
    def carried(self) -> Tensor | None:
        """The noise that the states carry now, (); None without any."""
        return None if self._is_clean() else self.noise_level

    def placed(self, x: Tensor) -> Tensor:
        """States with the held part as it is at the noise that they carry now."""
        return x if self.hold is None else self.hold.put(x, self.carried)

    def scheduled(self) -> Dynamics:
        """The numbers of the next step."""
        if not self._moves:
            return self._along_axes(self.dynamics)
        step_size, temperature, noise_scale, *_ = self.dynamics
        if (scale := self._at(self._step_scale)) is not None:
            step_size = step_size * scale
        if noise_scale is not None and (scale := self._at(self._scale)) is not None:
            noise_scale = noise_scale * scale
        if (factor := self._at(self._temperature)) is not None:
            temperature = temperature * factor
        return self._along_axes(
            self.dynamics._replace(step_size=step_size, temperature=temperature, noise_scale=noise_scale)
        )

    def _along_axes(self, dynamics: Dynamics) -> Dynamics:
        """With steps of their own along the axes: η(λ + σ²)/σ² where data have variance λ, up to `LONGEST`.

        That is the step in which the Gaussian around noisy data is as wide along these axes as along all
        others. Data that are no Gaussian have a precision of 1/σ² at most, and steps of 2σ² are stable.
        """
        sigma = self.sigma
        if self._variances is None or sigma is None or sigma < DOWN_TO * self.sigmas[0]:
            return dynamics
        step_size = dynamics.step_size[..., None]
        longest = torch.clamp(step_size, min=LONGEST * sigma**2)
        return dynamics._replace(steps=torch.minimum(step_size * (1 + self._variances / sigma**2), longest))

    def _at(self, table: Tensor | None) -> Tensor | None:
        return None if table is None else table[min(self.place, len(table) - 1)]

    def stepped(self) -> bool:
        """Counts a step; whether it was the last one at a noise level that chains now leave."""
        self.num_steps += 1
        self.place += 1
        if self._sigma is None or self.place > len(self.levels):
            return False
        if self._is_past_the_end():
            return self._is_clean()
        return self.levels[self.place] != self.levels[self.place - 1]

    @property
    def starts_in_noise(self) -> bool:
        """Whether it has not taken a step yet, and begins at the first noise level."""
        return self.num_steps == 0

    def snapshot(self) -> tuple:
        """What `restore` goes back to; tensors are never written in place."""
        return (
            self.num_steps,
            self.place,
            self.dynamics,
            len(self.history),
            self.tally.gradients,
            self.population,
        )

    def restore(self, snapshot: tuple) -> None:
        """Goes back to a `snapshot`."""
        self.num_steps, self.place, self.dynamics, length, gradients, self.population = snapshot
        self.tally.gradients = gradients
        del self.history[length:]

    @property
    def left_level(self) -> Tensor | None:
        """σ of the level that chains now leave, (), or None without a curve for it."""
        return None if self._sigma is None else self._sigma[self.place - 1]

    @property
    def weighs(self) -> bool:
        """Whether its chains carry weights."""
        return isinstance(self.sampler, Particles)

    @property
    def is_carried(self) -> bool:
        """Whether its chains are particles, on their way from one noise level to the next."""
        return self.population is not None and not self._is_past_the_end()

    def weighed(self, gain: Tensor, u: Tensor) -> Tensor:
        """Weighs its particles, and which of them now stands in each place, (rows,).

        Args:
            gain: log of what their weights are multiplied with, (rows,).
            u: Uniform on [0, 1), ().
        """
        assert self.population is not None
        assert isinstance(self.sampler, Particles)
        self.population, index = self.population.weighed(gain).resampled(u, self.sampler.threshold)
        return index

    def predicted(self, x: Tensor, gradient: Tensor) -> Tensor:
        """Where chains that leave a noise level start at the next one: moved there, or as they are.

        After the last level that is 0, no noise at all. What is held moves with the level.

        Args:
            x: Where they are, (rows, *event).
            gradient: ∂E/∂x there, of the density whose flow they follow.
        """
        return self.placed(self._moved(x, gradient))

    def _moved(self, x: Tensor, gradient: Tensor) -> Tensor:
        sigma = self.left_level
        if not self.schedule.predict or sigma is None or self._sigma is None:
            return x
        last = self._is_past_the_end()
        after = torch.zeros_like(sigma) if last else self._sigma[self.place]
        x = x - sigma * (sigma - after) * gradient
        return x.clamp(*self.energy.data_range) if last and self.energy.data_range is not None else x

    def _is_past_the_end(self) -> bool:
        return self.place == len(self.levels)

    def _is_clean(self) -> bool:
        """Whether the predictor has taken the last of the noise away."""
        return self.schedule.predict and self.ends and self.place >= len(self.levels)

    # -- what happened ------------------------------------------------------------------------------

    def note(self, rows: Rows, norm: Tensor, info: Info, step_size: Tensor) -> None:
        """Records a step, and adapts the step size while that lasts."""
        if self.record:
            seen = projected(rows.state.x)
            self.history.append((rows.state.energy, norm, info.acceptance, step_size, seen))
        if self.adapts:
            self._adapt(info, rows.alive)

    @property
    def adapts(self) -> bool:
        """Whether the step size still changes."""
        return self.kernel.target_acceptance is not None and self.place < self.adapt_until

    def _adapt(self, info: Info, alive: Tensor) -> None:
        """Robbins-Monro on log η towards the target acceptance, the same for all chains of the block."""
        assert info.acceptance is not None
        assert self.kernel.target_acceptance is not None
        gain = max(0.05, (self.place + 1) ** -0.5)
        mean = torch.where(alive, info.acceptance, 0.0).sum() / alive.sum().clamp(min=1)
        # With no chain left there is nothing to learn from, and steering may bring them back.
        error = torch.where(alive.any(), mean - self.kernel.target_acceptance, 0.0)
        self.dynamics = self.dynamics._replace(step_size=self.dynamics.step_size * torch.exp(gain * error))


def together(each: Sequence[Dynamics], sizes: Sequence[int]) -> Dynamics:
    """The numbers of several blocks, one a row; those of one block as they are. Axes are the same for all."""
    if len(each) == 1:
        return each[0]
    first, along = each[0], None
    if any(own.steps is not None for own in each):
        assert first.axes is not None
        count = len(first.axes)
        steps = [own.step_size[..., None] if own.steps is None else own.steps for own in each]
        along = torch.cat([v.expand(size, count) for v, size in zip(steps, sizes, strict=True)])
    step_size, temperature, noise_scale = (
        joined(column, sizes) for column in zip(*(own[:3] for own in each), strict=True)
    )
    assert step_size is not None
    assert temperature is not None
    return Dynamics(step_size, temperature, noise_scale, first.axes, along)


def started(energy: Energy, noise: Tensor, level: float) -> Tensor:
    """States at the noise level σ from draws of a standard normal: as the density is, or noise alone."""
    known = energy.prior(noise, level)
    return level * noise if known is None else known.to(noise)


def projected(x: Tensor) -> Tensor:
    """States along a few random directions, the same for all runs, (rows, directions).

    Chains in different modes differ along nearly every direction, where their energies may agree. Of few
    coordinates each is a direction of its own.
    """
    states = flat(x)
    if states.shape[1] <= PROJECTIONS:
        return states
    return states @ _directions(states.shape[1], states.dtype, states.device)


@functools.lru_cache(maxsize=32)
def _directions(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(size, PROJECTIONS, generator=generator) / size**0.5
    return drawn.to(device=device, dtype=dtype)


def _table(like: Tensor, values: list[float] | None) -> Tensor | None:
    return like.new_tensor(values) if values else None
