"""The page: what a picture should be on one side, the chains on the other, from noise to pictures."""

from __future__ import annotations

import importlib.util
import secrets
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
import torch
from starlette.middleware import Middleware

from composable_ebm.experts.card import Card
from composable_ebm.experts.catalogue import cards
from composable_ebm.experts.library import Library

from . import look, render, starts, state
from .answers import Answers, about, axes_of, first_recipe, opening, steps_of
from .guard import Guard
from .live import STIR
from .palette import cannot
from .runs import Runs
from .state import Limits

CSS = Path(__file__).with_name("page.css")
SCRIPT = Path(__file__).with_name("page.js")

# Where a page is not served over https or to the same machine, browsers offer no clipboard.
_COPY = """(text) => {
    if (!navigator.clipboard) { window.prompt("Copy this:", text); return; }
    navigator.clipboard.writeText(text);
}"""

# Gradio keeps a quarter of a megabyte for each visitor who was ever here, up to this many.
_SESSIONS = 200

__all__ = ["build", "serve"]


def serve(
    host: str = "127.0.0.1",
    port: int = 7860,
    auth: tuple[str, str] | None = None,
    max_chains: int = 64,
    device: torch.device | str = "cpu",
) -> None:
    """Serves the page until interrupted.

    Args:
        host: Address to serve on.
        port: Port to serve on.
        auth: User and password that a visitor must give.
        max_chains: Most samples that a visitor may ask for at once.
        device: Where to run.
    """
    page = build(Limits(max_chains), device)
    page.queue(max_size=32, api_open=False)
    try:
        page.launch(
            server_name=host,
            server_port=port,
            auth=auth,
            share=False,
            quiet=True,
            run_history=False,
            ssr_mode=False,
            max_file_size=starts.MAX_BYTES,
            state_session_capacity=_SESSIONS,
            app_kwargs={"middleware": [Middleware(Guard)]},
            # Gradio's tools ask for no password.
            mcp_server=auth is None and importlib.util.find_spec("mcp") is not None,
            footer_links=["api", "settings"],
            theme=_theme(),
            css_paths=CSS,
            prevent_thread_lock=True,
        )
    except OSError as error:
        raise OSError(f"cannot serve on {host}, port {port}; is it taken? Give another --port.") from error
    print(f"The mixer is at http://{host}:{port} until you press Ctrl+C.", flush=True)
    page.block_thread()


def _theme() -> gr.themes.Base:
    # Fonts of the visitor's machine: the page asks no other host for anything.
    theme = gr.themes.Base(
        primary_hue="teal",
        neutral_hue="stone",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )
    # White on teal 500 is hard to read.
    return theme.set(
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_800",
        slider_color="*primary_700",
        slider_color_dark="*primary_600",
        checkbox_background_color_selected="*primary_700",
        checkbox_background_color_selected_dark="*primary_600",
    )


class _Parts(NamedTuple):
    """The components of the page that events read or write."""

    palette: gr.HTML
    chosen: gr.Textbox
    answered: gr.Textbox
    recipe: gr.Textbox
    problem: gr.HTML
    num_chains: gr.Slider
    num_steps: gr.Slider
    seed: gr.Number
    dice: gr.Button
    play: gr.Button
    sample: gr.Button
    stop: gr.Button
    dropped: gr.Textbox
    picture: gr.HTML
    terms: gr.HTML
    look: gr.Textbox
    heat: gr.HTML
    alone: gr.Button
    strip: gr.HTML
    axes: list
    draw: gr.Button
    grid: gr.HTML
    films: list
    film: gr.HTML
    start: gr.Textbox
    example: gr.Button
    example_picture: gr.HTML
    level: gr.Slider
    cannot: gr.HTML
    report: gr.HTML
    copies: dict
    copied: gr.Textbox


