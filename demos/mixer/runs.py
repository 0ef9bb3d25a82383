"""What visitors have running: begun by Sample or over the API, ended by themselves or by Stop."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import gradio as gr
from torch import Tensor

from composable_ebm import Energy, SampleResult, parse, sample
from composable_ebm.experts.catalogue import cards
from composable_ebm.experts.library import Library

from . import render, state
from .live import Live
from .state import Limits, Request
from .stream import stream
from .terms import terms

FRAMES_PER_SECOND = 16
STEPS_PER_FRAME = 2
TERMS_EVERY = 8  # frames
MAX_PLAY_SECONDS = 600.0  # without a change, as for a forgotten tab

FAILURES = (ValueError, OSError, RuntimeError)
"""What a request can do wrong, as sentences for whoever made it; anything else is a defect."""

_UNEXPECTED = "Something went wrong on the server; its log has the details."

_log = logging.getLogger(__name__)

__all__ = ["FAILURES", "Runs"]


class Shown(NamedTuple):
    """What changes on the page, in the order of its outputs; what is not given stays."""

    picture: Any = gr.skip()
    terms: Any = gr.skip()
    report: Any = gr.skip()
    problem: Any = gr.skip()
    play: Any = gr.skip()
    start: Any = gr.skip()
    halt: Any = gr.skip()


class Session:
    """A visitor's run: how it is told to stop, and the recipe that it follows."""

    def __init__(self) -> None:
        self.stop = threading.Event()
        self.recipe: str | None = None


class Runs:
    """The runs of all visitors, one a visitor.

    Args:
        library: The experts.
        limits: The most that may be asked for.
    """

    def __init__(self, library: Library, limits: Limits) -> None:
        self.library = library
        self.limits = limits
        self._sessions: dict[str, Session] = {}

    def warm_up(self, recipe: str) -> None:
        """Loads the experts of `recipe` and what the first step loads, so that no visitor waits for it."""
        with suppress(*FAILURES):
            sample(parse(recipe, self.library), num_chains=1, num_steps=1)

    # -- the page -----------------------------------------------------------------------------------

    def begin(self, request: gr.Request) -> tuple:
        """Makes a run that Stop can reach while it still waits in the queue: (Play, Sample, Stop)."""
        self.stop(request)
        self._sessions[request.session_hash or ""] = Session()
        return _buttons(running=True)

    def stop(self, request: gr.Request) -> None:
        """Ends the visitor's run at its next step; what it has reached stays on the page."""
        if (session := self._sessions.get(request.session_hash or "")) is not None:
            session.stop.set()

    def leave(self, request: gr.Request) -> None:
        """Ends the run of a visitor who has closed the page, one that still waits in the queue too."""
        self.stop(request)
        self._sessions.pop(request.session_hash or "", None)

    def steer(self, recipe: str, request: gr.Request) -> None:
        """Has the visitor's chains, if they play, follow another recipe."""
        if (session := self._sessions.get(request.session_hash or "")) is not None:
            session.recipe = recipe

    def watch(self, asked: Request, visitor: str) -> Iterator[Shown]:
        """What the page shows while `sample` runs, and after it."""
        session = self._sessions.get(visitor) or Session()
        yield from self._guarded(self._sampled(asked, session), session, visitor)

    def play(self, asked: Request, visitor: str) -> Iterator[Shown]:
        """What the page shows while chains run on and on, following the recipe, until Stop."""
        session = self._sessions.get(visitor) or Session()
        yield from self._guarded(self._played(asked, session), session, visitor)

    def _guarded(self, updates: Iterator[Shown], session: Session, visitor: str) -> Iterator[Shown]:
        try:
            for shown in updates:
                if self._sessions.get(visitor, session) is not session:
                    break  # another run of this visitor has the page now
                yield shown
        except FAILURES as error:
            yield _ended(problem=render.note(sentences(error)))
        except Exception:
            _log.exception("a run of the page failed")
            yield _ended(problem=render.note(_UNEXPECTED))
        finally:
            session.stop.set()
            if self._sessions.get(visitor) is session:
                del self._sessions[visitor]

    def _sampled(self, asked: Request, session: Session) -> Iterator[Shown]:
        energy = parse(asked.recipe, self.library)
        for item in stream(energy, asked, session.stop):
            if isinstance(item, SampleResult):
                yield _finished(item, energy, asked)
            else:
                line = render.caption(item.step, asked.num_steps, item.energy, item.rate)
                yield Shown(_framed(item.states, energy, line, _alt(asked)))

    def _played(self, asked: Request, session: Session) -> Iterator[Shown]:
        recipe = followed = asked.recipe
        energy = parse(recipe, self.library)
        live = Live(energy, asked.num_chains, asked.seed, self.library.device)
        clock = FrameClock()
        steered = time.monotonic()
        problem = told = ""
        while not session.stop.is_set():
            if (wanted := session.recipe) not in (None, recipe):
                recipe, steered = wanted, time.monotonic()
                try:
                    energy = parse(recipe, self.library)
                    if live.fits(energy):
                        live.steer(energy)
                    else:
                        live = Live(energy, asked.num_chains, asked.seed, self.library.device)
                    followed, problem = recipe, ""
                except FAILURES as error:  # the chains go on with what they had
                    problem = sentences(error)
            clock.fill(live.step)
            if (lost := int(live.chain.divergence().chains.sum())) and not problem:
                problem = (
                    f"{lost} of {asked.num_chains} chains diverged and were frozen; try smaller weights."
                )
            # Said once: what `read` has to say about the recipe stands in the same place.
            said = gr.skip() if problem == told else render.note(problem)
            told = problem
            yield self._live(live, asked, clock, said)
            clock.wait(session.stop)
            if time.monotonic() - steered > MAX_PLAY_SECONDS:
                problem = "Stopped, as nothing was moved for a while. Press Play to go on."
                break
        yield _stopped(live, followed, asked, clock, problem)

    def _live(self, live: Live, asked: Request, clock: FrameClock, said: Any) -> Shown:
        line = render.live_caption(live.num_steps, float(live.chain.state.energy.mean()), clock.rate)
        alt = f"{asked.num_chains} running chains of {live.energy}"
        table = _term_table(live) if clock.frames % TERMS_EVERY == 1 else gr.skip()
        return Shown(_framed(live.picture, live.energy, line, alt), table, problem=said)

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

    def running(self) -> int:
        """How many visitors have chains running, or waiting to."""
        return len(self._sessions)

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


