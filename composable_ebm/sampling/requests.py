"""Many requests at once: runs that share batches, join and leave between steps, and take turns.

Runs whose chains step alike (one kernel up to its step size and temperature, states of one shape)
form one batch, each row with its own composition, noise, and place in its own schedule. Batches take
turns, one step at a time, by the time they have used, so that neither a long run nor a large batch
starves the others.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Hashable, Sequence
from typing import Literal

import torch
from torch import Tensor

from composable_ebm.energy import Energy
from composable_ebm.sampling.annealed import Annealed
from composable_ebm.sampling.block import Block, Rows, Sampler
from composable_ebm.sampling.graphs import settings_of
from composable_ebm.sampling.joint import JointBatch, PotentialPool, Saved
from composable_ebm.sampling.kernel import Noise
from composable_ebm.sampling.result import SampleResult
from composable_ebm.sampling.run import OnFrame, Run, Steering
from composable_ebm.sampling.sample import DEFAULT_STEPS, Images, calibrated_sampler, conclude, prepare

STEPS_AHEAD = 2
"""Steps that are queued on a CUDA device before the engine waits for one, so that it can be interrupted."""

_log = logging.getLogger(__name__)

__all__ = ["Engine"]


class Engine:
    """Runs the requests of many callers together; `submit` returns at once.

    Requests run as one batch where they can, which costs far less than one after another. A request
    draws the same noise whatever else runs, so its samples are those of `sample`, up to the rounding
    of batches of another size. All work is done by one thread, which begins with the first request.

    Args:
        device: Where energies must be; anywhere unless given.
        max_batch: Most chains that step together. Requests beyond it run in batches that take turns.
    Raises:
        ValueError: If `max_batch` is less than 1.
    Example:
        >>> with Engine() as engine:
        ...     runs = [engine.submit(mix, num_chains=4, num_steps=80, seed=i) for i in range(16)]
        ...     samples = [run.result().samples for run in runs]
    """

    def __init__(self, device: torch.device | str | None = None, max_batch: int = 256) -> None:
        if max_batch < 1:
            raise ValueError(f"`max_batch` must be at least 1, got {max_batch}.")
        self.device = None if device is None else torch.device(device)
        self.max_batch = max_batch
        self._pool = PotentialPool()
        self._batches: list[JointBatch] = []
        self._waiting: deque[tuple[Run, Tensor]] = deque()
        self._runs: dict[Block, Run] = {}
        self._changed = threading.Condition()
        self._news = False
        self._closed = False
        self._thread: threading.Thread | None = None
        self._ahead: deque[torch.cuda.Event] = deque()

    @torch.inference_mode(False)  # states are for gradients, whatever mode the caller is in
    def submit(
        self,
        composition: Energy,
        num_chains: int | None = None,
        num_steps: int | Literal["calibrated"] | None = "calibrated",
        seed: int = 0,
        *,
        on_frame: OnFrame | None = None,
        frame_every: int = 1,
        frames_per_second: float | None = None,
        sampler: Sampler | None = None,
        schedule_steps: int | None = None,
        init: Tensor | Images | None = None,
        mask: Tensor | None = None,
        num_warmup: int = 0,
        on_divergence: Literal["raise", "report"] = "raise",
    ) -> Run:
        """Begins a run and returns a handle to it.

        Args:
            composition: With at least one term of positive weight.
            num_chains: Number of chains; that of `init` unless given, else 16.
            num_steps: Steps after warm-up; None runs until cancelled, and keeps no trace; what the
                experts were calibrated with (else 200) unless given.
            seed: Seeds the noise.
            on_frame: Called with a `Frame` while the run goes on and at its end, in a thread of its
                own. Frames that it is too slow for are left out. Returning True cancels the run.
            frame_every: Steps between frames.
            frames_per_second: Most frames a second.
            sampler: A kernel or an annealed one; what the experts were calibrated with unless given.
            schedule_steps: Steps that the schedule of an annealed sampler takes; after them its last
                values stay. All of the run unless given; where the run has no end, the calibrated
                number.
            init: States to start from, as in `sample`.
            mask: 1 where states may move, 0 where they are held at `init`.
            num_warmup: Extra steps at the start in which a kernel with a `target_acceptance` adapts.
            on_divergence: "raise" a ChainDivergedError at the end, or "report" it in the result.
        Raises:
            ValueError: If the request makes no sense; the message says why.
            RuntimeError: If the engine is closed.
        """
        if frame_every < 1:
            raise ValueError(f"`frame_every` must be at least 1, got {frame_every}.")
        if frames_per_second is not None and not frames_per_second > 0:
            raise ValueError(f"`frames_per_second` must be positive, got {frames_per_second}.")
        if schedule_steps is not None and schedule_steps < 1:
            raise ValueError(f"`schedule_steps` must be at least 1, got {schedule_steps}.")
        endless = num_steps is None
        asked = prepare(
            composition,
            num_chains=num_chains,
            num_steps=None if num_steps == "calibrated" else num_steps,
            sampler=sampler,
            init=init,
            seed=seed,
            generator=None,
            coefficients=None,
            mask=mask,
            num_warmup=num_warmup,
            on_divergence=on_divergence,
            device=self.device,
        )
        size = len(asked.x)
        if size > self.max_batch:
            raise ValueError(
                f"`num_chains` is {size}, more than this engine steps together ({self.max_batch}): submit it "
                "in parts, make Engine(max_batch=...) larger, or use `composable-ebm generate`."
            )
        composition.check_coefficients(composition.coefficients, size)
        block = Block(
            composition,
            asked.x,
            asked.sampler,
            Noise((asked.generator, size)),
            num_steps=schedule_steps or num_warmup + asked.num_steps,
            ends=not endless and schedule_steps is None,
            mask=asked.mask,
            num_warmup=num_warmup,
            record=not endless,
        )
        run = Run(
            block,
            calibrated=sampler is None,
            seed=seed,
            total=None if endless else num_warmup + asked.num_steps,
            num_warmup=num_warmup,
            on_divergence=on_divergence,
            frame_every=frame_every,
            frames_per_second=frames_per_second,
            wake=self._wake,
        )
        with self._changed:
            if self._closed:
                raise RuntimeError("this engine is closed.")
            if on_frame is not None:
                run.watch(on_frame)
            self._runs[block] = run
            self._waiting.append((run, asked.x))
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="composable_ebm engine", daemon=True)
                self._thread.start()
        self._wake()
        return run

    @property
    def runs(self) -> tuple[Run, ...]:
        """The runs that have not ended."""
        with self._changed:
            return tuple(self._runs.values())

    @property
    def potentials_made(self) -> int:
        """How many sets of terms have been made ready since the engine began; weights make none."""
        return self._pool.made

    def close(self) -> None:
        """Ends what still runs, as `cancel` does, and the engine's thread."""
        with self._changed:
            self._closed = True
            for run in self._runs.values():
                run.cancelled = True
            self._news = True
            self._changed.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _wake(self) -> None:
        with self._changed:
            self._news = True
            self._changed.notify_all()

    # -- the engine's thread -------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._news or self._batches or self._closed)
                    news, self._news = self._news, False
                    if self._closed and not (self._batches or self._waiting):
                        return
                if news:
                    self._admit()
                    self._attend()
                if self._batches:
                    self._turn(min(self._batches, key=lambda batch: batch.used))
        except BaseException as error:  # a defect of the engine must not leave anybody waiting
            _log.exception("the engine failed")
            with self._changed:
                self._closed = True
                left = list(self._runs.values())
            for run in left:
                self._end(run, None, error)

    def _admit(self) -> None:
        """Begins the runs that were submitted."""
        while True:
            with self._changed:
                if not self._waiting:
                    return
                run, x = self._waiting.popleft()
            run.start = time.perf_counter()
            try:
                self._begin(run, x)
            except Exception as error:
                self._end(run, None, error)

    def _attend(self) -> None:
        """Ends the runs that were cancelled, and steers those that were steered."""
        for run in [self._runs[block] for batch in self._batches for block in batch.blocks]:
            if run.finished:
                self._finish(run)
            elif (steering := run.take_steering()) is not None:
                try:
                    self._steer(run, steering)
                except Exception as error:
                    self._end(run, None, error)

    def _turn(self, batch: JointBatch) -> None:
        """One step of a batch."""
        start, saved = time.perf_counter(), batch.saved()
        try:
            batch.advance(1)
        except Exception as error:
            self._part(batch, saved, error)
            return
        if batch.like.device.type == "cuda":
            self._wait_for_the_device()
        # Every run is due the same share of the time.
        batch.used += (time.perf_counter() - start) / len(batch.blocks)
        self._account(list(batch.blocks))

    def _account(self, blocks: Sequence[Block]) -> None:
        """After a step: frames for those who look on, and the results of those who are done."""
        runs = [self._runs[block] for block in blocks]
        for run in runs:
            run.num_steps = run.block.num_steps
            run.show(lambda block=run.block: self._batch_of(block).rows_of(block))  # type: ignore[misc]
        for run in runs:
            if run.finished:
                self._finish(run)

    def _batch_of(self, block: Block) -> JointBatch:
        return next(batch for batch in self._batches if block in batch.blocks)

    def _begin(self, run: Run, x: Tensor) -> None:
        """Sets the chains of a run to `x`, before their next step."""
        block = run.block
        batch = JointBatch(_kind(block, x), x[:1], self._pool)
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
            # It neither owes the others any time nor is owed any.
            batch.used = min((other.used for other in self._batches), default=0.0)
            self._batches.append(batch)

    def _leave(self, run: Run) -> Rows:
        """Takes a run out of its batch; its rows, with steps counted as the run counts them."""
        block, batch = run.block, self._batch_of(run.block)
        rows = batch.leave(block).counted(block.num_steps - batch.clock)
        if batch.blocks:
            self._settle(batch)
        else:
            self._batches.remove(batch)
        return rows

    def _finish(self, run: Run) -> None:
        """Hands over the result of a run."""
        block, rows = run.block, self._leave(run)
        try:
            potential = self._pool.of(block.energy, rows.state.x)
            result = conclude(
                potential,
                block,
                rows,
                trajectory=None,
                seed=run.seed,
                start=run.start,
                evaluations=block.evaluations,
                path=potential.plan.describe() + (", in a batch with other requests" if run.shared else ""),
                warmup=run.num_warmup,
                on_divergence=run.on_divergence,
            )
        except Exception as error:
            self._end(run, None, error)
        else:
            self._end(run, result)

    def _end(self, run: Run, result: SampleResult | None, error: BaseException | None = None) -> None:
        with self._changed:
            self._runs.pop(run.block, None)
        run.end(result, error)

    def _steer(self, run: Run, steering: Steering) -> None:
        """Has a run follow another composition, in another batch if its kernel asks for that."""
        block, state = run.block, self._leave(run).state
        x, kind = state.x, _kind(block, state.x)
        block.energy = steering.energy
        sampler = steering.sampler
        run.calibrated = run.calibrated and sampler is None
        if sampler is None and run.calibrated:
            suited, _ = calibrated_sampler(steering.energy)
            kernel = suited.kernel if isinstance(suited, Annealed) else suited
            if settings_of(kernel) == settings_of(block.kernel):
                block.dynamics = kernel.dynamics(x)
            else:
                sampler = suited
        if sampler is not None:
            carried = block.sigma or 0.0
            left = None if run.total is None else max(1, run.total - block.num_steps)
            steps = steering.schedule_steps or left or _calibrated_steps(steering.energy)
            block.follow(sampler, x, steps, ends=left is not None and steering.schedule_steps is None)
            extra = (block.sigma or 0.0) ** 2 - carried**2
            x = x + extra**0.5 * block.noise.normal(x) if extra > 0 else x
        self._begin(run, x)
        if state.momentum is not None and _kind(block, x) == kind:
            self._batch_of(block).push(block, state.momentum)

    def _part(self, batch: JointBatch, saved: Saved, error: Exception) -> None:
        """After an error in a step: each run takes it alone, so that only those at fault fail."""
        batch.restore(saved)
        self._batches.remove(batch)
        blocks = list(batch.blocks)
        passed = []
        for block in blocks:
            alone = JointBatch(batch.kind, batch.like, self._pool, batch.clock)
            alone.join(block, batch.leave(block))
            try:
                if len(blocks) == 1:
                    raise error
                alone.advance(1)
            except Exception as own:
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


def _kind(block: Block, x: Tensor) -> Hashable:
    """What two blocks must have alike to be rows of one batch."""
    absent = tuple(value is None for value in (*block.dynamics, block.sigma))
    return settings_of(block.kernel), tuple(x.shape[1:]), x.dtype, x.device, block.energy.binary, absent


def _calibrated_steps(energy: Energy) -> int:
    known = [leaf.sampler_settings.get("num_steps", 0) for leaf in energy.leaves() if leaf.sampler_settings]
    return max(known, default=0) or DEFAULT_STEPS