def build(limits: Limits, device: torch.device | str = "cpu") -> gr.Blocks:
    """The page and its API, not yet served."""
    library = Library(device)
    runs = Runs(library, limits)
    known, damaged = cards()
    first = first_recipe(known)
    runs.warm_up(first)  # before the first visitor comes
    with gr.Blocks(title="Composable energies", analytics_enabled=False, fill_width=True) as page:
        gr.HTML("<h1>Composable energies</h1>", elem_classes="title")
        with gr.Row(elem_classes="columns"):
            with gr.Column(scale=5, min_width=300):
                controls = _controls(known, damaged, first, limits)
            with gr.Column(scale=6, min_width=300, elem_classes="result"):
                results = _results(known)
        _wire(page, _Parts(**controls, **results), runs, library, limits)
        gr.api(runs.sample, api_name="sample", concurrency_id="sampler", concurrency_limit=1)
        gr.api(runs.experts, api_name="experts", queue=False)
        gr.api(runs.running, api_name="running", queue=False)
    weakref.finalize(page, runs.close)
    return page


def _unseen(label: str, name: str = "") -> gr.Textbox:
    """A text that only the page's script and the server see."""
    return gr.Textbox("", label=label, elem_id=name or None, elem_classes="unseen")


def _controls(known: dict[str, Card], damaged: dict[str, str], first: str, limits: Limits) -> dict[str, Any]:
    made: dict[str, Any] = {}
    made["palette"] = gr.HTML(opening(known), elem_id="palette")
    made["recipe"] = gr.Textbox(first, label="Recipe", lines=1, max_lines=4, elem_id="recipe")
    made["problem"] = gr.HTML(about(known, damaged), elem_classes="notes")
    with gr.Row(elem_classes="numbers"):
        made["num_chains"] = gr.Slider(
            1, limits.max_chains, min(16, limits.max_chains), step=1, label="Samples", buttons=[]
        )
        made["num_steps"] = gr.Slider(
            1, limits.max_steps, steps_of(known, first, limits), step=1, label="Steps", buttons=[]
        )
    with gr.Row(elem_classes="seed"):
        made["seed"] = gr.Number(
            0, label="Seed", precision=0, minimum=0, maximum=state.MAX_SEED, min_width=120
        )
        made["dice"] = gr.Button("New seed", min_width=110, size="md")
    with gr.Row(elem_classes="go"):
        made["play"] = gr.Button("Play", variant="primary", min_width=90)
        made["sample"] = gr.Button("Sample", min_width=90)
        made["stop"] = gr.Button("Stop", interactive=False, min_width=90)
    gr.HTML(render.open_picture(), elem_classes="open")
    for name, label in (("chosen", "Controls"), ("answered", "Controls answered")):
        made[name] = _unseen(label, name)
    made["dropped"] = _unseen("Texts of the picture", "dropped")
    made["start"] = _unseen("Picture to start from", "start")
    made["look"] = _unseen("Picture to look at", "look")
    made["copied"] = _unseen("Copied text")
    return made


