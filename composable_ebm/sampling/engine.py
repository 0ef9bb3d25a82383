"""The one loop over Markov chain steps: training, `sample` and the mixer all run on it.

Nothing in the loop waits for the device: schedules, coefficients, traces and the count of diverged
chains are tensors there, and are read once at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from composable_ebm.energy import Energy
from composable_ebm.sampling.annealed import Annealed
from composable_ebm.sampling.fusion import FusedPotential
from composable_ebm.sampling.kernel import Dynamics, Info, Kernel, Noise, State, expand
from composable_ebm.schedules import Schedule

Sampler = Kernel | Annealed
Callback = Callable[[int, "Chain"], object]

__all__ = ["Callback", "Chain", "ChainDivergedError", "Divergence", "Sampler", "Trace"]


class ChainDivergedError(RuntimeError):
    """Energies or gradients stopped being finite; the chains were frozen where they last were."""


@dataclass(frozen=True)
class Divergence:
    """Which chains diverged, and when.

    Attributes:
        chains: True for a chain that diverged, (batch,).
        step: Step at which each did, -1 for the others, (batch,).
        largest_gradient: Largest finite gradient norm of each chain, in nats per data unit.
    """

    chains: Tensor
    step: Tensor
    largest_gradient: Tensor

    @property
    def any(self) -> bool:
        return bool(self.chains.any())

    def error(self, step_size: float) -> ChainDivergedError:
        """What to raise: when, how many, and what usually helps."""
        count, total = int(self.chains.sum()), self.chains.numel()
        first = int(self.step[self.chains].min())
        return ChainDivergedError(
            f"{count} of {total} chains diverged, the first at step {first}: an energy or gradient was not "
            f"finite. Largest finite gradient norm {float(self.largest_gradient.max()):.3g}, step size "
            f"{step_size:.3g}. Likely causes: a step size too large for this energy or for the sum of its "
            "weights (try a tenth of it, or Langevin(grad_clip=..., clamp=...)), starting states far from "
            "the data, or an expert whose training diverged. To get the frozen chains and a report "
            'instead, pass on_divergence="report".'
        )


@dataclass(frozen=True)
class Trace:
    """What happened at each step, on the device of the chains until asked for.

    Attributes:
        energy: In nats, (steps, batch). For a noise-first kernel, of the state the noise was added to.
        gradient_norm: ‖∂E/∂x‖, (steps, batch).
        acceptance: Probability of acceptance, (steps, batch), or None where every step is taken.
        step_size: (steps,) or (steps, batch), as adapted and scheduled.
    """

    energy: Tensor
    gradient_norm: Tensor
    acceptance: Tensor | None
    step_size: Tensor


class Chain:
    """Running chains of one composition; `advance` is the loop.

    Coefficients, temperature and step size may be changed between calls of `advance` and take
    effect at the next step. `noise` may hold several generators, one for each block of rows, so
    that several requests run in one batch, each with its own draws and its row of coefficients.

    Args:
        energy: A composition.
        x: Starting states, (batch, *event).
        sampler: A kernel, or an annealed one.
        noise: Draws for the batch.
        num_steps: Length of the run, which a schedule is stretched over; not needed without one.
        coefficients: (n,) or (batch, n); those of the expression unless given.
        mask: 1 where states may move, 0 where they are held, broadcasting over (batch, *event).
        num_warmup: Steps at the start in which the step size adapts, if the kernel has a target.
        record: Keeps a trace.
    """

    def __init__(
        self,
        energy: Energy,
        x: Tensor,
        sampler: Sampler,
        noise: Noise,
        *,
        num_steps: int | None = None,
        coefficients: Tensor | None = None,
        mask: Tensor | None = None,
        num_warmup: int = 0,
        record: bool = True,
    ) -> None:
        schedule = sampler.schedule if isinstance(sampler, Annealed) else Schedule()
        if num_steps is None:
            if isinstance(sampler, Annealed):
                raise ValueError(
                    "an annealed chain needs `num_steps`, the length its schedule is stretched to."
                )
            num_steps = 0
        self.kernel = sampler.kernel if isinstance(sampler, Annealed) else sampler
        self.energy = energy
        self.noise = noise if mask is None else _MaskedNoise(noise, mask)
        self.record = record
        coefficients = energy.coefficients if coefficients is None else coefficients
        energy.check_coefficients(coefficients, len(x))
        self.potential = FusedPotential(
            energy,
            coefficients.to(device=x.device, dtype=x.dtype),
            mask,
            stack=x.device.type != "cpu",
        )
        self.dynamics = self.kernel.dynamics(x)
        self.num_steps = 0
        self._tables = {
            name: None if values is None else x.new_tensor(values)
            for name, values in (
                ("temperature", schedule.values(schedule.temperature, num_steps)),
                ("noise_level", schedule.values(schedule.noise_level, num_steps)),
                ("step_scale", schedule.values(schedule.step_scale, num_steps)),
            )
        }
        self._levels = schedule.levels(num_steps)
        self._schedule = schedule
        self._adapt_until = num_warmup
        if isinstance(sampler, Annealed) and self._levels:
            self._adapt_until = max(num_warmup, self._levels.index(self._levels[-1]))
        self._history: list[tuple[Tensor | None, ...]] = []
        self._alive = torch.ones(x.shape[0], dtype=torch.bool, device=x.device)
        self._bad_step = torch.full((x.shape[0],), -1, device=x.device)
        self._largest = x.new_zeros(x.shape[0])
        self._set_noise_level(0)
        with evaluating(energy):
            self.state = self.kernel.init(self.potential, x.detach(), self.noise)
        self._freeze(self.state, self._norm(self.state))

    @property
    def x(self) -> Tensor:
        """The current states, (batch, *event)."""
        return self.state.x

    @property
    def coefficients(self) -> Tensor:
        """Coefficients of the composition, (n,) or (batch, n); assign to steer the running chains."""
        return self.potential.coefficients

    @coefficients.setter
    def coefficients(self, value: Tensor) -> None:
        self.energy.check_coefficients(value, len(self.x))
        self.potential.coefficients = value.to(self.potential.coefficients)
        self._refresh()

    def advance(self, num_steps: int) -> Tensor:
        """Takes `num_steps` steps with every chain and returns the states, (batch, *event)."""
        with evaluating(self.energy):
            for _ in range(num_steps):
                self._step()
        return self.state.x

    def final_energies(self) -> Tensor:
        """Energies of the current states, (batch,), without a gradient."""
        with evaluating(self.energy):
            return self.potential.energy(self.state.x)

    def trace(self) -> Trace:
        """The trace so far. Reading it waits for the device; asking for it does not."""
        if not self._history:
            empty = self._largest.new_zeros(0, self._largest.shape[0])
            return Trace(empty, empty, None, self._largest.new_zeros(0))
        energy, norm, acceptance, step_size = zip(*self._history, strict=True)
        accepted = None if acceptance[0] is None else torch.stack(acceptance)
        steps = torch.stack(torch.broadcast_tensors(*step_size))  # one size for all chains, or one each
        return Trace(torch.stack(energy), torch.stack(norm), accepted, steps)

    def divergence(self) -> Divergence:
        """Which chains have diverged so far."""
        return Divergence(~self._alive, self._bad_step, self._largest)

    def _step(self) -> None:
        index = self.num_steps
        dynamics = self._dynamics(index)
        state, info = self.kernel.step(self.potential, self.state, self.noise, dynamics)
        norm = self._norm(state)
        self._freeze(state, norm)
        if self.record:
            self._history.append((self.state.energy, norm, info.acceptance, dynamics.step_size))
        if self.kernel.target_acceptance is not None and index < self._adapt_until:
            self._adapt(info, index)
        self.num_steps = index + 1
        if self._tables["noise_level"] is not None:
            self._change_noise_level(index)

    def _change_noise_level(self, index: int) -> None:
        """After the last step at a level: on to the next one, and from the last to no noise at all."""
        last = index + 1 == len(self._levels)
        if index >= len(self._levels) or (not last and self._level(index + 1) == self._level(index)):
            return
        if last and not self._schedule.predict:
            return
        x = None
        if self._schedule.predict:
            sigma = self._at("noise_level", index)
            after = None if last else self._at("noise_level", index + 1)
            assert sigma is not None
            after = torch.zeros_like(sigma) if after is None else after
            x = self.state.x - sigma * (sigma - after) * self.state.gradient
            if last and self.energy.data_range is not None:
                x = x.clamp(*self.energy.data_range)
        self._set_noise_level(index + 1)
        self._refresh(x)

    def _level(self, index: int) -> int:
        return self._levels[min(index, len(self._levels) - 1)] if self._levels else 0

    def _at(self, name: str, index: int) -> Tensor | None:
        table = self._tables[name]
        return None if table is None or not len(table) else table[min(index, len(table) - 1)]

    def _set_noise_level(self, index: int) -> None:
        self.potential.noise_level = self._at("noise_level", index)

    def _refresh(self, x: Tensor | None = None) -> None:
        """Energies and gradients under a target that has moved, at `x` or at the current states."""
        state = self.state if x is None else self.state._replace(x=x)
        if self.kernel.energy_is_current:
            with evaluating(self.energy):
                energy, gradient = self.potential(state.x)
            state = state._replace(energy=energy, gradient=gradient)
        self._freeze(state, self._norm(state))

    def _dynamics(self, index: int) -> Dynamics:
        step_size, temperature, noise_scale = self.dynamics
        if (scale := self._at("step_scale", index)) is not None:
            step_size = step_size * scale
            noise_scale = None if noise_scale is None else noise_scale * scale
        sigma = self._at("noise_level", index)
        if sigma is not None and self._schedule.noise_power:
            step_size = step_size * sigma**self._schedule.noise_power
        if (factor := self._at("temperature", index)) is not None:
            temperature = temperature * factor
        return Dynamics(step_size, temperature, noise_scale)

    @staticmethod
    def _norm(state: State) -> Tensor:
        return state.gradient.flatten(1).norm(dim=1)

    def _freeze(self, new: State, norm: Tensor) -> None:
        """Takes `new` for the chains that are finite; the others stay where they were, for good."""
        finite = new.energy.isfinite() & norm.isfinite()
        self._bad_step = torch.where(self._alive & ~finite, self.num_steps, self._bad_step)
        self._alive = self._alive & finite
        self._largest = torch.maximum(self._largest, torch.where(finite, norm, 0.0))
        self.state = State(
            *(
                None
                if after is None or before is None
                else torch.where(expand(self._alive, after), after, before)
                for before, after in zip(self.state, new, strict=True)
            )  # type: ignore[arg-type]
        )

    def _adapt(self, info: Info, index: int) -> None:
        """Robbins-Monro on log η towards the target acceptance, the same for all chains."""
        assert info.acceptance is not None
        assert self.kernel.target_acceptance is not None
        gain = max(0.05, (index + 1) ** -0.5)
        error = (info.acceptance * self._alive).sum() / self._alive.sum() - self.kernel.target_acceptance
        self.dynamics = self.dynamics._replace(step_size=self.dynamics.step_size * torch.exp(gain * error))


class _MaskedNoise(Noise):
    """Noise that is zero where states are held."""

    def __init__(self, noise: Noise, mask: Tensor) -> None:
        super().__init__(*noise.sources)
        self.mask = mask

    def normal(self, like: Tensor) -> Tensor:
        return super().normal(like) * self.mask


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; every submodule's own mode afterwards."""
    training = [m for m in module.modules() if m.training]
    for m in training:
        m.training = False
    try:
        yield
    finally:
        for m in training:
            m.training = True
