"""Batches that take turns: which runs share one, whose turn it is, and what follows a step.

Time is shared out as in start-time fair queuing: a batch whose turn has come is charged the time of
its step, over the shares of its runs, and the batch that has been charged least is next. One that
had nothing to do for a while, since its runs asked for no more steps a second, is owed nothing for
that.

Reference:
    Goyal, Vin and Cheng (1996), Start-time fair queuing, SIGCOMM.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from composable_ebm.potential.rows import Plans
from composable_ebm.sampling.annealed import Annealed
from composable_ebm.sampling.block import Block, Rows
from composable_ebm.sampling.graphs import settings_of
from composable_ebm.sampling.joint import JointBatch, Saved
from composable_ebm.sampling.live import LiveBlock
from composable_ebm.sampling.request import calibrated_sampler, calibrated_steps
from composable_ebm.sampling.result import SampleResult
from composable_ebm.sampling.run import Run, Steering
from composable_ebm.sampling.sample import conclude

STEPS_AHEAD = 2
"""Steps that are queued on a CUDA device before anyone waits for one, so that they can be interrupted."""

_log = logging.getLogger(__name__)

__all__ = ["Turns"]


class Turns:
    """The runs of an engine, in batches. Used by one thread.

    Args:
        max_batch: Most chains that step together.
        ended: Called with a run that has ended, and its result or the error that ended it.
    Attributes:
        plans: Where plans are kept.
    """

    def __init__(
        self, max_batch: int, ended: Callable[[Run, SampleResult | None, BaseException | None], None]
    ) -> None:
        self.max_batch = max_batch
        self.plans = Plans()
        self._ended = ended
        self._batches: list[JointBatch] = []
        self._runs: dict[Block, Run] = {}
        self._charged = 0.0  # to the batch whose turn it is, before its step
        self._ahead: deque[torch.cuda.Event] = deque()

    @property
    def seconds_to_next(self) -> float | None:
        """How long until it is a batch's turn; None without any."""
        if not self._batches:
            return None
        return max(0.0, min(batch.due for batch in self._batches) - time.perf_counter())

    def begin(self, run: Run, x: Tensor) -> None:
        """Sets the chains of a run to `x`, before their next step."""
        try:
            self._begin(run, x)
        except BaseException as error:
            self._end(run, None, error)

    def attend(self) -> None:
        """Ends the runs that were cancelled, and steers those that were steered."""
        for run in [self._runs[block] for batch in self._batches for block in batch.blocks]:
            if run.finished:
                self._finish(run)
            elif (steering := run.take_steering()) is not None:
                try:
                    self._steer(run, steering)
                except BaseException as error:
                    self._end(run, None, error)

    def take(self) -> None:
        """One step of the batch whose turn it is, if any has one now."""
        start = time.perf_counter()
        due = [batch for batch in self._batches if batch.due <= start]
        if not due:
            return
        batch = min(due, key=lambda batch: batch.charged)
        saved, blocks = batch.saved(), list(batch.blocks)
        try:
            batch.advance(1)
        except BaseException as error:
            self._part(batch, saved, error)
            return
        if batch.like.device.type == "cuda":
            self._wait_for_the_device()
        now = time.perf_counter()
        paces = [self._runs[block].pace for block in blocks]
        self._charged = max(self._charged, batch.charged)
        batch.charged = self._charged + (now - start) / sum(pace.share for pace in paces)
        if (rate := paces[0].steps_per_second) is not None:
            batch.due = max(batch.due + 1 / rate, now)
        self._tend(batch)
        self._account(blocks)

    # -- joining and leaving -------------------------------------------------------------------------

    def _begin(self, run: Run, x: Tensor) -> None:
        block = run.block
        self._runs[block] = run
        batch = JointBatch(_kind(run, x), x[:1], self.plans)
        batch.join(block, batch.begin(block, x))
        self._settle(batch)

    def _settle(self, batch: JointBatch) -> None:
        """Moves a batch into another one that has room for it, or gives it turns of its own."""
        for other in self._batches:
            alike = other is not batch and other.kind == batch.kind
            if alike and len(other) + len(batch) <= self.max_batch:
                if batch in self._batches:
                    self._batches.remove(batch)
                for block in list(batch.blocks):
                    other.join(block, batch.leave(block).counted(other.clock - batch.clock))
                for block in other.blocks:
                    self._runs[block].shared = True
                return
        if batch not in self._batches:
            batch.charged = self._charged  # it neither owes the others any time nor is owed any
            batch.due = max(batch.due, time.perf_counter())
            self._batches.append(batch)

    def _batch_of(self, block: Block) -> JointBatch:
        return next(batch for batch in self._batches if block in batch.blocks)

    def _leave(self, run: Run) -> Rows:
        """Takes a run out of its batch; its rows, with steps counted as the run counts them."""
        block, batch = run.block, self._batch_of(run.block)
        rows = batch.leave(block).counted(block.num_steps - batch.clock)
        if batch.blocks:
            self._settle(batch)
        else:
            self._batches.remove(batch)
        return rows

    def _end(self, run: Run, result: SampleResult | None, error: BaseException | None = None) -> None:
        self._runs.pop(run.block, None)
        self._ended(run, result, error)

    def _tend(self, batch: JointBatch) -> None:
        """Looks at live chains whose look is due."""
        for block in list(batch.blocks):
            if isinstance(block, LiveBlock) and block.look_is_due:
                try:
                    if (x := block.tend(batch.rows_of(block))) is not None:
                        batch.move(block, x)
                except Exception as error:
                    run = self._runs[block]
                    self._leave(run)
                    self._end(run, None, error)

    # -- between steps -------------------------------------------------------------------------------

    def _account(self, blocks: Sequence[Block]) -> None:
        """After a step: frames for those who look on, and the results of those who are done."""
        runs = [self._runs[block] for block in blocks]
        parts: dict[Block, Rows] = {}
        for run in runs:
            run.num_steps = run.block.num_steps
            if run.wants_frame:
                if run.block not in parts:
                    batch = self._batch_of(run.block)
                    parts |= zip(batch.blocks, batch.rows.split(batch.sizes), strict=True)
                run.show(parts[run.block])
        for run in runs:
            if run.finished:
                self._finish(run)

    def _finish(self, run: Run) -> None:
        """Hands over the result of a run."""
        block, rows, request = run.block, self._leave(run), run.request
        if run.wants_frame:
            run.show(rows)
        try:
            potential = self.plans.potential(block.energy, rows.state.x)
            result = conclude(
                potential,
                block,
                rows,
                run.num_chains,
                trajectory=None,
                seed=request.seed,
                start=run.start,
                evaluations=block.tally.gradients,
                path=potential.describe() + (", in a batch with other requests" if run.shared else ""),
                warmup=request.num_warmup,
                on_divergence=request.on_divergence,
            )
        except BaseException as error:
            self._end(run, None, error)
        else:
            self._end(run, result)

    def _steer(self, run: Run, steering: Steering) -> None:
        """Has a run follow another composition, in another batch if its kernel asks for that."""
        block, state = run.block, self._leave(run).state
        x, kind = state.x, _kind(run, state.x)
        if isinstance(block, LiveBlock):
            suited = steering.sampler or (calibrated_sampler(steering.energy)[0] if run.calibrated else None)
            block.turn(steering.energy, suited)
            self._begin(run, x)
            return
        block.energy = steering.energy
        sampler = steering.sampler
        run.calibrated = run.calibrated and sampler is None
        if sampler is None and run.calibrated:
            suited, _ = calibrated_sampler(steering.energy)
            kernel = suited.kernel if isinstance(suited, Annealed) else suited
            if settings_of(kernel) == settings_of(block.kernel):
                block.tune(kernel, x)
            else:
                sampler = suited
        if sampler is not None:
            carried, total = block.sigma or 0.0, run.total
            left = None if total is None else max(1, total - block.num_steps)
            steps = steering.schedule_steps or left or calibrated_steps(steering.energy)
            block.follow(sampler, x, steps, ends=left is not None and steering.schedule_steps is None)
            extra = (block.sigma or 0.0) ** 2 - carried**2
            x = x + extra**0.5 * block.noise.normal(x) if extra > 0 else x
        self._begin(run, x)
        if state.momentum is not None and _kind(run, x) == kind:
            self._batch_of(block).push(block, state.momentum)

    def _part(self, batch: JointBatch, saved: Saved, error: BaseException) -> None:
        """After an error in a step: each run takes it alone, so that only those at fault fail."""
        batch.restore(saved)
        self._batches.remove(batch)
        blocks = list(batch.blocks)
        passed = []
        for block in blocks:
            alone = JointBatch(batch.kind, batch.like, self.plans, batch.clock)
            alone.join(block, batch.leave(block))
            try:
                if len(blocks) == 1:
                    raise error
                alone.advance(1)
            except BaseException as own:
                self._end(self._runs[block], None, own)
            else:
                passed.append(alone)
        if len(passed) == len(blocks):  # together they are too much, for the memory of a device perhaps
            self.max_batch = max(1, sum(block.size for block in blocks) // 2)
            _log.warning("batches hold %d chains from now on, since one failed: %s", self.max_batch, error)
        left = [block for alone in passed for block in alone.blocks]
        for alone in passed:
            self._settle(alone)
        self._account(left)

    def _wait_for_the_device(self) -> None:
        event = torch.cuda.Event()
        event.record()
        self._ahead.append(event)
        if len(self._ahead) > STEPS_AHEAD:
            self._ahead.popleft().synchronize()


def _kind(run: Run, x: Tensor) -> Hashable:
    """What two runs must have alike to be rows of one batch."""
    block, pace = run.block, run.pace
    absent = tuple(value is None for value in (*block.dynamics, block.sigma))
    states = tuple(x.shape[1:]), x.dtype, x.device, block.energy.binary
    axes = block.dynamics.axes
    along = None if axes is None else (axes.data_ptr(), len(axes))
    return (
        settings_of(block.kernel),
        states,
        along,
        absent,
        pace.steps_per_second,
        run if pace.alone else None,
    )
