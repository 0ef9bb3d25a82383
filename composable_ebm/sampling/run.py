"""A run that an `Engine` works on: how to look at it, steer it, end it, and what it gives back."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from composable_ebm.energy import Energy
from composable_ebm.sampling.block import Block, Hold, Rows, Sampler
from composable_ebm.sampling.kernel import expand
from composable_ebm.sampling.request import Request, calibrated_sampler, check_positive_term
from composable_ebm.sampling.result import SampleResult

OnFrame = Callable[["Frame"], object]

EARLY = 0.25
"""Share of the time between two frames that one may come too soon, to keep the rate that was asked for."""

__all__ = ["Frame", "OnFrame", "Pace", "Run", "Steering"]


class Frame(NamedTuple):
    """What a run looks like at a step.

    Attributes:
        step: Steps taken.
        states: (num_chains, *event).
        energies: In nats, (num_chains,), of the composition that the run follows at this step.
        gradients: ∂E/∂x, (num_chains, *event).
        noise_level: Noise that the states carry on purpose, () or (num_chains,), in data units, or None.
        alive: False for a chain that diverged and was frozen, (num_chains,).
        composition: What the run follows at this step.
        hold: The part of the states that is held with noise, if any is.
        met: Of live chains, which met the composition at the last look, (num_chains,); None without one.
    """

    step: int
    states: Tensor
    energies: Tensor
    gradients: Tensor
    noise_level: Tensor | None
    alive: Tensor
    composition: Energy
    hold: Hold | None = None
    met: Tensor | None = None

    @property
    def denoised(self) -> Tensor:
        """The states less their noise: at noise level σ the mean of the clean states given the noisy
        ones is x - σ² ∂E/∂x (Tweedie's formula). What is held is as it was given."""
        if self.noise_level is None:
            return self.states
        x = self.states - expand(self.noise_level.square(), self.states) * self.gradients
        return x if self.hold is None else self.hold.put(x, None)

    @property
    def images(self) -> Tensor:
        """The states less their noise as pictures in [-1, 1], decoded where they are latents."""
        return self.composition.images(self.denoised)


class Steering(NamedTuple):
    """What a run is to follow from its next step on."""

    energy: Energy
    sampler: Sampler | None
    schedule_steps: int | None


@dataclass(frozen=True)
class Pace:
    """How a run is shown and how fast it goes; see `Engine.submit`.

    Raises:
        ValueError: If a number makes no sense.
    """

    frame_every: int = 1
    frames_per_second: float | None = None
    steps_per_second: float | None = None
    share: float = 1.0
    alone: bool = False

    def __post_init__(self) -> None:
        if self.frame_every < 1:
            raise ValueError(f"`frame_every` must be at least 1, got {self.frame_every}.")
        for name in ("frames_per_second", "steps_per_second", "share"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"`{name}` must be positive, got {value}.")


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
        request: Request,
        pace: Pace,
        *,
        num_chains: int,
        total: int | None,
        wake: Callable[[], None],
    ) -> None:
        self.composition = block.energy
        self.num_chains = num_chains
        self.num_steps = 0
        self.cancelled = False
        # For the engine, whose thread alone touches the block.
        self.block = block
        self.request = request
        self.pace = pace
        self.total = total  # steps, warm-up included; None without an end
        self.calibrated = request.sampler is None
        self.start = time.perf_counter()
        self.shared = False
        self._wake = wake
        self._changed = threading.Condition()
        self._frame: Frame | None = None
        self._next_frame = 0.0
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
                leave what the last composition held them to. Let it begin at the `noise_level` of the
                last `frame` at least, since noise is never taken away.
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
        theirs, ours = composition.codec, self.composition.codec
        if theirs is not None and (ours is None or theirs.key != ours.key):
            raise ValueError(
                f"a run keeps its states: {composition} is about the latents of a codec, and "
                f"{self.composition} about other states. Submit it as a run of its own."
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
        self._wanted = True  # from now on, and not from the first frame asked for
        return self._followed()

    @property
    def frame(self) -> Frame | None:
        """The newest frame: the last one, or while the run goes on, one for those who look at `frames`."""
        return self._frame

    def _followed(self) -> Iterator[Frame]:
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

    @property
    def wants_frame(self) -> bool:
        """Whether a frame is due: the last one always is, also for those who look later."""
        if self.finished:
            return self._frame is None or self._frame.step != self.num_steps
        is_time = time.perf_counter() >= self._next_frame - EARLY * self._seconds_per_frame
        return self._wanted and self.num_steps % self.pace.frame_every == 0 and is_time

    def show(self, rows: Rows) -> None:
        """Makes a frame of its chains."""
        now, period, (state, alive, *_) = time.perf_counter(), self._seconds_per_frame, rows
        count = self.num_chains  # of particles the first are shown, from which the draw takes what it can
        # One that is late does not put off those after it.
        self._next_frame = (self._next_frame if now < self._next_frame + period else now) + period
        # Later steps may write to the states.
        x, energy, gradient = (t[:count].clone() for t in (state.x, state.energy, state.gradient))
        block = self.block
        frame = Frame(
            self.num_steps,
            x,
            energy,
            gradient,
            block.carried,
            alive[:count].clone(),
            block.energy,
            block.hold,
            block.met,
        )
        with self._changed:
            self._frame = frame
            self._changed.notify_all()

    @property
    def _seconds_per_frame(self) -> float:
        return 1 / self.pace.frames_per_second if self.pace.frames_per_second else 0.0

    def end(self, result: SampleResult | None, error: BaseException | None = None) -> None:
        """Hands over the result, or the error."""
        with self._changed:
            self._result = result
            self._error = self._error or error
            self._over = True
            self._changed.notify_all()