class FrameClock:
    """Paces frames: as many as can be seen, no more."""

    def __init__(self) -> None:
        self.frames = 0
        self._times: deque[float] = deque([time.perf_counter()], maxlen=FRAMES_PER_SECOND + 1)

    @property
    def rate(self) -> float:
        """Frames a second, over the last few."""
        passed = self._times[-1] - self._times[0]
        return (len(self._times) - 1) / passed if passed else 0.0

    def fill(self, step: Callable[[], None]) -> None:
        """Takes the steps of one frame: one at least, no more than there is time for."""
        for _ in range(STEPS_PER_FRAME):
            step()
            if time.perf_counter() - self._times[-1] > 0.5 / FRAMES_PER_SECOND:
                break
        self.frames += 1

    def wait(self, stop: threading.Event) -> None:
        """Until the next frame is due."""
        stop.wait(max(0.0, self._times[-1] + 1 / FRAMES_PER_SECOND - time.perf_counter()))
        self._times.append(time.perf_counter())


def _framed(states: Tensor, energy: Energy, line: str, alt: str) -> str:
    picture = render.montage(states, data_range(energy))
    return render.figure(picture, render.data_uri(picture), line, alt)


def _saved(states: Tensor, energy: Energy, line: str, alt: str, texts: Mapping[str, str]) -> str:
    """The picture with a link that saves it."""
    picture = render.montage(states, data_range(energy))
    uri = render.data_uri(picture, texts)
    name = f"samples-{time.strftime('%Y%m%d-%H%M%S')}-seed-{texts['seed']}.png"
    return render.figure(picture, uri, line + render.download(uri, name), alt)


def _finished(result: SampleResult, energy: Energy, asked: Request) -> Shown:
    rate = result.num_steps / result.seconds if result.seconds else 0.0
    stopped = result.num_steps < asked.num_steps
    line = render.caption(result.num_steps, asked.num_steps, float(result.energies.mean()), rate, stopped)
    return _ended(
        picture=_saved(
            result.samples, energy, line, _alt(asked), {**result.provenance(), "recipe": asked.recipe}
        ),
        terms=render.term_table(terms(energy, result.samples)),
        report=render.report(result.report()),
        problem=render.note(". ".join(p[0].upper() + p[1:] for p in result.problems), problem=False),
    )


def _stopped(live: Live, recipe: str, asked: Request, clock: FrameClock, problem: str) -> Shown:
    mean = float(live.chain.state.energy.mean())
    line = render.live_caption(live.num_steps, mean, clock.rate, stopped=True)
    texts = {
        "recipe": recipe,
        "num_chains": str(asked.num_chains),
        "num_steps": str(asked.num_steps),
        "seed": str(asked.seed),
        "live": f"step {live.num_steps} of chains that followed a changing recipe",
    }
    return _ended(
        picture=_saved(
            live.picture, live.energy, line, f"{asked.num_chains} samples of {live.energy}", texts
        ),
        terms=_term_table(live),
        problem=render.note(problem, problem=False),
    )


def _term_table(live: Live) -> str:
    plan = live.chain.potential.plan
    return render.term_table(terms(live.energy, live.chain.x, live.noise_level, plan))


def _alt(asked: Request) -> str:
    return f"{asked.num_chains} samples of {asked.recipe}"


def _ended(**shown: Any) -> Shown:
    return Shown(**shown, **dict(zip(("play", "start", "halt"), _buttons(running=False), strict=True)))


def _buttons(running: bool) -> tuple:
    """(Play, Sample, Stop)"""
    idle = gr.Button(interactive=not running)
    return idle, gr.Button(interactive=not running), gr.Button(interactive=running)
