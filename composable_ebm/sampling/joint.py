"""A batch whose blocks have compositions of their own: the runs of an engine.

What a row is evaluated by, see `composable_ebm.potential.rows`.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from composable_ebm.potential.potential import Potential
from composable_ebm.potential.rows import Plans
from composable_ebm.sampling import graphs
from composable_ebm.sampling.block import Block, Rows, joined
from composable_ebm.sampling.chain import Batch

MAX_SUBSETS = 64
"""Sets of blocks whose potential a batch keeps, between changes of its blocks."""

__all__ = ["JointBatch", "Saved"]


class Saved(NamedTuple):
    """A batch between two steps: what to go back to if the next one fails."""

    rows: Rows
    clock: int
    blocks: list[tuple]
    generators: list[tuple[torch.Generator, Tensor]]


class JointBatch(Batch):
    """A batch whose blocks have compositions of their own.

    Args:
        kind: What its blocks have alike.
        like: A state, for shape, device and dtype.
        plans: Where plans are kept.
        clock: Steps that it has taken.
    Attributes:
        charged: Time that each of its runs has been charged for, in seconds.
        due: When it may take its next step, by `time.perf_counter`.
    """

    def __init__(self, kind: Hashable, like: Tensor, plans: Plans, clock: int = 0) -> None:
        super().__init__(graphs.shared(like.device))
        self.kind = kind
        self.like = like
        self.clock = clock
        self.charged = 0.0
        self.due = 0.0
        self._plans = plans
        self._potentials: dict[tuple[Block, ...], Potential] = {}

    def potential_of(self, blocks: Sequence[Block]) -> Potential:
        key = tuple(blocks)
        if key not in self._potentials:
            if len(self._potentials) >= MAX_SUBSETS:
                self._potentials.clear()
            self._potentials[key] = self._plans.potential_of_rows(
                [block.energy for block in blocks],
                [block.size for block in blocks],
                self.like,
                _masks(blocks, self.like),
                [block.tally for block in blocks],
            )
        potential = self._potentials[key] = self._potentials[key].at(noise_level=_noise_level(blocks))
        return potential

    def carrier_of(self, block: Block) -> Potential:
        assert block.carrier is not None
        return self._plans.potential(block.carrier, self.like, block.mask)

    def push(self, block: Block, momentum: Tensor) -> None:
        """Gives the chains of a block their momentum, (rows, *event)."""
        parts, place = self.rows.split(self.sizes), self.blocks.index(block)
        parts[place] = parts[place]._replace(state=parts[place].state._replace(momentum=momentum))
        self.rows = Rows.cat(parts)

    def saved(self) -> Saved:
        """What `restore` goes back to; noise included."""
        return Saved(
            self.rows,
            self.clock,
            [block.snapshot() for block in self.blocks],
            [(g, g.get_state()) for block in self.blocks for g, _ in block.noise.sources],
        )

    def restore(self, saved: Saved) -> None:
        """Undoes the steps since `saved`."""
        self.rows, self.clock = saved.rows, saved.clock
        for block, snapshot in zip(self.blocks, saved.blocks, strict=True):
            block.restore(snapshot)
        for generator, state in saved.generators:
            generator.set_state(state)

    def _regroup(self, blocks: list[Block]) -> None:
        super()._regroup(blocks)
        self._potentials.clear()


def _noise_level(blocks: Sequence[Block]) -> Tensor | None:
    """() where all blocks are at one noise level, which networks are faster at, else (batch,)."""
    levels = [block.noise_level for block in blocks]
    apart = any(level is not None and level.ndim for level in levels)
    if len({block.sigma for block in blocks}) == 1 and (len(levels) == 1 or not apart):
        return levels[0]
    return joined(levels, [block.size for block in blocks])


def _masks(blocks: Sequence[Block], like: Tensor) -> Tensor | None:
    """1 where states may move, (rows, *event); None if all may."""
    if all(block.mask is None for block in blocks):
        return None
    event = like.shape[1:]
    masks = [
        like.new_ones((block.size, *event)) if block.mask is None else block.mask.expand(block.size, *event)
        for block in blocks
    ]
    return torch.cat(masks)
