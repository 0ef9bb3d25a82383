"""The page: what a picture should be on one side, the chains on the other, from noise to pictures."""

from __future__ import annotations

import json
import secrets
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import torch

from composable_ebm import parse
from composable_ebm.experts.card import Card
from composable_ebm.experts.catalogue import cards
from composable_ebm.experts.library import Library

from . import render, state
from .runs import FAILURES, Runs, sentences
from .state import AND, NOT, Choice, Limits, Row

CSS = Path(__file__).with_name("page.css")
SCRIPT = Path(__file__).with_name("page.js")

_EDITED = "Edited by hand. Moving a control writes the recipe anew."
_NOTHING_ON = "Turn on at least one expert."
# Where a page is not served over https or to the same machine, browsers offer no clipboard.
_COPY = """(text) => {
    if (!navigator.clipboard) { window.prompt("Copy this:", text); return; }
    navigator.clipboard.writeText(text);
}"""
_NO_EXPERTS = "There are no experts here. Train one, or name a folder of them in COMPOSABLE_EBM_MODELS."

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
    page.queue(max_size=32)
    try:
        page.launch(
            server_name=host,
            server_port=port,
            auth=auth,
            share=False,
            quiet=True,
            run_history=False,
            ssr_mode=False,
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


def build(limits: Limits, device: torch.device | str = "cpu") -> gr.Blocks:
    """The page and its API, not yet served."""
    library = Library(device)
    runs = Runs(library, limits)
    known, damaged = cards()
    rows = state.rows(known)
    first = state.compose(rows, state.defaults(rows), rows[0].family) if rows else ""
    threading.Thread(target=runs.warm_up, args=(first,), daemon=True).start()
    steps = {family: min(count, limits.max_steps) for family, count in state.steps(known).items()}
    with gr.Blocks(title="Composable energies", analytics_enabled=False, fill_width=True) as page:
        gr.HTML("<h1>Composable energies</h1>", elem_classes="title")
        with gr.Row(elem_classes="columns"):
            with gr.Column(scale=5, min_width=300):
                family, controls = _expert_rows(rows)
                recipe = gr.Textbox(first, label="Recipe", lines=1, max_lines=4, elem_id="recipe")
                problem = gr.HTML(_about(known, damaged), elem_classes="notes")
                with gr.Row():
                    num_chains = gr.Slider(
                        1, limits.max_chains, min(16, limits.max_chains), step=1, label="Samples", buttons=[]
                    )
                    num_steps = gr.Slider(
                        1,
                        limits.max_steps,
                        steps[rows[0].family] if rows else state.DEFAULT_STEPS,
                        step=1,
                        label="Steps",
                        buttons=[],
                    )
                with gr.Row(elem_classes="end"):
                    seed = gr.Number(
                        0, label="Seed", precision=0, minimum=0, maximum=state.MAX_SEED, min_width=120
                    )
                    dice = gr.Button("New seed", min_width=110)
                with gr.Row(elem_classes="go"):
                    play = gr.Button("Play", variant="primary", min_width=90)
                    start = gr.Button("Sample", min_width=90)
                    halt = gr.Button("Stop", interactive=False, min_width=90)
                gr.HTML(render.open_picture(), elem_classes="open")
                dropped = gr.Textbox(label="Texts of the picture", elem_id="dropped", elem_classes="unseen")
                copied = gr.Textbox(label="Copied text", elem_classes="unseen")
            with gr.Column(scale=6, min_width=300, elem_classes="result"):
                picture = gr.HTML(render.placeholder(), elem_id="picture")
                terms = gr.HTML("", elem_classes="term-table")
                with gr.Row():
                    copies = {
                        gr.Button("Copy as Python", size="sm", min_width=120): state.as_python,
                        gr.Button("Copy as command", size="sm", min_width=120): state.as_command,
                    }
                with gr.Accordion("Report", open=False):
                    report = gr.HTML("<p>Nothing has been sampled yet.</p>")

        def read(text: str, request: gr.Request, *everything: Any) -> str:
            chosen, *values = everything
            by_hand = text != state.compose(rows, _choices(values), chosen)
            if not text and not by_hand:
                return render.note(_NOTHING_ON)
            try:
                parse(text, library)
            except FAILURES as error:
                return render.note(sentences(error))
            runs.steer(text, request)
            return render.note(_EDITED if by_hand else "", problem=False)

        def run(text: str, chains: Any, steps: Any, number: Any, request: gr.Request) -> Iterator[tuple]:
            asked = state.clamped(text, chains, steps, number, limits)
            yield from runs.watch(asked, request.session_hash or "")

        def run_live(text: str, chains: Any, steps: Any, number: Any, request: gr.Request) -> Iterator[tuple]:
            asked = state.clamped(text, chains, steps, number, limits)
            yield from runs.play(asked, request.session_hash or "")

        def follow(text: str) -> list:
            """The controls that describe a recipe, if any do."""
            if (found := state.decompose(rows, text)) is None:
                return [gr.skip()] * len(everything)
            return [found[0], *(value for choice in found[1] for value in choice)]

        def restore(text: str) -> list:
            try:
                asked = state.restored(text, limits)
                parse(asked.recipe, library)
            except FAILURES as error:
                return [render.note(sentences(error)), *[gr.skip()] * (len(everything) + 4)]
            return ["", *follow(asked.recipe), asked.recipe, asked.num_chains, asked.num_steps, asked.seed]

        quick: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        everything = [family, *controls]
        for control in everything:
            control.input(None, everything, recipe, js=_compose_script(rows), **quick)
        # Not `input`, which a text box sends for typing alone: recipes are pasted too.
        # Not `change`: a picture that is opened brings its own number of steps.
        family.input(steps.get, family, num_steps, **quick)
        dropped.change(restore, dropped, [problem, *everything, recipe, num_chains, num_steps, seed], **quick)
        page.load(None, None, None, js=SCRIPT.read_text())
        recipe.change(read, [recipe, *everything], problem, trigger_mode="always_last", **quick)
        dice.click(lambda: secrets.randbelow(10**6), None, seed, **quick)
        asking = [recipe, num_chains, num_steps, seed]
        shown = [picture, terms, report, problem, play, start, halt]
        for button, write in copies.items():
            button.click(
                lambda *numbers, write=write: write(state.clamped(*numbers, limits)), asking, copied, **quick
            ).then(None, copied, None, js=_COPY)
        slow: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        for event in (start.click, recipe.submit):
            event(runs.begin, None, [play, start, halt], **quick).then(
                run, asking, shown, concurrency_id="sampler", concurrency_limit=1, **slow
            )
        play.click(runs.begin, None, [play, start, halt], **quick).then(
            run_live, asking, shown, concurrency_id="live", concurrency_limit=limits.max_players, **slow
        )
        recipe.submit(follow, recipe, everything, **quick).then(read, [recipe, *everything], problem, **quick)
        halt.click(runs.stop, None, None, **quick)
        page.unload(runs.leave)
        gr.api(runs.sample, api_name="sample", concurrency_id="sampler", concurrency_limit=1)
        gr.api(runs.experts, api_name="experts", queue=False)
        gr.api(runs.running, api_name="running", queue=False)
    return page


def _compose_script(rows: Sequence[Row]) -> str:
    """`state.compose` for the browser.

    There, because Sample may be pressed before an answer of the server would have arrived.
    """
    known = json.dumps([[row.family, row.name, row.values, row.base, row.against] for row in rows])
    return f"""(family, ...controls) => {{
        const size = {len(Choice._fields)};
        const chosen = {known}.map((row, i) => [...row, ...controls.slice(size * i, size * (i + 1))])
            .filter(([of, name, values, base, against, on]) => of === family && on);
        const ratios = chosen.some(([of, name, values, base]) => base);
        const terms = chosen.flatMap(([of, name, values, base, against, on, value, role, weight]) => {{
            const w = base ? 1 : +Math.min(Math.max(weight, 0), {state.MAX_WEIGHT}).toPrecision(6);
            const at = values.includes(value) && value !== "{state.ANY}" ? `[${{value}}]` : "";
            if (!w || (ratios && values.length && !at)) return [];
            const term = (role === "{NOT}" && !base ? "~" : "") + name + at;
            const part = ratios && against ? `ratio(${{term}}, ${{against}})` : term;
            return [(w === 1 ? "" : `${{w}}*`) + part];
        }});
        return [terms.join(" + ")];
    }}"""


def _expert_rows(rows: Sequence[Row]) -> tuple[gr.Dropdown, list]:
    """The controls of all experts, those of one family shown at a time."""
    families = list(dict.fromkeys(row.family for row in rows))
    first = families[0] if families else None
    family = gr.Dropdown(families, value=first, label="Family", visible=len(families) > 1)
    controls: list = []
    groups = []
    for name in families:
        with gr.Column(visible=name == first, elem_classes="experts") as group:
            for row, choice in zip(rows, state.defaults(rows), strict=True):
                if row.family == name:
                    controls += _expert_row(row, choice)
        groups.append(group)
    if len(families) > 1:
        family.change(
            lambda chosen: [gr.Column(visible=name == chosen) for name in families],
            family,
            groups,
            queue=False,
            show_progress="hidden",
            api_visibility="private",
        )
    return family, controls


def _expert_row(row: Row, choice: Choice) -> list:
    name = row.label
    asked = not row.base  # a base is on or off, no more
    with gr.Group(elem_classes=["expert"] if asked else ["expert", "base"]):
        with gr.Row():
            on = gr.Checkbox(choice.on, label=name, info=row.hint or None, min_width=100, scale=2)
            role = gr.Radio(
                [AND, NOT], value=choice.role, label=f"{name} role", visible=asked, min_width=100, scale=2
            )
            weight = gr.Slider(
                0,
                state.MAX_WEIGHT,
                choice.weight,
                step=0.05,
                label=f"{name} weight",
                buttons=[],
                visible=asked,
                scale=3,
            )
        value = gr.Radio(
            list(row.values or (state.ANY,)),
            value=choice.value,
            label=f"{name} value",
            visible=bool(row.values),
            min_width=100,
        )
    return [on, value, role, weight]


def _choices(values: Sequence[Any]) -> list[Choice]:
    """Four controls a row, in the order of `_expert_row`."""
    size = len(Choice._fields)
    return [Choice(*values[i : i + size]) for i in range(0, len(values), size)]


def _about(known: dict[str, Card], damaged: dict[str, str]) -> str:
    problems = [*([] if known else [_NO_EXPERTS]), *(f"{n} is damaged: {why}" for n, why in damaged.items())]
    return render.note("\n".join(problems))
