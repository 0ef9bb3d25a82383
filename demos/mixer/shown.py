"""What a run changes on the page: pictures, tables and buttons, as the page's outputs."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import gradio as gr
from torch import Tensor

from composable_ebm import Energy, Frame, SampleResult
from composable_ebm.potential.plan import LeafPlan, fuse

from . import render
from .clock import FrameClock
from .state import Request
from .terms import Term, terms

TERMS_EVERY = 8  # frames
HISTORY = 200  # tables

__all__ = [
    "History",
    "Shown",
    "alt",
    "buttons",
    "data_range",
    "ended",
    "finished",
    "framed",
    "live",
    "stopped",
    "term_table",
]


class Shown(NamedTuple):
    """What changes on the page, in the order of its outputs; what is not given stays."""

    picture: Any = gr.skip()
    terms: Any = gr.skip()
    report: Any = gr.skip()
    problem: Any = gr.skip()
    play: Any = gr.skip()
    start: Any = gr.skip()
    halt: Any = gr.skip()
    grid: Any = gr.skip()
    strip: Any = gr.skip()


class History:
    """The energies of each term along a run: the last of them, by the name of the term."""

    def __init__(self) -> None:
        self._energies: dict[str, deque[float]] = {}
        self._plan: tuple[list[Hashable], LeafPlan] | None = None

    def plan(self, energy: Energy) -> LeafPlan:
        """How to evaluate the leaves of a recipe, made anew for other experts only."""
        keys = [leaf.key for leaf in energy.leaves()]
        if self._plan is None or self._plan[0] != keys:
            self._plan = keys, fuse(energy, stack=False)
        return self._plan[1]

    def add(self, found: Sequence[Term]) -> None:
        """Takes the terms of now; those that are gone from the recipe are forgotten."""
        kept = {term.name: self._energies.get(term.name, deque(maxlen=HISTORY)) for term in found}
        for term in found:
            kept[term.name].append(term.energy)
        self._energies = kept

    def of(self, name: str) -> list[float]:
        """The energies of one term, oldest first."""
        return list(self._energies.get(name, ()))


def live(frame: Frame, picture: Tensor, clock: FrameClock, history: History, said: Any) -> Shown:
    """A frame of running chains, whose `picture` is without noise; the terms now and then."""
    line = render.live_caption(frame.step, float(frame.energies.mean()), clock.rate)
    described = f"{len(picture)} running chains of {frame.composition}"
    table = term_table(frame, history) if clock.frames % TERMS_EVERY == 1 else gr.skip()
    return Shown(framed(picture, frame.composition, line, described), table, problem=said)


def finished(result: SampleResult, energy: Energy, asked: Request, history: History) -> Shown:
    """What a run of `sample` ends with."""
    rate = result.num_steps / result.seconds if result.seconds else 0.0
    is_stopped = result.num_steps < asked.num_steps
    line = render.caption(result.num_steps, asked.num_steps, float(result.energies.mean()), rate, is_stopped)
    texts = {**result.provenance(), "recipe": asked.recipe}
    found = terms(energy, result.samples)
    history.add(found)
    return ended(
        picture=_saved(result.samples, energy, line, alt(asked), texts),
        terms=render.term_table(found, history.of),
        report=render.report(result.report()),
        problem=render.note(". ".join(p[0].upper() + p[1:] for p in result.problems), problem=False),
    )


def stopped(
    frame: Frame, recipe: str, asked: Request, clock: FrameClock, history: History, problem: str
) -> Shown:
    """What running chains end with."""
    energy = frame.composition
    line = render.live_caption(frame.step, float(frame.energies.mean()), clock.rate, stopped=True)
    texts = {
        "recipe": recipe,
        "num_chains": str(asked.num_chains),
        "num_steps": str(asked.num_steps),
        "seed": str(asked.seed),
        "live": f"step {frame.step} of chains that followed a changing recipe",
    }
    described = f"{asked.num_chains} samples of {energy}"
    return ended(
        picture=_saved(frame.denoised, energy, line, described, texts),
        terms=term_table(frame, history),
        problem=render.note(problem, problem=False),
    )


def ended(**updates: Any) -> Shown:
    """The end of a run: the page may start another."""
    return Shown(**updates, **dict(zip(("play", "start", "halt"), buttons(running=False), strict=True)))


def buttons(running: bool) -> tuple:
    """(Play, Sample, Stop)"""
    idle = gr.Button(interactive=not running)
    return idle, gr.Button(interactive=not running), gr.Button(interactive=running)


def term_table(frame: Frame, history: History) -> str:
    """What each term says of running chains, and has said."""
    energy = frame.composition
    found = terms(energy, frame.states, frame.noise_level, history.plan(energy))
    history.add(found)
    return render.term_table(found, history.of)


def framed(states: Tensor, energy: Energy, line: str, described: str) -> str:
    """A picture of the states that is soon replaced by the next one."""
    picture = render.montage(states, data_range(energy))
    return render.figure(picture, render.data_uri(picture), line, described, len(states))


def alt(asked: Request) -> str:
    """What a screen reader says in place of the samples."""
    return f"{asked.num_chains} samples of {asked.recipe}"


def data_range(energy: Energy) -> tuple[float, float]:
    """Black and white of the pictures."""
    return energy.data_range or (-1.0, 1.0)


def _saved(states: Tensor, energy: Energy, line: str, described: str, texts: Mapping[str, str]) -> str:
    """The picture with a link that saves it."""
    picture = render.montage(states, data_range(energy))
    uri = render.data_uri(picture, texts)
    name = f"samples-{time.strftime('%Y%m%d-%H%M%S')}-seed-{texts['seed']}.png"
    said = f"{line} · <span>seed {int(texts['seed'])}</span>{render.download(uri, name)}"
    return render.figure(picture, uri, said, described, len(states))