def _results(known: dict[str, Card]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    lowest = (
        0 if "ratio(" in first_recipe(known) else 1
    )  # without a base, something must hold each cell together
    made["picture"] = gr.HTML(render.placeholder(), elem_id="picture")
    with gr.Tabs(elem_classes="more"):
        with gr.Tab("Why"):
            made["terms"] = gr.HTML("", elem_classes="term-table")
            made["heat"] = gr.HTML(
                "<p>Choose a sample in the picture to see where each expert pushes it.</p>"
            )
            made["alone"] = gr.Button("Each expert alone, from the same noise", size="sm")
            made["strip"] = gr.HTML("", elem_id="strip")
        with gr.Tab("Explore"):
            made["axes"] = [
                *_axis("Across", lowest),
                *_axis("Up", lowest),
                gr.Slider(2, 8, 5, step=1, label="Grid cells a side"),
            ]
            made["draw"] = gr.Button("Draw grid", size="sm")
            made["grid"] = gr.HTML("", elem_id="grid")
            with gr.Row():
                made["films"] = [
                    gr.Button(f"Save run as {kind}", size="sm", min_width=120) for kind in ("GIF", "WebP")
                ]
            made["film"] = gr.HTML("", elem_id="film")
        with gr.Tab("Start from"):
            gr.HTML(render.start_panel(), elem_id="start-panel")
            made["example"] = gr.Button("A picture of the data", size="sm")
            made["example_picture"] = gr.HTML("", elem_id="example")
            made["level"] = gr.Slider(
                0.2, look.MAX_LEVEL, STIR, step=0.1, label="Noise put on the picture", buttons=[]
            )
        with gr.Tab("Report"):
            with gr.Row():
                made["copies"] = {
                    gr.Button("Copy as Python", size="sm", min_width=120): state.as_python,
                    gr.Button("Copy as command", size="sm", min_width=120): state.as_command,
                }
            made["report"] = gr.HTML("<p>Nothing has been sampled yet.</p>")
            with gr.Accordion("What these experts cannot do", open=False):
                made["cannot"] = gr.HTML(cannot(known), elem_classes="cannot")
    return made


def _axis(label: str, low: float) -> list:
    with gr.Row(elem_classes="axis"):
        return [
            gr.Dropdown([], label=f"{label}: weight of", min_width=140, scale=2, allow_custom_value=True),
            gr.Number(low, label=f"{label} from", min_width=70),
            gr.Number(8, label=f"{label} to", min_width=70),
        ]


def _wire(page: gr.Blocks, at: _Parts, runs: Runs, library: Library, limits: Limits) -> None:
    """What happens when something is moved or pressed."""
    quick: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
    slow: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    text = [at.chosen, at.answered, at.recipe]
    numbers = [at.num_chains, at.num_steps, at.seed]
    shown = [at.picture, at.terms, at.report, at.problem, at.play, at.sample, at.stop, at.grid, at.strip]
    answers = Answers(runs, library, limits)

    page.load(None, None, None, js=SCRIPT.read_text())
    opened = [at.palette, at.recipe, at.problem, at.cannot, at.axes[0], at.axes[3]]
    page.load(answers.open_page, None, opened, **quick)
    at.chosen.change(
        answers.compose,
        [at.chosen, at.recipe],
        [at.recipe, at.answered, at.num_steps, at.problem],
        trigger_mode="always_last",
        **quick,
    )
    # Not `input`, which a text box sends for typing alone: recipes are pasted too.
    at.recipe.change(answers.read, at.recipe, at.problem, trigger_mode="always_last", **quick)
    at.recipe.change(axes_of, at.recipe, [at.axes[0], at.axes[3]], trigger_mode="always_last", **quick)
    at.recipe.submit(answers.follow, at.recipe, at.palette, **quick)
    at.dropped.change(answers.restore, at.dropped, [at.problem, at.palette, at.recipe, *numbers], **quick)
    at.dice.click(lambda: secrets.randbelow(10**6), None, at.seed, **quick)
    at.stop.click(runs.stop, None, None, **quick)
    at.look.change(answers.heat, [at.look, *text], at.heat, trigger_mode="always_last", **quick)
    at.example.click(answers.example, at.recipe, [at.example_picture, at.problem], **quick)
    for button, kind in zip(at.films, ("gif", "webp"), strict=True):
        button.click(answers.film(kind), at.look, at.film, **quick)
    for button, write in at.copies.items():
        button.click(
            lambda *values, write=write: write(answers.asked(*values)), [*text, *numbers], at.copied, **quick
        ).then(None, at.copied, None, js=_COPY)

    def runs_as(event: Callable, function: Callable, inputs: list, **queue: Any) -> None:
        event(runs.begin, None, [at.play, at.sample, at.stop], **quick).then(
            function, inputs, shown, **queue, **slow
        )

    one = {"concurrency_id": "sampler", "concurrency_limit": 1}
    begun = [*text, *numbers, at.start, at.level]
    for event in (at.sample.click, at.recipe.submit):
        runs_as(event, answers.watch, begun, **one)
    runs_as(at.play.click, answers.play, begun, concurrency_id="live", concurrency_limit=limits.max_players)
    runs_as(at.alone.click, answers.alone, [*text, *numbers], **one)
    runs_as(at.draw.click, answers.draw, [*text, *numbers, *at.axes], **one)
    page.unload(runs.leave)
