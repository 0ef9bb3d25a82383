"""Pictures and the little HTML around them."""

from __future__ import annotations

import base64
import html
import io
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from composable_ebm.plotting import image_grid

from .heat import Push
from .state import Request
from .terms import Term

_EXPERT = re.compile(r"(~?)(?:\w+/)*([A-Za-z_]\w*)(\[\w+\])?", re.ASCII)

__all__ = [
    "caption",
    "data_uri",
    "download",
    "example",
    "figure",
    "film_link",
    "heat_maps",
    "live_caption",
    "montage",
    "nats",
    "note",
    "open_picture",
    "picture_of",
    "placeholder",
    "report",
    "sparkline",
    "start_panel",
    "strip",
    "table_of",
    "term_table",
]


def montage(states: Tensor, data_range: tuple[float, float]) -> Image.Image:
    """Images (batch, 1 or 3, height, width) as one picture, about square.

    Raises:
        ValueError: If the states are no images.
    """
    low, high = data_range
    grid = image_grid((states - low) / (high - low) * 2 - 1, padding=1, background=128)
    return Image.fromarray(grid[1:-1, 1:-1])


def data_uri(picture: Image.Image, texts: Mapping[str, str] | None = None) -> str:
    """The picture as the address of a PNG that carries `texts`."""
    info = PngInfo()
    for key, text in (texts or {}).items():
        info.add_itxt(key, text)
    buffer = io.BytesIO()
    # Level 1: a live frame is thrown away 60 ms later.
    picture.save(buffer, "PNG", pnginfo=info, compress_level=6 if texts else 1)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def figure(picture: Image.Image, uri: str, line: str, alt: str, count: int = 1) -> str:
    """The picture of `count` chains, scaled up by the page, with a line below it, both as HTML."""
    return (
        f'<figure class="picture"><img src="{uri}" alt="{html.escape(alt)}" data-count="{count}" '
        f'width="{picture.width}" height="{picture.height}">'
        f"<figcaption>{line}</figcaption></figure>"
    )


def placeholder() -> str:
    """What is shown before the first picture."""
    blank = '<div class="blank">Press Play or Sample</div>'
    return f'<figure class="picture">{blank}<figcaption>&nbsp;</figcaption></figure>'


def open_picture() -> str:
    """A way to choose a saved picture; it may be dropped on the page as well."""
    field = '<input type="file" id="open-picture" accept="image/png">'
    return f"<label>Restore from a saved picture: drop it here, or {field}</label>"


def start_panel() -> str:
    """Where a picture to start from is chosen and painted on; the page's script does the rest."""
    return (
        '<div class="start-panel">'
        '<div class="easel"><canvas id="easel" width="256" height="256" tabindex="0" role="application" '
        'aria-label="Picture to start from. Arrow keys move the brush, Space paints, Backspace erases." '
        "></canvas></div>"
        '<div class="start-controls">'
        '<p id="start-says" role="status">Chains start from noise.</p>'
        '<label class="file">An image of yours: <input type="file" id="start-file" accept="image/*"></label>'
        '<div class="line"><button type="button" id="start-chain">The chosen sample</button>'
        '<button type="button" id="start-noise">Noise again</button></div>'
        '<div class="line"><label>Brush <input type="range" id="brush" min="1" max="8" value="3" '
        'aria-label="Brush size"></label><button type="button" id="unpaint">Clear paint</button></div>'
        "<p>Paint over the part that may change; the rest stays as it is. Unpainted, all of it may "
        "change a little.</p></div></div>"
    )


def example(state: Tensor, described: str) -> str:
    """A picture of the data, [-1, 1], for the page's script to start from."""
    uri = picture_of(state, (-1.0, 1.0))
    return f'<img class="example" hidden alt="{html.escape(described)}" src="{uri}">'


def picture_of(state: Tensor, data_range: tuple[float, float]) -> str:
    """One state, (channels, height, width), as a data URI of its own size."""
    return data_uri(montage(state[None], data_range))


def caption(step: int, total: int, energy: float, rate: float, stopped: bool = False) -> str:
    """Where the run is, in a line."""
    where = f"stopped at step {step}" if stopped else f"step {step}"
    parts = (f"{where} of {total}", f"mean energy {nats(energy)} nats", f"{rate:.0f} steps/s")
    return " · ".join(f"<span>{part}</span>" for part in parts)


def live_caption(step: int, energy: float, rate: float, stopped: bool = False) -> str:
    """Where chains without an end are, in a line."""
    where = f"stopped at step {step}" if stopped else f"step {step}"
    parts = (where, f"mean energy {nats(energy)} nats", f"{rate:.0f} frames/s")
    return " · ".join(f"<span>{part}</span>" for part in parts)


