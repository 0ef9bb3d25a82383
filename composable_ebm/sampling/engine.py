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
from typing import Literal

import torch
from torch import Tensor

from composable_ebm.energy import Energy
from composable_ebm.sampling.block import Block, Held, Sampler
from composable_ebm.sampling.live import Live, LiveBlock
from composable_ebm.sampling.request import Beginning, Images, NumSteps, Request
from composable_ebm.sampling.result import SampleResult
from composable_ebm.sampling.run import OnFrame, Pace, Run
from composable_ebm.sampling.turns import Turns

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
        self._turns = Turns(max_batch, self._end)
        self._waiting: deque[tuple[Run, Tensor]] = deque()
        self._runs: dict[Run, None] = {}  # a set in order
        self._changed = threading.Condition()
        self._news = False
        self._closed = False
        self._thread: threading.Thread | None = None

    @torch.inference_mode(False)  # states are for gradients, whatever mode the caller is in
    def submit(
        self,
        composition: Energy,
        num_chains: int | None = None,
        num_steps: NumSteps = "calibrated",
        seed: int = 0,
        *,
        on_frame: OnFrame | None = None,
        frame_every: int = 1,
        frames_per_second: float | None = None,
        steps_per_second: float | None = None,
        share: float = 1.0,
        alone: bool = False,
        sampler: Sampler | None = None,
        schedule_steps: int | None = None,
        live: Live | bool = False,
        init: Tensor | Images | None = None,
        mask: Tensor | None = None,
        held: Held = "clean",
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
            steps_per_second: Most steps a second, for chains that are looked at; as many as can be
                unless given. Runs share a batch with those of the same pace.
            share: Of the time that is there for all, beside runs whose share is 1.
            alone: Shares no batch, so that samples are those of `sample` to the last bit on a CPU.
            sampler: A kernel or an annealed one; what the experts were calibrated with unless given.
            schedule_steps: Steps that the schedule of an annealed sampler takes; after them its last
                values stay. All of the run unless given; where the run has no end, the calibrated
                number.
            live: Has an endless run land: chains that do not meet the composition, as after `steer`, are
                taken up to the noise from which they can change and come down again; those that leave where
                data can be begin again at their neighbours. Needs a sampler annealed over noise levels.
            init: States to start from, as in `sample`.
            mask: 1 where states may move, 0 where they are held at `init`.
            held: Whether what is held carries the noise of the level, as in `sample`.
            num_warmup: Extra steps at the start in which a kernel with a `target_acceptance` adapts.
            on_divergence: "raise" a ChainDivergedError at the end, or "report" it in the result.
        Raises:
            ValueError: If the request makes no sense; the message says why.
            RuntimeError: If the engine is closed.
        """
        if schedule_steps is not None and schedule_steps < 1:
            raise ValueError(f"`schedule_steps` must be at least 1, got {schedule_steps}.")
        if live and num_steps is not None:
            raise ValueError("live chains have no end: give num_steps=None.")
        request = Request(
            composition,
            num_chains=num_chains,
            num_steps=num_steps,
            sampler=sampler,
            init=init,
            seed=seed,
            mask=mask,
            held=held,
            num_warmup=num_warmup,
            on_divergence=on_divergence,
        )
        pace = Pace(frame_every, frames_per_second, steps_per_second, share, alone)
        asked = request.begin(self.device)
        self._check_size(composition, len(asked.x))
        total = num_warmup + asked.num_steps if request.ends else None
        block = self._block(request, asked, schedule_steps, live)
        x = asked.x
        if isinstance(block, LiveBlock) and init is not None:
            x = x + block.sigma * block.noise.normal(x)
        run = Run(block, request, pace, num_chains=asked.num_chains, total=total, wake=self._wake)
        self._accept(run, x, on_frame)
        return run

    def _block(
        self, request: Request, asked: Beginning, schedule_steps: int | None, live: Live | bool
    ) -> Block:
        """The rows of a request in a batch."""
        composition, warmup = request.composition, request.num_warmup
        if live:
            return LiveBlock(
                composition,
                asked.x,
                asked.sampler,
                asked.noise,
                Live() if live is True else live,
                schedule_steps or asked.num_steps,
                at_rest=request.init is not None,
                mask=asked.mask,
                held=request.held,
            )
        return Block(
            composition,
            asked.x,
            asked.sampler,
            asked.noise,
            num_steps=schedule_steps or warmup + asked.num_steps,
            ends=request.ends and schedule_steps is None,
            mask=asked.mask,
            held=request.held,
            num_warmup=warmup,
            record=request.ends,
        )

    def _check_size(self, composition: Energy, size: int) -> None:
        if size > self.max_batch:
            raise ValueError(
                f"`num_chains` is {size}, more than this engine steps together ({self.max_batch}): submit it "
                "in parts, make Engine(max_batch=...) larger, or use `composable-ebm generate`."
            )
        composition.check_coefficients(composition.coefficients, size)

    def _accept(self, run: Run, x: Tensor, on_frame: OnFrame | None) -> None:
        with self._changed:
            if self._closed:
                raise RuntimeError("this engine is closed.")
            if on_frame is not None:
                run.watch(on_frame)
            self._runs[run] = None
            self._waiting.append((run, x))
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="composable_ebm engine", daemon=True)
                self._thread.start()
        self._wake()

    @property
    def max_batch(self) -> int:
        """Most chains that step together."""
        return self._turns.max_batch

    @property
    def runs(self) -> tuple[Run, ...]:
        """The runs that have not ended."""
        with self._changed:
            return tuple(self._runs)

    @property
    def potentials_made(self) -> int:
        """How many sets of terms have been made ready since the engine began; weights make none."""
        return self._turns.plans.made

    def close(self) -> None:
        """Ends what still runs, as `cancel` does, and the engine's thread."""
        with self._changed:
            self._closed = True
            for run in self._runs:
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
                    wait = self._turns.seconds_to_next
                    self._changed.wait_for(lambda: self._news or self._closed, wait)
                    news, self._news = self._news, False
                    if self._closed and wait is None and not self._waiting:
                        return
                if news:
                    self._admit()
                    self._turns.attend()
                self._turns.take()
        except BaseException as error:  # a defect of the engine must not leave anybody waiting
            _log.exception("the engine failed")
            with self._changed:
                self._closed = True
            for run in self.runs:
                self._end(run, None, error)

    def _admit(self) -> None:
        """Begins the runs that were submitted."""
        while True:
            with self._changed:
                if not self._waiting:
                    return
                run, x = self._waiting.popleft()
            run.start = time.perf_counter()
            self._turns.begin(run, x)

    def _end(self, run: Run, result: SampleResult | None, error: BaseException | None) -> None:
        with self._changed:
            self._runs.pop(run, None)
        run.end(result, error)
