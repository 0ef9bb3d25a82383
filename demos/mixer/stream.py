"""A run of Sample as an iterator of what it looks like now."""

from __future__ import annotations

from collections.abc import Iterator

from composable_ebm import Energy, Frame, SampleResult

from .clock import FRAMES_PER_SECOND
from .live import Submit
from .state import Request

__all__ = ["stream"]


def stream(energy: Energy, request: Request, submit: Submit) -> Iterator[Frame | SampleResult]:
    """Frames of the run while it runs, then its result, which is that of `sample`.

    The run does not wait for whoever looks on: frames that are not fetched in time are left out. It
    ends early when it is cancelled, or this iterator is closed.
    """
    run = submit(
        energy,
        request.num_chains,
        request.num_steps,
        request.seed,
        frames_per_second=FRAMES_PER_SECOND,
        alone=True,  # so that what is copied as Python makes the same picture to the last bit
        on_divergence="report",
    )
    try:
        yield from run.frames()
        yield run.result()
    finally:
        run.cancel()
