"""What visitors have running: begun by Sample or over the API, ended by themselves or by Stop."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import gradio as gr

from composable_ebm import Energy, SampleResult, parse, sample
from composable_ebm.experts.catalogue import cards
from composable_ebm.experts.library import Library

from . import render, state
from .state import Limits, Request
from .stream import stream

FAILURES = (ValueError, OSError, RuntimeError)
"""What a request can do wrong, as sentences for whoever made it; anything else is a defect."""

_UNEXPECTED = "Something went wrong on the server; its log has the details."

_log = logging.getLogger(__name__)

__all__ = ["FAILURES", "Runs"]


class Runs:
    """The runs of all visitors, one at a time in the queue of the page.

    Args:
        library: The experts.
        limits: The most that may be asked for.
    """

    def __init__(self, library: Library, limits: Limits) -> None:
        self.library = library
        self.limits = limits
        self._stops: dict[str, threading.Event] = {}

    def warm_up(self, recipe: str) -> None:
        """Loads the experts of `recipe` and what the first step loads, so that no visitor waits for it."""
        with suppress(*FAILURES):
            sample(parse(recipe, self.library), num_chains=1, num_steps=1)

    # -- the page: outputs are (picture, report, problem, Sample, Stop) ---------------------

    def begin(self, request: gr.Request) -> tuple:
        """Makes a run that Stop can reach while it still waits in the queue: (Sample, Stop)."""
        self._stops[request.session_hash or ""] = threading.Event()
        return _buttons(running=True)

    def stop(self, request: gr.Request) -> None:
        """Ends the visitor's run at its next step; what it has reached stays on the page."""
        if (event := self._stops.get(request.session_hash or "")) is not None:
            event.set()

    def watch(self, asked: Request, session: str) -> Iterator[tuple]:
        """What the page shows while a run goes on, and after it."""
        stop = self._stops.get(session) or threading.Event()
        keep = gr.skip()
        try:
            energy = parse(asked.recipe, self.library)
            for item in stream(energy, asked, stop):
                if isinstance(item, SampleResult):
                    yield (*_finished(item, energy, asked), *_buttons(running=False))
                else:
                    line = render.caption(item.step, asked.num_steps, item.energy, item.rate)
                    picture = render.montage(item.states, data_range(energy))
                    shown = render.figure(picture, render.data_uri(picture), line, _alt(asked))
                    yield (shown, keep, keep, keep, keep)
        except FAILURES as error:
            yield (keep, keep, render.note(sentences(error)), *_buttons(running=False))
        except Exception:
            _log.exception("a run of the page failed")
            yield (keep, keep, render.note(_UNEXPECTED), *_buttons(running=False))
        finally:
            if self._stops.get(session) is stop:
                del self._stops[session]

    # -- the API ------------------------------------------------------------------------------------

    def sample(self, recipe: str, num_chains: int = 16, num_steps: int = 200, seed: int = 0) -> dict:
        """Samples a recipe: a PNG as a data URI, the energies in nats, and the report of the run."""
        try:
            asked = state.checked(recipe, num_chains, num_steps, seed, self.limits)
            energy = parse(asked.recipe, self.library)
            result = sample(
                energy,
                num_chains=asked.num_chains,
                num_steps=asked.num_steps,
                seed=asked.seed,
                on_divergence="report",
            )
        except FAILURES as error:
            raise gr.Error(sentences(error), print_exception=False) from error
        picture = render.montage(result.samples, data_range(energy))
        return {
            "png": render.data_uri(picture, result.provenance()),
            "energies": result.energies.tolist(),
            "report": result.report(),
            "problems": result.problems,
            "recipe": result.recipe,
            "seconds": result.seconds,
        }

    def experts(self) -> list[dict]:
        """The experts that recipes may name."""
        return [
            {
                "name": name,
                "attribute": card.attribute,
                "values": list(card.values),
                "event_shape": list(card.event_shape),
                "data_range": list(card.data_range),
                "metrics": dict(card.metrics),
            }
            for name, card in cards()[0].items()
        ]


def data_range(energy: Energy) -> tuple[float, float]:
    """Black and white of the pictures."""
    return energy.data_range or (-1.0, 1.0)


def sentences(error: BaseException) -> str:
    """What went wrong, with the context that was added on the way up."""
    return "\n".join([str(error), *getattr(error, "__notes__", ())])


def _finished(result: SampleResult, energy: Energy, asked: Request) -> tuple[str, str, str]:
    picture = render.montage(result.samples, data_range(energy))
    uri = render.data_uri(picture, result.provenance())
    rate = result.num_steps / result.seconds if result.seconds else 0.0
    stopped = result.num_steps < asked.num_steps
    line = render.caption(result.num_steps, asked.num_steps, float(result.energies.mean()), rate, stopped)
    name = f"samples-{time.strftime('%Y%m%d-%H%M%S')}-seed-{asked.seed}.png"
    return (
        render.figure(picture, uri, line + render.download(uri, name), _alt(asked)),
        render.report(result.report()),
        render.note(". ".join(p[0].upper() + p[1:] for p in result.problems), problem=False),
    )


def _alt(asked: Request) -> str:
    return f"{asked.num_chains} samples of {asked.recipe}"


def _buttons(running: bool) -> tuple:
    return gr.Button(interactive=not running), gr.Button(interactive=running)
