"""Pictures and the little HTML around them."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from composable_ebm.plotting import image_grid

from .terms import Term

__all__ = [
    "caption",
    "data_uri",
    "download",
    "figure",
    "live_caption",
    "montage",
    "nats",
    "note",
    "open_picture",
    "placeholder",
    "report",
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


def figure(picture: Image.Image, uri: str, line: str, alt: str) -> str:
    """The picture, scaled up by the page, with a line below it, both as HTML."""
    return (
        f'<figure class="picture"><img src="{uri}" alt="{html.escape(alt)}" '
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


def term_table(found: Sequence[Term]) -> str:
    """What each term says about the picture: a row each, with a bar where it is a probability."""
    rows = []
    for term in found:
        name = html.escape(term.name)
        if term.probability is None:
            says = "<td></td>"
        else:
            percent = f"{100 * term.probability:.0f} %"
            says = f'<td><span class="bar" style="--share: {percent.replace(" ", "")}"></span>{percent}</td>'
        rows.append(
            f'<tr><th scope="row">{name}</th><td>{term.weight:g}</td><td>{nats(term.energy)}</td>{says}</tr>'
        )
    head = "".join(
        f'<th scope="col">{label}</th>' for label in ("Expert", "Weight", "Energy (nats)", "Satisfied")
    )
    return f'<table class="terms"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'


def nats(energy: float) -> str:
    """An energy for people: a nat counts, in energies of thousands too."""
    return f"{energy:,.0f}" if abs(energy) >= 1000 else f"{energy:.3g}"


def download(uri: str, name: str) -> str:
    """A link that saves the picture; nothing is written on the server."""
    return f' · <span><a class="save" href="{uri}" download="{html.escape(name)}">Save picture</a></span>'


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
