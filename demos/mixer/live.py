"""Chains that run on and on, and follow their recipe when it changes."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch
from torch import Tensor

from composable_ebm import Annealed, Energy, Run
from composable_ebm.energy import Sum
from composable_ebm.pipelines import Pipeline, Prompt
from composable_ebm.sampling.block import Sampler
from composable_ebm.sampling.live import Live as Tending
from composable_ebm.sampling.request import calibrated_sampler, check_positive_term, initial_states
from composable_ebm.sampling.schedule import Curve, Schedule

# Noise levels in data units, for energies that know them. At HOLD details move and things keep their
# place. From STIR down glasses come and go in a dozen steps, while hair and skin mostly stay; from 0.8
# they do not. NUDGE is for the same experts with other weights.
HOLD, NUDGE, STIR = 0.2, 1.0, 2.0
# Where chains rest that the engine has land. At 0.2 and weight 1 a smile comes and goes (11 to 14 of 16 faces
# met a mix of three at a time), at 0.05 all sixteen stay.
REST = 0.05
PROMPTED = 0.4  # of the noise that pipelines start from: with so much of it another prompt shows
START_STEPS, STIR_STEPS = 24, 16

Submit = Callable[..., Run]
"""`Engine.submit`, or what does the same."""

__all__ = ["Live", "Start", "Submit", "check"]


class Start(NamedTuple):
    """What chains start from other than noise.

    Attributes:
        picture: A state, of the event's shape, or one for each chain.
        mask: 1 where it may change and 0 where it is held, broadcasting over states; None where all may.
        level: How much noise is put on the picture, in data units: little keeps it, much forgets it.
            What a mask lets change starts from noise alone.
    """

    picture: Tensor
    mask: Tensor | None = None
    level: float = STIR


class Live:
    """Running chains of a recipe that may change while they run.

    Noise-conditioned energies come down from noise, and then stay at one small noise level. The engine tends
    them: after a change it takes those that do not meet the new recipe as far up as they need, and begins
    those anew that are lost. Chains that start from a picture are not tended, as they would leave it: a new
    recipe takes over their states as they are, stirred a little by noise that is annealed away again. All
    other energies run with the kernel that they were calibrated with, unannealed.

    Args:
        submit: Begins their run.
        energy: What to sample from.
        num_chains: How many chains.
        seed: Seeds their noise.
        start: What they start from; noise unless given.
        kept: States to go on from as they are, (num_chains, *event), as `renewed` gives them.
        num_steps: How many steps they take; no end unless given.
        frames_per_second: Most frames a second.
        steps_per_second: Most steps a second.
    Attributes:
        energy: What they were last told to follow.
        tended: Whether the engine has them land after every change.
        run: Their run.
    Raises:
        ValueError: If the energy cannot be sampled.
    """

    def __init__(
        self,
        submit: Submit,
        energy: Energy,
        num_chains: int,
        seed: int,
        *,
        start: Start | None = None,
        kept: Tensor | None = None,
        num_steps: int | None = None,
        frames_per_second: float | None = None,
        steps_per_second: float | None = None,
    ) -> None:
        self.energy = energy
        self._level = _start_level(energy)
        self.tended = start is None and num_steps is None and _is_tendable(energy)
        pace = {"frames_per_second": frames_per_second, "steps_per_second": steps_per_second}
        if self.tended:
            tending = Tending(level=REST)
            options = {"live": tending, "init": kept, "on_divergence": "report"}
            self.run = submit(energy, num_chains, None, seed, **options, **pace)
            return
        init, mask = kept, None
        if start is not None:
            if self._level is not None and start.mask is None:
                self._level = min(max(start.level, HOLD), self._level)
            init, seed = _begun(energy, num_chains, seed, start, self._level)
            mask = start.mask
        self.run = submit(
            energy,
            num_chains,
            num_steps,
            seed,
            sampler=_sampler(energy, self._level),
            schedule_steps=START_STEPS + 1,
            init=init,
            mask=mask,
            held="clean" if mask is None else "noisy",
            on_divergence="report",
            **pace,
        )

    def fits(self, energy: Energy) -> bool:
        """Whether `energy` can take over these states."""
        same = energy.event_shape == self.energy.event_shape and energy.data_range == self.energy.data_range
        codecs = [None if each.codec is None else each.codec.key for each in (energy, self.energy)]
        return same and codecs[0] == codecs[1] and (not self.tended or _is_tendable(energy))

    def steer(self, energy: Energy) -> None:
        """Goes on from the current states towards another recipe, from the next step on.

        Raises:
            ValueError: If it cannot be sampled; then everything stays as it was.
        """
        if self.tended:
            self.run.steer(energy)
            self.energy = energy
            return
        level = None
        if _start_level(energy) is not None:
            stir = PROMPTED * (_start_level(energy) or 0.0) if _is_prompted(energy) else STIR
            level = max(NUDGE if _parts(self.energy) == _parts(energy) else stir, self._carried())
        self.run.steer(energy, _sampler(energy, level), STIR_STEPS + 1)
        self.energy, self._level = energy, level

    def shaken(self, chain: int | None) -> Tensor | None:
        """Which chains a shake begins anew, (num_chains,): one, or those that miss something; None: all."""
        frame = self.run.frame
        if frame is None or not (self.tended or self._level is None):
            return None
        again = ~frame.alive
        if chain is not None:
            again = torch.arange(len(again), device=again.device) == chain
        elif frame.met is not None:
            again |= ~frame.met
        return again if again.any() and not again.all() else None

    def renewed(self, again: Tensor, submit: Submit, seed: int) -> Tensor | None:
        """States in which some chains have come down from noise anew, and all others are as they were.

        Args:
            again: Which ones, (num_chains,).
            submit: Begins their run.
            seed: Seeds their noise.
        """
        if (frame := self.run.frame) is None:
            return None
        x, count = frame.denoised.clone(), int(again.sum())
        if self.tended:
            sampler, _ = calibrated_sampler(self.energy)
            assert isinstance(sampler, Annealed)
            plain = Annealed(sampler.kernel, sampler.schedule)  # each by itself
            run = submit(self.energy, count, START_STEPS, seed, sampler=plain, on_divergence="report")
            x[again] = run.result().samples.to(x)
        else:
            generator = torch.Generator(x.device).manual_seed(seed)
            x[again] = initial_states(self.energy, count, None, generator, x.device)
        return x

    def _carried(self) -> float:
        """As much noise as the states carry, or more: levels only fall until a new recipe comes."""
        frame = self.run.frame
        carried = 0.0 if frame is None or frame.noise_level is None else float(frame.noise_level)
        follows = frame is not None and frame.composition is self.energy
        return carried if follows else max(carried, self._level or 0.0)


def check(energy: Energy) -> None:
    """Raises ValueError if chains of `energy` cannot be begun."""
    check_positive_term(energy)
    calibrated_sampler(energy)


def _is_tendable(energy: Energy) -> bool:
    """Whether the engine can take chains of an energy up and down between noise levels."""
    sampler, _ = calibrated_sampler(energy)
    return (
        not _is_prompted(energy)
        and isinstance(sampler, Annealed)
        and sampler.schedule.noise_level is not None
        and sampler.schedule.predict
    )


def _is_prompted(energy: Energy) -> bool:
    """Whether it is of prompts, which give no verdict of what is met."""
    return any(isinstance(leaf, (Pipeline, Prompt)) for leaf in energy.leaves())


def _start_level(energy: Energy) -> float | None:
    """The noise that chains of an energy start from, or None where it knows no noise."""
    sampler, _ = calibrated_sampler(energy)
    if not isinstance(sampler, Annealed) or sampler.schedule.noise_level is None:
        return None
    return sampler.schedule.noise_level(0.0)


def _sampler(energy: Energy, level: float | None) -> Sampler:
    """The calibrated kernel, from a noise level down to where it stays."""
    sampler, _ = calibrated_sampler(energy)
    if not isinstance(sampler, Annealed):
        return sampler
    if level is None:
        return sampler.kernel
    curve = Curve(((0, level), (1, HOLD)), "karras")
    own = sampler.schedule
    return Annealed(
        sampler.kernel, Schedule(noise_level=curve, noise_power=own.noise_power, predict=own.predict)
    )


def _begun(
    energy: Energy, num_chains: int, seed: int, start: Start, level: float | None
) -> tuple[Tensor, int]:
    """States that begin at a picture, (num_chains, *event), and a seed for the noise of their steps."""
    device = next(energy.parameters(), torch.empty(0)).device
    generator = torch.Generator(device).manual_seed(seed)
    noise = initial_states(energy, num_chains, None, generator, device)
    if level is not None:
        noise = level * torch.randn(noise.shape, generator=generator, device=device)
    picture = start.picture.to(noise)
    if start.mask is not None:
        x = torch.where(start.mask.to(device) > 0, noise, picture)
    else:
        x = picture.expand_as(noise) if level is None else picture + noise
    return x, int(torch.randint(2**62, (), generator=generator, device=device))


def _parts(energy: Energy) -> list[Hashable]:
    return [term.key for term in Sum([energy]).operands]
