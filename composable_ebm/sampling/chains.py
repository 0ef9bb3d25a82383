"""The one loop over Markov chain steps: training, `sample`, `Engine` and the mixer all run on it.

`Batch` is the loop, over the rows of one run or of several; `Chain` is a batch of one run. Nothing
in the loop waits for the device: schedules, coefficients, traces and the count of diverged chains
are tensors there, and are read once at the end.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from composable_ebm.energy import Energy, changed_states
from composable_ebm.energy.weights import coefficient_type
from composable_ebm.potential.plan import FusedPotential
from composable_ebm.sampling.block import Block, Held, MaskedNoise, Rows, Sampler, joined
from composable_ebm.sampling.graphs import (
    Capturable,
    Move,
    Moved,
    Step,
    StepGraphs,
    Tensors,
    Weights,
    evaluate_rows,
    step_rows,
    weights_of,
)
from composable_ebm.sampling.kernel import Dynamics, Info, Kernel, Noise, State
from composable_ebm.sampling.particles import Population

Callback = Callable[[int, "Chain"], object]

__all__ = ["Batch", "Callback", "Chain", "ChainDivergedError", "Divergence", "Sampler", "Trace"]


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
        projections: States along a few directions, (steps, batch, directions), see `block.projected`.
    """

    energy: Tensor
    gradient_norm: Tensor
    acceptance: Tensor | None
    step_size: Tensor
    projections: Tensor

    def of(self, chains: Tensor) -> Trace:
        """The trace of some chains, given by their indices."""
        return Trace(
            self.energy[:, chains],
            self.gradient_norm[:, chains],
            None if self.acceptance is None else self.acceptance[:, chains],
            self.step_size[:, chains] if self.step_size.ndim > 1 else self.step_size,
            self.projections[:, chains],
        )