def term_table(found: Sequence[Term], history: Callable[[str], Sequence[float]]) -> str:
    """What each term says about the picture: a row each, with its energy along the run, and a bar where
    it is a probability."""
    rows = []
    for term in found:
        name = html.escape(term.name)
        if term.probability is None:
            says = "<td></td>"
        else:
            percent = f"{100 * term.probability:.0f} %"
            says = f'<td><span class="bar" style="--share: {percent.replace(" ", "")}"></span>{percent}</td>'
        rows.append(
            f'<tr><th scope="row">{name}</th><td>{term.weight:g}</td><td>{nats(term.energy)}</td>'
            f"<td>{sparkline(history(term.name))}</td>{says}</tr>"
        )
    head = "".join(
        f'<th scope="col">{label}</th>'
        for label in ("Expert", "Weight", "Energy (nats)", "Along the chain", "Satisfied")
    )
    return f'<table class="terms"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'


def sparkline(values: Sequence[float], width: int = 120, height: int = 26) -> str:
    """Energies along a run as a line, between its lowest and its highest."""
    known = [value for value in values if math.isfinite(value)]
    if len(known) < 2:
        return ""
    low, high = min(known), max(known)
    span = (high - low) or 1.0
    points = " ".join(
        f"{width * i / (len(known) - 1):.1f},{2 + (height - 4) * (high - value) / span:.1f}"
        for i, value in enumerate(known)
    )
    label = f"from {nats(known[0])} to {nats(known[-1])} nats, between {nats(low)} and {nats(high)}"
    return (
        f'<svg class="spark" viewBox="0 0 {width} {height}" role="img" aria-label="{label}">'
        f'<title>{label}</title><polyline points="{points}"/></svg>'
    )


def heat_maps(found: Sequence[Push], chain: int) -> str:
    """Where each term pushes the chosen picture, with its share of all pushes."""
    total = sum(push.strength for push in found) or 1.0
    figures = "".join(
        f'<figure><img src="{data_uri(push.picture)}" alt="Where {_short(push.name)} pushes" '
        f'width="{push.picture.width}" height="{push.picture.height}"><figcaption>{_short(push.name)}'
        f"<br>{100 * push.strength / total:.0f} % of the push</figcaption></figure>"
        for push in found
    )
    return (
        f"<p>Where each expert pushes sample {chain + 1}, seen through noise: "
        '<span class="brighter">red</span> brighter, <span class="darker">blue</span> darker.</p>'
        f'<div class="row-of-pictures">{figures}</div>'
    )


def _short(term: str) -> str:
    """The experts of a term without their families; those of an OR are joined by it."""
    found = _EXPERT.findall(term)
    named = dict.fromkeys(sign + name + value for sign, name, value in found if value != "[any]")
    return html.escape(" or ".join(named) or term)


def strip(labels: Sequence[str], samples: Tensor, data_range: tuple[float, float]) -> str:
    """A mix beside each of its experts alone."""
    figures = "".join(
        f'<figure><img class="pixels" src="{picture_of(sample, data_range)}" '
        f'alt="{html.escape(label)}"><figcaption>{html.escape(label)}</figcaption></figure>'
        for label, sample in zip(labels, samples, strict=False)
    )
    return f'<div class="row-of-pictures">{figures}</div>'


def table_of(picture: Image.Image, asked: Request, step: int, done: bool) -> str:
    """A grid over two weights, with a link that saves it when it is done."""
    texts = {"recipe": asked.recipe, "seed": str(asked.seed), "num_steps": str(asked.num_steps)}
    uri = data_uri(picture, texts if done else None)
    line = f"<span>step {step} of {asked.num_steps}</span>"
    line += download(uri, f"grid-seed-{asked.seed}.png", "Save grid") if done else ""
    described = f"Grid of samples over two weights of {html.escape(asked.recipe)}"
    return f'<figure class="grid"><img src="{uri}" alt="{described}"><figcaption>{line}</figcaption></figure>'


def film_link(content: bytes, kind: str) -> str:
    """A link that saves an animation; the page's script follows it."""
    uri = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    name = f"chain-{time.strftime('%Y%m%d-%H%M%S')}.{kind}"
    return (
        f'<a class="save film" href="{uri}" download="{name}">Save {kind.upper()}, '
        f"{len(content) / 1000:.0f} kB</a>"
    )


def nats(energy: float) -> str:
    """An energy for people: a nat counts, in energies of thousands too."""
    return f"{energy:,.0f}" if abs(energy) >= 1000 else f"{energy:.3g}"


def download(uri: str, name: str, label: str = "Save picture") -> str:
    """A link that saves the picture; nothing is written on the server."""
    return f' · <span><a class="save" href="{uri}" download="{html.escape(name)}">{label}</a></span>'


def report(text: str) -> str:
    """A run's report."""
    return f'<pre class="report" tabindex="0">{html.escape(text)}</pre>'


def note(text: str, problem: bool = True) -> str:
    """A sentence beside the controls, or nothing."""
    if not text:
        return ""
    first, *rest = text.split("\n")
    # A recipe's error points at the place, in lines that need a fixed width.
    place = f"<pre>{html.escape(chr(10).join(rest))}</pre>" if rest else ""
    role = "alert" if problem else "status"
    return f'<div class="note {role}" role="{role}">{html.escape(first)}{place}</div>'
