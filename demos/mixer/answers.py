"""What the page answers when something is moved or pressed; `app` says which control asks what."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr

from composable_ebm.experts.card import Card
from composable_ebm.experts.catalogue import cards
from composable_ebm.experts.library import Library

from . import factors, look, render, starts, state
from .explore import Axis
from .palette import cannot, palette
from .runs import FAILURES, Runs, sentences, understood
from .state import Limits, Request
from .trust import doubts

_NOTHING_ON = "Turn on at least one expert."
_NO_EXPERTS = "There are no experts here. Train one, or name a folder of them in COMPOSABLE_EBM_MODELS."

__all__ = ["Answers", "about", "axes_of", "first_recipe", "opening", "steps_of"]


class Answers:
    """The functions behind the controls of one page.

    Args:
        runs: The runs of all visitors.
        library: Loads experts.
        limits: What a visitor may ask for.
    """

    def __init__(self, runs: Runs, library: Library, limits: Limits) -> None:
        self.runs, self.library, self.limits = runs, library, limits
        self.offered = cards()  # what the page was built with

    def asked(self, chosen: Any, answered: Any, recipe: Any, *counts: Any) -> Request:
        """What the controls ask for, within the limits."""
        wanted = state.wanted(state.rows(cards()[0]), chosen, answered, recipe)
        return state.clamped(wanted, *counts, self.limits)

    def open_page(self) -> tuple:
        known, damaged = now = cards()
        axes = axes_of(first_recipe(known))
        if now == self.offered:  # nothing came or went: what a quick visitor has moved already stays
            return *[gr.skip()] * 4, *axes
        return opening(known), first_recipe(known), about(known, damaged), cannot(known), *axes

    def compose(self, chosen: str, recipe: str, request: gr.Request) -> tuple:
        known = cards()[0]
        rows = state.rows(known)
        try:
            family, choices = state.chosen(rows, chosen)
        except ValueError as error:
            return gr.skip(), chosen, gr.skip(), render.note(sentences(error))
        made = state.compose(rows, choices, family)
        steps = state.moved_to(chosen)
        self.runs.steer(made, request.session_hash or "")
        said = gr.skip() if made != recipe else self.read(made, request)
        return made, chosen, (steps_of(known, made, self.limits) if steps else gr.skip()), said

    def read(self, recipe: str, request: gr.Request) -> str:
        if not recipe:
            return render.note(_NOTHING_ON)
        try:
            energy = understood(recipe, self.library)
            said = doubts(energy)
        except FAILURES as error:
            return render.note(sentences(error))
        self.runs.steer(recipe, request.session_hash or "")
        return render.note(" ".join(said), problem=False)

    def watch(
        self, chosen: Any, answered: Any, recipe: Any, request: gr.Request, *rest: Any
    ) -> Iterator[tuple]:
        *counts, start, level = rest
        yield from self.runs.watch(
            self.asked(chosen, answered, recipe, *counts), request.session_hash or "", start, level
        )

    def play(
        self, chosen: Any, answered: Any, recipe: Any, request: gr.Request, *rest: Any
    ) -> Iterator[tuple]:
        *counts, start, level = rest
        yield from self.runs.play(
            self.asked(chosen, answered, recipe, *counts), request.session_hash or "", start, level
        )

    def alone(
        self, chosen: Any, answered: Any, recipe: Any, request: gr.Request, *counts: Any
    ) -> Iterator[tuple]:
        yield from self.runs.strip(self.asked(chosen, answered, recipe, *counts), request.session_hash or "")

    def draw(
        self, chosen: Any, answered: Any, recipe: Any, request: gr.Request, *rest: Any
    ) -> Iterator[tuple]:
        *counts, across, low, high, up, lowest, highest, cells = rest
        yield from self.runs.grid(
            self.asked(chosen, answered, recipe, *counts),
            lambda: (axis_of(across, low, high, cells), axis_of(up, lowest, highest, cells)),
            request.session_hash or "",
        )

    def follow(self, recipe: str) -> Any:
        """The palette that describes a recipe, if any does."""
        rows = state.rows(cards()[0])
        found = state.decompose(rows, recipe)
        if found is None:
            return gr.skip()
        return palette(rows, found[1], found[0], secrets.token_hex(4))

    def restore(self, texts: str) -> list:
        try:
            found = state.restored(texts, self.limits)
            understood(found.recipe, self.library)
        except FAILURES as error:
            return [render.note(sentences(error)), *[gr.skip()] * 5]
        counts = [found.num_chains, found.num_steps, found.seed]
        return ["", self.follow(found.recipe), found.recipe, *counts]

    def heat(self, sent: str, chosen: Any, answered: Any, recipe: Any) -> str:
        if not sent:
            return ""
        try:
            wanted = state.wanted(state.rows(cards()[0]), chosen, answered, recipe)
            return look.heat_map(sent, understood(wanted, self.library))
        except FAILURES as error:
            return render.note(sentences(error))

    def example(self, recipe: str) -> tuple:
        try:
            energy = understood(recipe, self.library)
            family = factors.factors(recipe)[0].name.split("/")[0]
            index = secrets.randbelow(10**6)
            picture, described = starts.from_data(family, index, energy.event_shape)
        except FAILURES as error:
            return gr.skip(), render.note(sentences(error))
        return render.example(picture, described), ""

    def film(self, kind: str) -> Callable:
        def save(looked: str, request: gr.Request) -> str:
            try:
                return self.runs.film(look.chain_of(looked), kind, request.session_hash or "")
            except FAILURES as error:
                return render.note(sentences(error))

        return save


def first_recipe(known: dict[str, Card]) -> str:
    """What a visitor finds in the recipe's box."""
    rows = state.rows(known)
    return state.compose(rows, state.defaults(rows), rows[0].family) if rows else ""


def opening(known: dict[str, Card]) -> str:
    """The palette as a visitor finds it."""
    rows = state.rows(known)
    return palette(rows, state.defaults(rows), rows[0].family) if rows else ""


def steps_of(known: dict[str, Card], recipe: str, limits: Limits) -> int:
    """The steps that the experts of a recipe were calibrated with."""
    named = [each.name.split("/")[0] for each in factors.factors(recipe)]
    steps = state.steps(known).get(named[0] if named else "", state.DEFAULT_STEPS)
    return min(steps, limits.max_steps)


def axes_of(recipe: str) -> tuple:
    """The experts whose weights a grid may run over: two choices of axis."""
    named = list(dict.fromkeys(each.expert for each in factors.factors(recipe)))
    movable = named[1:] if len(named) > 2 else named
    across, up = (movable[i] if i < len(movable) else None for i in range(2))
    return gr.Dropdown(named, value=across), gr.Dropdown(named, value=up)


def axis_of(expert: Any, low: Any, high: Any, count: Any) -> Axis:
    """An axis that makes sense, whatever came."""
    low, high = (state.clamp(value, -state.MAX_WEIGHT, state.MAX_WEIGHT, 0.0) for value in (low, high))
    return Axis(str(expert or ""), low, high, int(state.clamp(count, 2, 8, 5)))


def about(known: dict[str, Card], damaged: dict[str, str]) -> str:
    """What is wrong with the experts there are."""
    problems = [*([] if known else [_NO_EXPERTS]), *(f"{n} is damaged: {why}" for n, why in damaged.items())]
    return render.note("\n".join(problems))