class Batch(ABC):
    """Blocks of rows that take their steps together; `advance` is the loop.

    All blocks run one kernel, up to its step size, temperature and noise scale, on states of one
    shape; each has its own composition, noise, schedule and place in it. Blocks join and leave
    between steps. What a block draws and where it goes does not depend on the others.

    Args:
        graphs: Captures steps and replays them; every step runs by itself without.
    Attributes:
        blocks: In the order of their rows.
        rows: The chains of all blocks; only there while there is a block.
        clock: Steps that the batch has taken.
    """

    def __init__(self, graphs: StepGraphs | None = None) -> None:
        self.blocks: list[Block] = []
        self.rows: Rows
        self.clock = 0
        self.graphs = graphs
        self._weights = Weights((), "")
        self._modules: list[nn.Module] = []

    @abstractmethod
    def potential_of(self, blocks: Sequence[Block]) -> Capturable:
        """Energies and gradients of the rows of `blocks`, at their noise levels of the moment."""

    @abstractmethod
    def carrier_of(self, block: Block) -> FusedPotential:
        """Energies and gradients of the density that carries the particles of a block."""

    @property
    def state(self) -> State:
        """States of all rows, their energies, gradients, and momenta where there are any."""
        return self.rows.state

    @property
    def sizes(self) -> list[int]:
        """Rows of each block."""
        return [block.size for block in self.blocks]

    def __len__(self) -> int:
        return sum(self.sizes)

    def begin(self, block: Block, x: Tensor) -> Rows:
        """The rows of a block whose chains stand at `x`, (rows, *event), before any step."""
        with evaluating(block.energy.modules()):
            x = block.placed(x.detach())
            if block.carrier is not None and block.starts_in_noise:
                x = self._drawn_from_the_carrier(block, x)
            before = x.clone()
            state = block.kernel.init(self.potential_of([block]), x, block.noise)
            if not torch.equal(x, before) and bool((x == x).all()):
                raise ValueError(_who_changes(block.energy, before, block.noise_level))
            if block.weighs:
                # Chains that come from elsewhere stand for the composition at this level as they are.
                fresh = block.starts_in_noise
                log_weights = self._said(block, state, block.noise_level) if fresh else x.new_zeros(len(x))
                block.population = Population.of(log_weights)
        return Rows.new(state, self.clock)

    def _drawn_from_the_carrier(self, block: Block, x: Tensor) -> Tensor:
        """Draws of the carrier at the first noise level, from noise of that level.

        Much noise leaves only the mean of the data: x - σ² ∂E_c/∂x, with new noise on it.
        """
        sigma = block.noise_level
        assert sigma is not None
        potential = self.carrier_of(block)
        potential.noise_level = sigma
        _, gradient = potential(x)
        return block.placed(x - sigma.square() * gradient + sigma * block.noise.normal(x))

    def _said(self, block: Block, state: State, noise_level: Tensor | None) -> Tensor:
        """G, what is said of the states of a block beside their density, (rows,)."""
        potential = self.carrier_of(block)
        potential.noise_level = noise_level
        return potential.energy(state.x) - state.energy

    def join(self, block: Block, rows: Rows) -> None:
        """Adds a block, whose rows count the steps of this batch."""
        self.rows = Rows.cat([self.rows, rows]) if self.blocks else rows
        self._regroup([*self.blocks, block])

    def leave(self, block: Block) -> Rows:
        """Takes a block out, and gives back its rows."""
        parts = self.rows.split(self.sizes)
        rows = parts.pop(self.blocks.index(block))
        if parts:
            self.rows = Rows.cat(parts)
        self._regroup([other for other in self.blocks if other is not block])
        return rows

    def rows_of(self, block: Block) -> Rows:
        """The rows of one block."""
        return self.rows.split(self.sizes)[self.blocks.index(block)]

    def refresh(self, blocks: Sequence[Block]) -> None:
        """Energies and gradients of blocks whose target has moved."""
        parts = self.rows.split(self.sizes)
        places = [self.blocks.index(block) for block in blocks]
        changed = Rows.cat([parts[i] for i in places])
        rows = self._evaluated(blocks, changed, changed.state.x)
        self._put(parts, places, rows)

    def move(self, block: Block, x: Tensor) -> None:
        """Sets the chains of a block to `x`, (rows, *event); those that had diverged go on from there."""
        parts = self.rows.split(self.sizes)
        i = self.blocks.index(block)
        state = parts[i].state._replace(x=x)
        with evaluating(self._modules):
            energy, gradient = self.potential_of([block])(x)
        parts[i] = Rows.new(state._replace(energy=energy, gradient=gradient), self.clock)
        self.rows = Rows.cat(parts)

    def advance(self, num_steps: int) -> Tensor:
        """Takes `num_steps` steps with every chain and returns the states, (batch, *event)."""
        with evaluating(self._modules):
            if self.graphs is not None:
                self._weights = weights_of(self._modules, self.potential_of(self.blocks).copies_weights)
            for _ in range(num_steps):
                self._step()
        return self.state.x

    def _move(self, move: Move, numbers: Tensors) -> tuple[Moved, str]:
        """One move of all rows, and why it was not replayed."""
        kernel, potential = self.blocks[0].kernel, self.potential_of(self.blocks)
        normal = all(type(block.noise) in (Noise, MaskedNoise) for block in self.blocks)
        step = Step(move, kernel, potential, self.rows, numbers, self._noise, self.clock, normal)
        return (step.taken(), "") if self.graphs is None else self.graphs.take(step, self._weights)

    def _regroup(self, blocks: list[Block]) -> None:
        self.blocks = blocks
        self._modules = list({id(m): m for block in blocks for m in block.energy.modules()}.values())
        noises = [block.noise for block in blocks]
        self._noise = noises[0] if len(noises) == 1 else _BlockNoise(noises, self.sizes)

    def _step(self) -> None:
        each = [block.scheduled() for block in self.blocks]
        dynamics = tuple(joined(column, self.sizes) for column in zip(*each, strict=True))
        moved, reason = self._move(step_rows, dynamics)
        self.rows = moved.rows
        self._note(moved.norm, Info(moved.acceptance), [numbers.step_size for numbers in each])
        if self.graphs is not None:
            for block in self.blocks:
                block.replayed += not reason
                block.plain_because = reason or block.plain_because
        self.clock += 1
        if leaving := [block for block in self.blocks if block.stepped()]:
            self._change_noise_level(leaving)

    def _note(self, norm: Tensor, info: Info, step_sizes: list[Tensor]) -> None:
        if not any(block.record or block.adapts for block in self.blocks):
            return
        none = [None] * len(self.blocks)
        norms = norm.split(self.sizes)
        acceptance = none if info.acceptance is None else info.acceptance.split(self.sizes)
        parts = zip(self.blocks, self.rows.split(self.sizes), norms, acceptance, step_sizes, strict=True)
        for block, rows, block_norm, accepted, step_size in parts:
            block.note(rows, block_norm, Info(accepted), step_size)

    def _change_noise_level(self, leaving: list[Block]) -> None:
        """From one noise level on to the next one, and from the last to no noise at all."""
        parts = self.rows.split(self.sizes)
        places = [self.blocks.index(block) for block in leaving]
        said: dict[Block, Tensor] = {}
        moves = []
        for block, i in zip(leaving, places, strict=True):
            state = parts[i].state
            gradient = state.gradient
            if block.is_carried:
                potential = self.carrier_of(block)
                potential.noise_level = block.left_level
                energy, gradient = potential(state.x)
                said[block] = energy - state.energy
            moves.append(block.predicted(state.x, gradient))
        x = moves[0] if len(moves) == 1 else torch.cat(moves)
        if leaving == self.blocks and leaving[0].kernel.energy_is_current:
            self.rows = self._move(evaluate_rows, (x,))[0].rows
        else:
            self._put(parts, places, self._evaluated(leaving, Rows.cat([parts[i] for i in places]), x))
        if said:
            self._weigh(said)

    def _weigh(self, said: Mapping[Block, Tensor]) -> None:
        """Weighs particles that have come to another level, by what was said of them before and is now."""
        parts = self.rows.split(self.sizes)
        for block, before in said.items():
            i = self.blocks.index(block)
            rows = parts[i]
            gain = self._said(block, rows.state, block.noise_level) - before
            index = block.weighed(torch.where(rows.alive, gain, -torch.inf), block.noise.number(gain))
            parts[i] = rows.picked(index)
        self.rows = Rows.cat(parts)

    def _evaluated(self, blocks: Sequence[Block], rows: Rows, x: Tensor) -> Rows:
        """The rows of some blocks, moved to `x`."""
        state = rows.state._replace(x=x)
        potential = self.potential_of(blocks)
        if blocks[0].kernel.energy_is_current:
            with evaluating(self._modules):
                energy, gradient = potential(x)
            state = state._replace(energy=energy, gradient=gradient)
        return rows.moved(state, self.clock)

    def _put(self, parts: list[Rows], places: Sequence[int], rows: Rows) -> None:
        for i, part in zip(places, rows.split([parts[i].alive.numel() for i in places]), strict=True):
            parts[i] = part
        self.rows = Rows.cat(parts)


