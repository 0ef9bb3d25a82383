"""A run that an `Engine` works on: how to look at it, steer it, end it, and what it gives back."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from torch import Tensor

from composable_ebm.energy import Energy
from composable_ebm.sampling.block import Block, Rows, Sampler
from composable_ebm.sampling.result import SampleResult
from composable_ebm.sampling.sample import calibrated_sampler, check_positive_term

OnFrame = Callable[["Frame"], object]

__all__ = ["Frame", "OnFrame", "Run", "Steering"]


class Frame(NamedTuple):
    """What a run looks like at a step.

    Attributes:
        step: Steps taken.
        states: (num_chains, *event).
        energies: In nats, (num_chains,), of the composition that the run follows at this step.
        gradients: ∂E/∂x, (num_chains, *event).
        noise_level: Noise that the states carry on purpose, (), in data units, or None.
        alive: False for a chain that diverged and was frozen, (num_chains,).
    """

    step: int
    states: Tensor
    energies: Tensor
    gradients: Tensor
    noise_level: Tensor | None
    alive: Tensor

    @property
    def denoised(self) -> Tensor:
        """The states less their noise: at noise level σ the mean of the clean states given the noisy
        ones is x - σ² ∂E/∂x (Tweedie's formula)."""
        if self.noise_level is None:
            return self.states
        return self.states - self.noise_level.square() * self.gradients


class Steering(NamedTuple):
    """What a run is to follow from its next step on."""

    energy: Energy
    sampler: Sampler | None
    schedule_steps: int | None


class Run:
    """Chains that an `Engine` runs; `Engine.submit` makes them. Its methods are safe in any thread.

    Attributes:
        composition: What it was last told to follow.
        num_chains: Number of chains.
        num_steps: Steps taken so far.
        cancelled: Whether it was told to end early.
    """

    def __init__(
        self,
        block: Block,
        *,
        calibrated: bool,
        seed: int,
        total: int | None,
        num_warmup: int,
        on_divergence: str,
        frame_every: int,
        frames_per_second: float | None,
        wake: Callable[[], None],
    ) -> None:
        self.composition = block.energy
        self.num_chains = block.size
        self.num_steps = 0
        self.cancelled = False
        # For the engine, whose thread alone touches the block.
        self.block = block
        self.calibrated = calibrated
        self.seed = seed
        self.total = total
        self.num_warmup = num_warmup
        self.on_divergence = on_divergence
        self.start = time.perf_counter()
        self.shared = False
        self._frame_every = frame_every
        self._seconds_per_frame = 1 / frames_per_second if frames_per_second else 0.0
        self._wake = wake
        self._changed = threading.Condition()
        self._frame: Frame | None = None
        self._framed_at = 0.0
        self._wanted = False  # whether anyone looks at frames
        self._steering: Steering | None = None
        self._result: SampleResult | None = None
        self._error: BaseException | None = None
        self._over = False
        self._watcher: threading.Thread | None = None

    # -- for whoever asked ---------------------------------------------------------------------------

    @property
    def done(self) -> bool:
        """Whether it has ended: finished, cancelled or failed."""
        return self._over

    def result(self, timeout: float | None = None) -> SampleResult:
        """Waits for the end, and returns what the run has reached.

        A cancelled run gives what it had reached by then. When this returns, `on_frame` has been
        called for the last time.

        Args:
            timeout: Seconds to wait at most.
        Raises:
            TimeoutError: If it has not ended by then.
            ChainDivergedError: If a chain stopped being finite and `on_divergence` is "raise".
            Exception: What the energy or `on_frame` raised.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            if not self._changed.wait_for(lambda: self._over, timeout):
                raise TimeoutError(
                    f"the run has not ended after {timeout:g} s; it is at step {self.num_steps}."
                )
        if self._watcher is not None and self._watcher is not threading.current_thread():
            self._watcher.join(None if deadline is None else max(0.0, deadline - time.monotonic()))
        if self._error is not None:
            raise self._error
        assert self._result is not None
        return self._result

    def cancel(self) -> None:
        """Ends the run before its next step; `result` then gives what it has reached."""
        self.cancelled = True
        self._wake()

    def steer(
        self, composition: Energy, sampler: Sampler | None = None, schedule_steps: int | None = None
    ) -> None:
        """Goes on from the current states towards another composition, from the next step on.

        Weights are data: where the terms stay the same nothing is compiled or built anew. Chains
        that had diverged go on from where they were frozen. Without a sampler the kernel stays, and
        so does the place in its schedule; if the run was submitted without a sampler too, the step
        size becomes the one that suits the new composition.

        Args:
            composition: On states of the same shape and data range.
            sampler: Goes on with this one, from the beginning of its schedule. Where that begins at
                more noise than the states carry, noise is added to them: a stir, which lets chains
                leave what the last composition held them to.
            schedule_steps: Steps that its schedule takes; after them its last values stay. What is
                left of the run unless given, or the calibrated number where the run has no end.
        Raises:
            ValueError: If the composition does not suit the states, or cannot be sampled.
        """
        if not isinstance(composition, Energy):
            raise TypeError(f"`composition` must be an Energy, got {type(composition).__name__}.")
        for name in ("event_shape", "data_range"):
            old, new = getattr(self.composition, name), getattr(composition, name)
            if old != new:
                raise ValueError(
                    f"a run keeps its states: {self.composition} has {name} {old}, {composition} has {new}. "
                    "Submit it as a run of its own."
                )
        check_positive_term(composition)
        composition.check_coefficients(composition.coefficients, self.num_chains)
        if schedule_steps is not None and schedule_steps < 1:
            raise ValueError(f"`schedule_steps` must be at least 1, got {schedule_steps}.")
        if sampler is None and self.calibrated:
            calibrated_sampler(composition)  # complains here, not in the engine
        with self._changed:
            self.composition = composition
            pending = self._steering
            if sampler is None and pending is not None and pending.sampler is not None:
                self._steering = pending._replace(energy=composition)
            else:
                self._steering = Steering(composition, sampler, schedule_steps)
        self._wake()

    def frames(self) -> Iterator[Frame]:
        """What the run looks like, from now on: always the newest frame, and the last one at the end.

        Whoever looks on sets the pace: frames that are not fetched in time are left out. They come at
        most as often as `frame_every` and `frames_per_second` of the request say. Closing the
        iterator leaves the run alone.
        """
        self._wanted = True
        frame: Frame | None = None
        while (frame := self._after(frame)) is not None:
            yield frame

    def _after(self, seen: Frame | None) -> Frame | None:
        """The newest frame, once it is another than `seen`, or None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._over or self._frame is not seen)
            return None if self._frame is seen else self._frame

    # -- for the engine ------------------------------------------------------------------------------

    def watch(self, on_frame: OnFrame) -> None:
        """Calls `on_frame` with the newest frames, in a thread of its own."""

        def follow() -> None:
            try:
                for frame in self.frames():
                    if on_frame(frame) is True:
                        self.cancel()
            except BaseException as error:
                self._error = self._error or error
                self.cancel()

        self._wanted = True
        self._watcher = threading.Thread(target=follow, name="composable_ebm frames", daemon=True)
        self._watcher.start()

    @property
    def finished(self) -> bool:
        """Whether all its steps are taken, or it was told to end."""
        return self.cancelled or (self.total is not None and self.num_steps >= self.total)

    def take_steering(self) -> Steering | None:
        """What it was told to follow since this was last asked."""
        with self._changed:
            steering, self._steering = self._steering, None
        return steering

    def show(self, rows: Callable[[], Rows]) -> None:
        """Makes a frame if one is due."""
        now = time.perf_counter()
        due = self.num_steps % self._frame_every == 0 and now - self._framed_at >= self._seconds_per_frame
        if not (self._wanted and (due or self.finished)):
            return
        (state, alive, *_), level = rows(), self.block.noise_level
        # Later steps may write to the states.
        x, energy, gradient = (t.clone() for t in (state.x, state.energy, state.gradient))
        frame = Frame(self.num_steps, x, energy, gradient, level, alive.clone())
        with self._changed:
            self._frame, self._framed_at = frame, now
            self._changed.notify_all()

    def end(self, result: SampleResult | None, error: BaseException | None = None) -> None:
        """Hands over the result, or the error."""
        with self._changed:
            self._result = result
            self._error = self._error or error
            self._over = True
            self._changed.notify_all()
