"""Chains that run on and on, and follow their recipe when it changes."""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

import torch
from torch import Tensor

from composable_ebm import Annealed, Chain, Energy
from composable_ebm.energy import Sum
from composable_ebm.sampling.fusion import fuse
from composable_ebm.sampling.kernel import Noise
from composable_ebm.sampling.sample import calibrated_sampler, check_positive_term, initial_states
from composable_ebm.schedules import Curve, Schedule, constant

from .stream import denoised

# Noise levels in data units, for energies that know them. At HOLD details move and things keep their
# place. From STIR down glasses come and go in a dozen steps, while hair and skin mostly stay; from 0.8
# they do not. NUDGE is for the same experts with other weights.
HOLD, NUDGE, STIR = 0.2, 1.0, 2.0
START_STEPS, STIR_STEPS = 24, 16

__all__ = ["Held", "Live", "Start"]


class Start(NamedTuple):
    """What chains start from other than noise.

    Attributes:
        picture: A state, of the event's shape.
        mask: 1 where it may change and 0 where it is held, broadcasting over it; None where all may.
        level: How much noise is put on the picture, in data units: little keeps it, much forgets it.
            What a mask lets change starts from noise alone.
    """

    picture: Tensor
    mask: Tensor | None = None
    level: float = STIR


class Held(Energy):
    """An energy of the free part of states, given the rest: inpainting.

    The held part is the picture with the noise that the level asks for, the same noise at every level,

        x' = m x + (1 - m) (x₀ + σ ε),      E_held(x, σ) = E(x', σ),

    so that the energy always sees states that look like its data at that level.

    Args:
        energy: The energy of whole states.
        picture: x₀, of the event's shape.
        mask: m, broadcasting over it.
        noise: ε, (batch, *event).
    Reference:
        Song et al. (2021), arXiv 2011.13456, appendix I.2, for held parts that carry the level's noise.
    """

    def __init__(self, energy: Energy, picture: Tensor, mask: Tensor, noise: Tensor) -> None:
        super().__init__()
        self.whole = energy
        self.picture, self.mask, self.noise = picture, mask, noise
        self.event_shape, self.data_range = energy.event_shape, energy.data_range
        self.noise_conditioned = energy.noise_conditioned
        self.plan = fuse(energy, stack=picture.device.type != "cpu")

    def states(self, x: Tensor, noise_level: Tensor | None = None) -> Tensor:
        """x', the states with the held part in place."""
        level = 0.0 if noise_level is None else noise_level.reshape(-1, *[1] * self.picture.ndim)
        return self.mask * x + (1 - self.mask) * (self.picture + level * self.noise)

    def energy(self, x: Tensor, noise_level: Tensor | None = None) -> Tensor:
        leaves = self.plan(self.states(x, noise_level), noise_level)
        return self.whole.combine(leaves, self.whole.coefficients.to(x))

    def __str__(self) -> str:
        return str(self.whole)


