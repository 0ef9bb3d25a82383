"""What happened to chains: at each step, and which of them stopped being finite."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from composable_ebm.sampling.block import Block, Rows

__all__ = ["ChainDivergedError", "Divergence", "Trace", "divergence_of", "trace_of"]


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
