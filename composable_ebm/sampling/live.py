"""Chains without an end that land where a changing composition wants them, and never break.

Each chain has a place of its own in the schedule. It comes down from the first noise level and rests at the
last one, where it goes on moving. Every so often there is a look at the chains that rest:

    chains that meet the composition by the experts' verdict   stay as they are
    chains that do not, as after a change of the composition   get as much noise as lets them change, and
                                                               come down again
    chains that have left where data can be, or diverged       begin again at a neighbour that is well, under
                                                               noise, and come down again

The noise that lets a chain change is the least at which the experts give what is asked for a fair
chance, p(request | x + σξ, σ) ≥ `chance`: a smile takes less of it than another haircut.

Chains are not weighed against each other as particles are: one that misses tries again, which lands as many
(of sixteen 32 px faces 98 % after two seconds of one core, against 96) and leaves every chain its own.
Resampled, eight to twelve of sixteen faces had a twin, without two to six.

Reference:
    Meng et al. (2022), SDEdit, arXiv 2108.01073, for noise that keeps what a change need not touch; Xu et
    al. (2023), Restart sampling, arXiv 2306.14878, for going up and down between levels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from composable_ebm.energy import Energy, NotCarriedError, Sum, carrier, satisfied
from composable_ebm.potential.plan import Plan
from composable_ebm.sampling.annealed import Annealed
from composable_ebm.sampling.block import Block, Held, Rows, Sampler, started
from composable_ebm.sampling.kernel import Dynamics, Noise, expand

__all__ = ["Live", "LiveBlock"]


@dataclass(frozen=True)
class Live:
    """How endless chains are tended.

    Args:
        level: Noise level at which chains rest, in data units; the last of the schedule unless given. More
            makes them move more visibly.
        look_every: Steps between two looks.
        chance: Least probability of the request from which a chain can change.
        steps_per_level: Steps at each level on the way down.
        stride: Levels of the schedule that each move goes down by.
    Raises:
        ValueError: If a number makes no sense.
    """

    level: float | None = None
    look_every: int = 10
    chance: float = 0.3
    steps_per_level: int = 2
    stride: int = 2

    def __post_init__(self) -> None:
        if self.level is not None and not self.level > 0:
            raise ValueError(f"`level` must be positive, got {self.level}.")
        if not 0 < self.chance < 1:
            raise ValueError(f"`chance` must be between 0 and 1, got {self.chance}.")
        for name in ("look_every", "steps_per_level", "stride"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")


class Look(NamedTuple):
    """What was seen of the chains.

    Attributes:
        met: Whether each meets the composition, (rows,); None where no verdict can be given.
        lost: Whether each has left where data can be, (rows,).
    """

    met: Tensor | None
    lost: Tensor


class LiveBlock(Block):
    """A block whose rows have places of their own in its schedule.

    Args:
        energy: Its composition.
        x: States that it starts from, (rows, *event).
        sampler: Annealed over noise levels, with a predictor.
        noise: Draws for these rows.
        live: How the rows are tended.
        num_steps: Length that the schedule is stretched over.
        at_rest: Whether the rows start where they rest, as those of a given picture do, rather than in noise.
        mask: 1 where states may move, 0 where they are held.
        held: See `Block`.
    Raises:
        ValueError: If the sampler does not move the noise level by predictor steps.
    """

    def __init__(
        self,
        energy: Energy,
        x: Tensor,
        sampler: Sampler,
        noise: Noise,
        live: Live,
        num_steps: int,
        *,
        at_rest: bool = False,
        mask: Tensor | None = None,
        held: Held = "clean",
    ) -> None:
        if not isinstance(sampler, Annealed) or sampler.schedule.noise_level is None:
            raise ValueError(
                f"live chains rise and fall between noise levels, and {energy} is sampled by {sampler}: give "
                "a sampler annealed over a `noise_level`, or leave out `live`."
            )
        self.live = live
        plain = Annealed(sampler.kernel, sampler.schedule)
        super().__init__(
            energy,
            x,
            plain,
            noise,
            num_steps=num_steps,
            ends=False,
            mask=mask,
            held=held,
            record=False,
        )
        self._table = _levels(self.sigmas, live, x)
        self._last = len(self._table) - 1
        self.places = torch.full((self.size,), self._last if at_rest else 0, device=x.device)
        self._left = self.places
        self._tries = torch.zeros_like(self.places)
        self._at_rest = at_rest
        self._moving = not at_rest
        self._together = True
        self._look_at = 0
        self.met: Tensor | None = None
        self.turn(energy)

    def turn(self, energy: Energy, sampler: Sampler | None = None) -> None:
        """Goes on towards another composition; there is a look before the next step.

        Args:
            energy: On the same states.
            sampler: Whose kernel takes the place of the one so far.
        """
        self.energy = energy
        if sampler is not None:
            self.kernel = sampler.kernel if isinstance(sampler, Annealed) else sampler
            self.kernel.check(energy)
            self.dynamics = self.kernel.dynamics(self._table)
        try:
            self.carrier = carrier(energy)
        except NotCarriedError:
            self.carrier = None
        marginals = [m for leaf in energy.leaves() if (m := leaf.marginal()) is not None]
        self._plan = Plan(Sum([energy, *marginals]))
        self._coefficients = energy.coefficients.to(self._table)
        self._tries = torch.zeros_like(self._tries)
        self._look_at = self.num_steps

    # -- the places in the schedule -----------------------------------------------------------------

    @property
    def noise_level(self) -> Tensor:
        """σ of each row, (rows,), or () where all are at one."""
        return self._table[self.places[0] if self._together else self.places]

    @property
    def sigma(self) -> float:
        """Where rows rest."""
        return float(self._table[-1])

    @property
    def carried(self) -> Tensor:
        return self.noise_level

    @property
    def left_level(self) -> Tensor:
        return self._table[self._left]

    @property
    def moving(self) -> Tensor:
        """Which rows are under way, (rows,)."""
        return self.places < self._last

    def scheduled(self) -> Dynamics:
        power = self.schedule.noise_power
        scale = self.noise_level**power if power else torch.ones_like(self.noise_level)
        return self.dynamics._replace(step_size=self.dynamics.step_size * scale)

    @property
    def starts_in_noise(self) -> bool:
        return self.num_steps == 0 and not self._at_rest

    def snapshot(self) -> tuple:
        own = self.places, self._left, self._tries, self._moving, self._together, self._look_at, self.met
        return super().snapshot(), own

    def restore(self, snapshot: tuple) -> None:
        shared, own = snapshot
        super().restore(shared)
        self.places, self._left, self._tries, self._moving, self._together, self._look_at, self.met = own

    def stepped(self) -> bool:
        self.num_steps += 1
        self.place += 1
        if not self._moving or self.num_steps % self.live.steps_per_level:
            return False
        self._left = self.places
        self.places = (self.places + self.live.stride).clamp(max=self._last)
        return True

    def predicted(self, x: Tensor, gradient: Tensor) -> Tensor:
        sigma, after = self.left_level, self._table[self.places]
        moved = x - expand(sigma * (sigma - after), x) * gradient
        return self.placed(torch.where(expand(sigma > after, x), moved, x))

    def placed(self, x: Tensor) -> Tensor:
        return x if self.hold is None else self.hold.put(x, expand(self.noise_level, x))

    # -- looks ---------------------------------------------------------------------------------------

    @property
    def look_is_due(self) -> bool:
        """Whether it is time to look at the rows."""
        return self.num_steps >= self._look_at

    def tend(self, rows: Rows) -> Tensor | None:
        """Looks at the rows, and sends those on their way that are not well.

        Args:
            rows: Its rows.
        Returns:
            Where they stand now, (rows, *event), or None where nothing changed.
        """
        self._look_at = self.num_steps + self.live.look_every
        x = rows.state.x
        with torch.no_grad():
            seen = self._seen(x)
            self.met = seen.met
            rest = ~self.moving
            lost = rest & (seen.lost | ~rows.alive)
            failing = torch.zeros_like(rest) if seen.met is None else rest & ~seen.met & ~lost
            well = rest & ~lost & ~failing
            self._tries = torch.where(well, 0, self._tries + failing)
            changed = bool((lost | failing).any())
            if changed:
                x = self._risen(x, lost, failing, well)
        self._moving = bool(self.moving.any())
        self._together = bool((self.places == self.places[0]).all())
        return self.placed(x) if changed else None

    def _seen(self, x: Tensor) -> Look:
        level = self.noise_level
        energies = self._plan(x, level)
        met = satisfied(self.energy, energies, self._coefficients)
        lost = ~x.flatten(1).isfinite().all(1)
        if self.energy.data_range is not None:
            low, high = self.energy.data_range
            margin = (high - low) / 2 + 6 * level
            lost |= (x.flatten(1).amax(1) > high + margin) | (x.flatten(1).amin(1) < low - margin)
        if self.carrier is not None:
            unlike = self.carrier.unlike(self._carried_energy(energies))
            lost = lost if unlike is None else lost | unlike
        return Look(met, lost)

    def _carried_energy(self, energies: dict) -> Tensor:
        assert self.carrier is not None
        return self.carrier.combine(energies, self.carrier.coefficients.to(self._table))

    def _risen(self, x: Tensor, lost: Tensor, failing: Tensor, well: Tensor) -> Tensor:
        """The states with noise on those that have to change."""
        places = self.places.clone()
        rest = self._table[-1]
        noise = self.noise.normal(x)
        if bool(failing.any()):
            places[failing] = self._places_to_change(x[failing], self._tries[failing])
        if bool(lost.any()):
            healthy = well.nonzero()[:, 0]
            # Far enough up to become another picture; from pure noise where nobody is well.
            places[lost] = self._last // 2 if len(healthy) else 0
            if len(healthy):
                order = torch.arange(int(lost.sum()), device=x.device) % len(healthy)
                x = x.index_put((lost,), x[healthy[order]])
        extra = (self._table[places].square() - rest.square()).clamp(min=0).sqrt()
        risen = x + expand(extra, x) * noise
        if bool(lost.any()) and not bool(well.any()):
            afresh = started(self.energy, noise, self.sigmas[0])
            risen = torch.where(expand(lost, x), afresh, risen)
        self.places = places
        return torch.where(expand(lost | failing, x), risen, x)

    def _places_to_change(self, x: Tensor, tries: Tensor) -> Tensor:
        """For each of some rows, the place of the least noise from which it has a chance, (n,)."""
        bar = torch.log((self.live.chance + 0.1 * (tries - 1).clamp(min=0)).clamp(max=0.7))
        found = torch.zeros_like(tries)  # the most noise, where nothing less will do
        if self.carrier is None:
            return found
        noise = torch.randn(x.shape, generator=self.noise.sources[0][0], dtype=x.dtype, device=x.device)
        rest = self._table[-1]
        for place in range(0, self._last, max(1, self._last // 12)):
            sigma = self._table[place]
            energies = self._plan(x + (sigma.square() - rest.square()).clamp(min=0).sqrt() * noise, sigma)
            said = self._carried_energy(energies) - self.energy.combine(energies, self._coefficients)
            found = torch.where(said >= bar, place, found)
        return torch.where(tries > MOST_TRIES, 0, found)


MOST_TRIES = 4
"""Failures in a row after which a chain begins again from noise."""


def _levels(sigmas: list[float], live: Live, like: Tensor) -> Tensor:
    """The distinct levels of a schedule, down to where chains rest."""
    distinct = sorted(set(sigmas), reverse=True)
    rest = distinct[-1] if live.level is None else min(live.level, distinct[0])
    kept = [sigma for sigma in distinct if sigma > rest * (1 + 1e-6)]
    if not all(map(math.isfinite, kept)):
        raise ValueError(f"noise levels must be finite, got {kept}.")
    return like.new_tensor([*kept, rest])