class Live:
    """Running chains of a recipe that may change while they run.

    Noise-conditioned energies start with a quick anneal from noise, and then stay at one small noise
    level. A new recipe takes over the states as they are, stirred a little by noise that is annealed
    away again, so that the chains can leave what the old recipe held them to. All other energies run
    with the kernel that they were calibrated with, unannealed.

    Args:
        energy: What to sample from.
        num_chains: How many chains.
        seed: Seeds their noise.
        device: Where they run.
        start: What they start from; noise unless given.
    Attributes:
        energy: What they sample from now.
        num_steps: Steps taken since they began.
    Raises:
        ValueError: If the energy cannot be sampled.
    """

    def __init__(
        self,
        energy: Energy,
        num_chains: int,
        seed: int,
        device: torch.device | str = "cpu",
        start: Start | None = None,
    ) -> None:
        device = torch.device(device)
        self._generator = torch.Generator(device).manual_seed(seed)
        self._noise = Noise((self._generator, num_chains))
        self.energy = energy
        self.num_steps = 0
        self._prepare()
        x = initial_states(energy, num_chains, None, self._generator, device)
        self._hold = None
        if start is not None:
            picture = start.picture.to(x)
            if start.mask is not None:
                self._hold = (picture, start.mask.to(x), self._noise.normal(x))
            else:
                x = picture.expand_as(x).clone()
        if self._start_level is None:
            self.chain = self._steady(x)
        elif start is None or start.mask is not None:
            x = self._start_level * self._noise.normal(x)
            self.chain = self._annealing(x, self._start_level, START_STEPS)
        else:
            level = min(max(start.level, HOLD), self._start_level)
            self.chain = self._annealing(x + level * self._noise.normal(x), level, START_STEPS)

    @property
    def picture(self) -> Tensor:
        """What the chains look like, (num_chains, *event)."""
        picture = denoised(self.chain)
        return picture if self._held is None else self._held.states(picture)

    @property
    def states(self) -> Tensor:
        """Where the chains are, with the noise that they carry, (num_chains, *event)."""
        return self.chain.x if self._held is None else self._held.states(self.chain.x, self.noise_level)

    @property
    def _held(self) -> Held | None:
        return self.chain.energy if isinstance(self.chain.energy, Held) else None

    @property
    def noise_level(self) -> Tensor | None:
        """The noise that the states carry on purpose, or None."""
        return self.chain.potential.noise_level

    def fits(self, energy: Energy) -> bool:
        """Whether `energy` can take over these states."""
        return energy.event_shape == self.energy.event_shape and energy.data_range == self.energy.data_range

    def steer(self, energy: Energy) -> None:
        """Goes on from the current states towards another recipe.

        Raises:
            ValueError: If it cannot be sampled; then everything stays as it was.
        """
        before = self.energy
        reweighted = _parts(before) == _parts(energy)
        self.energy = energy
        try:
            self._prepare()
        except ValueError:
            self.energy = before
            self._prepare()
            raise
        level = self.noise_level
        x = self.chain.x.nan_to_num(0.0, 0.0, 0.0)  # chains that had diverged start over
        if self._start_level is None or level is None:
            self.chain = self._steady(x)
            return
        stir = max(NUDGE if reweighted else STIR, float(level))
        x = x + (stir**2 - float(level) ** 2) ** 0.5 * self._noise.normal(x)
        self.chain = self._annealing(x, stir, STIR_STEPS)

    def step(self) -> None:
        """Takes one step with every chain."""
        self.chain.advance(1)
        self.num_steps += 1
        if self._anneal_steps and self.chain.num_steps == self._anneal_steps:
            self.chain = self._steady(self.chain.x)

    def _prepare(self) -> None:
        check_positive_term(self.energy)
        sampler, _ = calibrated_sampler(self.energy)
        annealed = isinstance(sampler, Annealed) and sampler.schedule.noise_level is not None
        self._kernel = sampler.kernel if isinstance(sampler, Annealed) else sampler
        self._schedule = sampler.schedule if annealed else None
        self._start_level = self._schedule.noise_level(0.0) if annealed else None

    def _annealing(self, x: Tensor, level: float, steps: int) -> Chain:
        self._anneal_steps = steps
        return self._chain(x, Curve(((0, level), (1, HOLD)), "karras"), steps + 1)

    def _steady(self, x: Tensor) -> Chain:
        self._anneal_steps = 0
        return self._chain(x, constant(HOLD), 1)

    def _chain(self, x: Tensor, level: Curve, num_steps: int) -> Chain:
        sampler = self._kernel
        if self._schedule is not None:
            predict = self._schedule.predict and num_steps > 1
            schedule = Schedule(noise_level=level, noise_power=self._schedule.noise_power, predict=predict)
            sampler = Annealed(self._kernel, schedule)
        energy = self.energy if self._hold is None else Held(self.energy, *self._hold)
        # The chains have no end: a trace of them would grow for ever.
        return Chain(energy, x, sampler, self._noise, num_steps=num_steps, record=False)


def _parts(energy: Energy) -> list[Hashable]:
    return [term.key for term in Sum([energy]).operands]
