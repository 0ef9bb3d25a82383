"""A running `sample` as an iterator of what it looks like now."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import NamedTuple

from torch import Tensor

from composable_ebm import Chain, Energy, SampleResult, sample

from .state import Request

SECONDS_PER_FRAME = 0.06

__all__ = ["Frame", "denoised", "stream"]


class Frame(NamedTuple):
    """What the chains look like: `rate` is in steps a second."""

    step: int
    states: Tensor
    energy: float
    rate: float


def denoised(chain: Chain) -> Tensor:
    """What the chains look like: their states, less the noise that they carry on purpose.

    At noise level σ the mean of clean states given a noisy one is x - σ² ∂E/∂x (Tweedie's formula).
    """
    sigma = chain.potential.noise_level
    return chain.x if sigma is None else chain.x - sigma.square() * chain.state.gradient


def stream(energy: Energy, request: Request, stop: threading.Event) -> Iterator[Frame | SampleResult]:
    """Frames of the run while it runs, then its result.

    The run goes on in a thread of its own and does not wait for whoever looks on: frames that are
    not fetched in time are left out. It ends early when `stop` is set, or this iterator is closed.
    """
    frames: SimpleQueue[Frame | None] = SimpleQueue()
    start = shown = time.perf_counter()

    def follow(step: int, chain: Chain) -> bool:
        nonlocal shown
        now = time.perf_counter()
        if step == 1 or now - shown >= SECONDS_PER_FRAME:
            shown = now
            frames.put(Frame(step, denoised(chain), float(chain.state.energy.mean()), step / (now - start)))
        return stop.is_set()

    with ThreadPoolExecutor(1) as executor:
        run = executor.submit(
            sample,
            energy,
            num_chains=request.num_chains,
            num_steps=request.num_steps,
            seed=request.seed,
            callback=follow,
            on_divergence="report",
        )
        run.add_done_callback(lambda _: frames.put(None))
        try:
            while (frame := _newest(frames)) is not None:
                yield frame
            yield run.result()
        finally:
            stop.set()


def _newest(frames: SimpleQueue[Frame | None]) -> Frame | None:
    frame = frames.get()
    while frame is not None and not frames.empty():
        frame = frames.get()
    return frame