class Chain(Batch):
    """Running chains of one composition: a batch of one block.

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
        held: Whether what is held carries the noise of the level, see `Block`.
        num_warmup: Steps at the start in which the step size adapts, if the kernel has a target.
        record: Keeps a trace.
        graphs: Captures steps and replays them, see `graphs`; pays where a chain is long.
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
        held: Held = "clean",
        num_warmup: int = 0,
        record: bool = True,
        graphs: StepGraphs | None = None,
    ) -> None:
        super().__init__(graphs)
        self.energy = energy
        coefficients = energy.coefficients if coefficients is None else coefficients
        energy.check_coefficients(coefficients, len(x))
        self.block = Block(
            energy,
            x,
            sampler,
            noise,
            num_steps=num_steps,
            mask=mask,
            held=held,
            num_warmup=num_warmup,
            record=record,
        )
        self.potential = FusedPotential(
            energy,
            coefficients.to(device=x.device, dtype=coefficient_type(x)),
            mask,
            stack=x.device.type != "cpu",
        )
        carrier = self.block.carrier
        self._carrier: FusedPotential | None = None
        if carrier is not None:
            own = carrier.coefficients.to(device=x.device, dtype=x.dtype)
            self._carrier = FusedPotential(carrier, own, mask, stack=x.device.type != "cpu")
        self.join(self.block, self.begin(self.block, x))

    def carrier_of(self, block: Block) -> FusedPotential:
        assert self._carrier is not None
        return self._carrier

    def potential_of(self, blocks: Sequence[Block]) -> FusedPotential:
        self.potential.noise_level = self.block.noise_level
        return self.potential

    @property
    def kernel(self) -> Kernel:
        """The kernel, without its schedule."""
        return self.block.kernel

    @property
    def num_steps(self) -> int:
        """Steps taken."""
        return self.block.num_steps

    @property
    def dynamics(self) -> Dynamics:
        """Step size, temperature and noise scale before the schedule's factors; assign to change them."""
        return self.block.dynamics

    @dynamics.setter
    def dynamics(self, value: Dynamics) -> None:
        self.block.dynamics = value

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
        self.refresh([self.block])

    def final_energies(self) -> Tensor:
        """Energies of the current states, (batch,), without a gradient."""
        self.potential.noise_level = self.block.noise_level
        with evaluating(self._modules):
            return self.potential.energy(self.state.x)

    def trace(self) -> Trace:
        """The trace so far. Reading it waits for the device; asking for it does not."""
        return trace_of(self.block, self.rows)

    def divergence(self) -> Divergence:
        """Which chains have diverged so far."""
        return divergence_of(self.rows)


