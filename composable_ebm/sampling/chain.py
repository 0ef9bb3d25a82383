"""Running chains of one composition: a batch of one block."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from composable_ebm.energy import Energy
from composable_ebm.energy.weights import coefficient_type
from composable_ebm.potential.evaluating import evaluating
from composable_ebm.potential.potential import Potential
from composable_ebm.sampling.batch import Batch
from composable_ebm.sampling.block import Block, Held, Sampler
from composable_ebm.sampling.graphs import StepGraphs
from composable_ebm.sampling.kernel import Dynamics, Kernel, Noise
from composable_ebm.sampling.trace import Divergence, Trace, divergence_of, trace_of

Callback = Callable[[int, "Chain"], object]

__all__ = ["Callback", "Chain"]


class Chain(Batch):
    """Running chains of one composition.

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
        device = x.device
        self._potential = Potential(
            energy,
            coefficients.to(device=device, dtype=coefficient_type(x)),
            mask=mask,
            stack=device.type != "cpu",
            tallies=[self.block.tally],
        )
        if (carrier := self.block.carrier) is not None:
            own = carrier.coefficients.to(device=device, dtype=x.dtype)
            self._carrier = Potential(carrier, own, mask=mask, stack=device.type != "cpu")
        self.join(self.block, self.begin(self.block, x))

    def carrier_of(self, block: Block) -> Potential:
        return self._carrier

    def potential_of(self, blocks: Sequence[Block]) -> Potential:
        level = self.block.noise_level
        if level is not self._potential.noise_level:
            self._potential = self._potential.at(noise_level=level)
        return self._potential

    @property
    def potential(self) -> Potential:
        """Energies and gradients, at the noise level of the moment."""
        return self.potential_of(self.blocks)

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
        return self._potential.coefficients

    @coefficients.setter
    def coefficients(self, value: Tensor) -> None:
        self.energy.check_coefficients(value, len(self.x))
        self._potential = self._potential.at(coefficients=value.to(self._potential.coefficients))
        self.refresh([self.block])

    def final_energies(self) -> Tensor:
        """Energies of the current states, (batch,), without a gradient."""
        with evaluating(self._modules):
            return self.potential.energy(self.state.x)

    def trace(self) -> Trace:
        """The trace so far. Reading it waits for the device; asking for it does not."""
        return trace_of(self.block, self.rows)

    def divergence(self) -> Divergence:
        """Which chains have diverged so far."""
        return divergence_of(self.rows)
