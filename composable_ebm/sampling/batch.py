"""The one loop over Markov chain steps: training, `sample`, `Engine` and the mixer all run on it.

`Batch` is the loop, over the rows of one run or of several. Nothing in it waits for the device:
schedules, coefficients, traces and the count of diverged chains are tensors there, and are read once
at the end.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from composable_ebm.energy import Energy, changed_states
from composable_ebm.potential.evaluating import evaluating
from composable_ebm.potential.potential import Potential
from composable_ebm.sampling.block import Block, MaskedNoise, Rows, started, together
from composable_ebm.sampling.graphs import (
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
from composable_ebm.sampling.kernel import Info, Noise, State
from composable_ebm.sampling.particles import CANDIDATES, Population, chosen

__all__ = ["Batch"]


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
    def potential_of(self, blocks: Sequence[Block]) -> Potential:
        """Energies and gradients of the rows of `blocks`, at their noise levels of the moment."""

    @abstractmethod
    def carrier_of(self, block: Block) -> Potential:
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
            x, log_weights = block.placed(x.detach()), None
            if block.carrier is not None and block.starts_in_noise:
                x, log_weights = self._first(block, x)
            before = x.clone()
            state = block.kernel.init(self.potential_of([block]), x, block.noise)
            if not torch.equal(x, before) and bool((x == x).all()):
                raise ValueError(_who_changes(block.energy, before, block.noise_level))
            if block.weighs:
                # Chains that come from elsewhere stand for the composition at this level as they are.
                block.population = Population.of(x.new_zeros(len(x)) if log_weights is None else log_weights)
        return Rows.new(state, self.clock)

    def _first(self, block: Block, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Draws of the carrier at the first noise level, and log weights of those that are weighed.

        Experts are at odds about states even there: with five attributes, of which two show in how bright a
        face is, every second one would go. Nothing has been spent on them yet, so the weighed are chosen
        among more, none of them twice.
        """
        level = block.sigmas[0]
        starts = [x]
        if block.weighs:
            noise = (block.noise.normal(x) for _ in range(CANDIDATES - 1))
            starts += [block.placed(started(block.energy, each, level)) for each in noise]
        if block.energy.prior(x, level) is None:
            starts = [self._denoised(block, start) for start in starts]
        if not block.weighs:
            return starts[0], None
        potential, carrier = (
            self.potential_of([block]),
            self.carrier_of(block).at(noise_level=block.noise_level),
        )
        said = torch.cat([carrier.energy(start) - potential.energy(start) for start in starts])
        index, log_weights = chosen(said, len(x), block.noise.number(x))
        return torch.cat(starts)[index], log_weights

    def _denoised(self, block: Block, x: Tensor) -> Tensor:
        """`x`, nothing but noise of the first level, about the mean of the data.

        Much noise leaves only that, x - σ² ∂E_c/∂x; new noise goes on it. For densities that know no
        `Energy.prior`, whose draws would lose some of their width by that.
        """
        sigma = block.noise_level
        assert sigma is not None
        _, gradient = self.carrier_of(block).at(noise_level=sigma)(x)
        return block.placed(x - sigma.square() * gradient + sigma * block.noise.normal(x))

    def _said(self, block: Block, state: State, noise_level: Tensor | None) -> Tensor:
        """G, what is said of the states of a block beside their density, (rows,)."""
        potential = self.carrier_of(block).at(noise_level=noise_level)
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
        if self.graphs is None:
            return move(kernel, potential, self.rows, numbers, self._noise, self.clock), ""
        normal = all(type(block.noise) in (Noise, MaskedNoise) for block in self.blocks)
        step = Step(move, kernel, potential, self.rows, numbers, self._noise, self.clock, normal)
        return self.graphs.take(step, self._weights)

    def _regroup(self, blocks: list[Block]) -> None:
        self.blocks = blocks
        self._modules = list({id(m): m for block in blocks for m in block.energy.modules()}.values())
        noises = [block.noise for block in blocks]
        self._noise = noises[0] if len(noises) == 1 else _BlockNoise(noises, self.sizes)

    def _step(self) -> None:
        each = [block.scheduled() for block in self.blocks]
        moved, reason = self._move(step_rows, together(each, self.sizes))
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
                energy, gradient = self.carrier_of(block).at(noise_level=block.left_level)(state.x)
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