def trace_of(block: Block, rows: Rows) -> Trace:
    """What a block has recorded, at its rows of the moment."""
    if not block.history:
        empty = rows.largest.new_zeros(0, block.size)
        return Trace(empty, empty, None, empty[:, 0], empty[..., None])
    energy, norm, acceptance, step_size, seen = zip(*block.history, strict=True)
    accepted = None if acceptance[0] is None else torch.stack(acceptance)
    steps = torch.stack(torch.broadcast_tensors(*step_size))  # one size for all chains, or one each
    return Trace(torch.stack(energy), torch.stack(norm), accepted, steps, torch.stack(seen))


def divergence_of(rows: Rows) -> Divergence:
    """Which of the rows have diverged."""
    return Divergence(~rows.alive, rows.bad_step, rows.largest)


def _who_changes(energy: Energy, x: Tensor, noise_level: Tensor | None) -> str:
    """What to say of an energy that changes its states past what PyTorch counts, as through `x.data`."""
    for leaf in energy.leaves():
        given = x.clone()
        leaf.energy(given, noise_level)
        if not torch.equal(given, x):
            return changed_states(leaf)
    return changed_states(energy)


class _BlockNoise(Noise):
    """Draws of several blocks, each from its own noise."""

    def __init__(self, noises: Sequence[Noise], sizes: Sequence[int]) -> None:
        super().__init__(*(source for noise in noises for source in noise.sources))
        self.noises = noises
        self.sizes = list(sizes)

    def normal(self, like: Tensor) -> Tensor:
        parts = zip(self.noises, like.split(self.sizes), strict=True)
        return torch.cat([noise.normal(part) for noise, part in parts])


@contextmanager
def evaluating(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Evaluation mode inside; the own mode of each module afterwards, once no thread is inside.

    Args:
        modules: All of them, such as `energy.modules()`.
    """
    with _modes:
        training = [m for m in modules if m.training or id(m) in _evaluated]
        for m in training:
            _evaluated[id(m)] = _evaluated.get(id(m), 0) + 1
            m.training = False
    try:
        yield
    finally:
        with _modes:
            for m in training:
                _evaluated[id(m)] -= 1
                if not _evaluated[id(m)]:
                    del _evaluated[id(m)]
                    m.training = True


_modes = threading.Lock()
_evaluated: dict[int, int] = {}
"""How many are evaluating a module that was in training mode, by its id."""
