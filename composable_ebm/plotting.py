"""The few pictures that the package draws by itself: traces, grids of samples, training curves.

Matplotlib is loaded by the first figure, not by the import. Figures are made without pyplot, so no
backend is chosen and no global setting is touched; files appear whole or not at all.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "BLUE",
    "GREEN",
    "GREY",
    "INK",
    "ORANGE",
    "PURPLE",
    "RED",
    "figure",
    "image_grid",
    "plot_trace",
    "plot_training",
    "save_figure",
    "save_grid",
]

# One meaning each, in every picture: blue what is true or data, orange what is sampled.
INK, GREY = "#1f2d3a", "#93a1ad"
BLUE, ORANGE, GREEN, PURPLE, RED = "#2b6ca3", "#d9772b", "#3f9268", "#7d5ba6", "#b8433a"

STYLE = {
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 10.5,
    "axes.titleweight": "medium",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6eaed",
    "grid.linewidth": 0.8,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
}
DPI = 130

# Panels of a training's picture: title, then metric -> (label, colour).
PANELS: tuple[tuple[str, dict[str, tuple[str, str]]], ...] = (
    (
        "Energy (nats)",
        {"energy_positive": ("data", BLUE), "energy_negative": ("chains", ORANGE)},
    ),
    ("Energy gap, chains minus data (nats)", {"energy_gap": ("", PURPLE)}),
    (
        "Held-out energy (nats)",
        {"heldout_energy": ("held-out data", BLUE), "noise_energy": ("uniform noise", GREY)},
    ),
    (
        "Held-out data minus noise (nats)",
        {"heldout_cd": ("", GREEN), "heldout_gap": ("", GREEN)},
    ),
    ("Held-out accuracy", {"heldout_accuracy": ("", GREEN)}),
    ("Loss", {"loss": ("loss", INK), "cross_entropy": ("cross-entropy of the labels", RED)}),
)


def figure(
    rows: int, columns: int, width: float, height: float, **subplots: Any
) -> tuple[Figure, np.ndarray]:
    """An empty figure in the package's look, and its axes, (rows, columns).

    Args:
        rows: Rows of axes.
        columns: Columns of axes.
        width: Inches.
        height: Inches.
        subplots: Passed to `Figure.subplots`, such as `sharex=True`.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
        fig = Figure(figsize=(width, height), layout="constrained", facecolor="white")
        fig.get_layout_engine().set(w_pad=0.09, h_pad=0.07)  # type: ignore[union-attr, call-arg]
        axes = fig.subplots(rows, columns, squeeze=False, **subplots)
    return fig, axes


def save_figure(fig: Figure, path: str | Path, dpi: int = DPI) -> None:
    """Writes a figure in the package's look; the suffix of `path` chooses the format."""
    import matplotlib

    with matplotlib.rc_context(STYLE), _whole(path) as temporary:  # type: ignore[arg-type]
        fig.savefig(temporary, dpi=dpi)


def image_grid(
    images: Tensor,
    columns: int | None = None,
    *,
    padding: int = 2,
    scale: int = 1,
    background: int = 255,
) -> np.ndarray:
    """Images side by side, row by row, as one RGB image, (height, width, 3) in bytes.

    Args:
        images: In [-1, 1], shape (batch, 1 or 3, height, width). Values outside are clipped, and
            those that are not a number are mid-grey.
        columns: Images a row; about a square unless given.
        padding: Pixels around each image.
        scale: Each pixel becomes a square of this side.
        background: Grey level between the images, 0 to 255.
    Raises:
        ValueError: If there are no images, or they are not of this shape.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3) or not len(images):
        raise ValueError(
            f"`images` must have shape (batch, 1 or 3, height, width), got {tuple(images.shape)}."
        )
    if columns is not None and columns < 1:
        raise ValueError(f"`columns` must be at least 1, got {columns}.")
    count, _, height, width = images.shape
    columns = min(count, columns or math.ceil(math.sqrt(count)))
    pixels = images.detach().float().nan_to_num(nan=0.0).clamp(-1, 1).add(1).mul(127.5).round()
    tiles = pixels.byte().permute(0, 2, 3, 1).cpu().numpy().repeat(scale, axis=1).repeat(scale, axis=2)
    rows, cell = math.ceil(count / columns), (height * scale + padding, width * scale + padding)
    canvas = np.full((rows * cell[0] + padding, columns * cell[1] + padding, 3), background, dtype=np.uint8)
    for i, tile in enumerate(tiles):
        top, left = (i // columns) * cell[0] + padding, (i % columns) * cell[1] + padding
        canvas[top : top + height * scale, left : left + width * scale] = tile
    return canvas


def save_grid(
    images: Tensor,
    path: str | Path,
    columns: int | None = None,
    metadata: Mapping[str, str] | None = None,
    *,
    scale: int = 2,
) -> None:
    """Writes `image_grid` as a PNG, with text such as recipe, seed and settings inside the file.

    `PIL.Image.open(path).text` gives the text back.

    Args:
        images: In [-1, 1], shape (batch, 1 or 3, height, width).
        path: File to write.
        columns: Images a row; about a square unless given.
        metadata: Keys of at most 79 Latin characters, and their text.
        scale: Each pixel becomes a square of this side.
    """
    info = PngInfo()
    for key, text in (metadata or {}).items():
        info.add_text(key, text)
    image = Image.fromarray(image_grid(images, columns, scale=scale))
    with _whole(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)


def plot_trace(
    energy: Tensor, gradient_norm: Tensor, acceptance: Tensor | None, title: str, path: str | Path
) -> None:
    """Draws energy, gradient norm and (where steps can be refused) acceptance along the chains.

    Lines are means over chains, bands hold 90 % of the chains.

    Args:
        energy: In nats, (steps, chains).
        gradient_norm: In nats per data unit, (steps, chains).
        acceptance: Probability of acceptance, (steps, chains), or None where every step is taken.
        title: Over the panels.
        path: Image file to write.
    Raises:
        ValueError: If the trace is empty.
    """
    if not len(energy):
        raise ValueError("the trace is empty: the run took no step.")
    panels = [("Energy (nats)", energy, BLUE), ("Gradient norm", gradient_norm, PURPLE)]
    if acceptance is not None:
        panels.append(("Acceptance", acceptance, GREEN))
    fig, axes = figure(len(panels), 1, 7.5, 0.6 + 1.75 * len(panels), sharex=True)
    for ax, (label, values, colour) in zip(axes[:, 0], panels, strict=True):
        table = values.detach().double().cpu().numpy()
        low, high = np.quantile(table, [0.05, 0.95], axis=1)
        steps = np.arange(1, len(table) + 1)
        ax.fill_between(steps, low, high, color=colour, alpha=0.16, linewidth=0)
        ax.plot(steps, table.mean(axis=1), color=colour, linewidth=1.4)
        ax.set_title(label, loc="left")
        ax.margins(x=0.01)
    if acceptance is not None:
        axes[2, 0].set_ylim(-0.03, 1.03)
    positive = gradient_norm[gradient_norm > 0]
    if len(positive) and positive.max() > 50 * positive.median():
        axes[1, 0].set_yscale("log")
    axes[-1, 0].set_xlabel(f"step   (mean and 90 % band of {energy.shape[1]} chains)")
    fig.suptitle(_shorten(title, 90), x=0.01, ha="left", fontsize=11.5, color=INK)
    save_figure(fig, path)


def plot_training(metrics_path: str | Path, path: str | Path) -> None:
    """Draws the curves of a training from its `metrics.jsonl`, while it runs or afterwards.

    Args:
        metrics_path: Lines of JSON, each with "step" and named numbers. A line may hold only some
            of them; one that is still being written is left out.
        path: Picture to write.
    Raises:
        ValueError: If there is nothing known to draw.
    """
    records = _read_metrics(Path(metrics_path))
    curves = {
        name: [(r["step"], r[name]) for r in records if name in r] for _, names in PANELS for name in names
    }
    panels = [(title, names) for title, names in PANELS if any(curves[name] for name in names)]
    if not panels:
        known = ", ".join(curves)
        raise ValueError(f"{metrics_path} holds none of the metrics that are drawn: {known}.")
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    fig, axes = figure(rows, columns, 4.6 * columns, 0.5 + 2.1 * rows)
    first, last = (end(record["step"] for record in records) for end in (min, max))
    margin = max(1.0, 0.01 * (last - first))
    for ax in axes.flat[len(panels) :]:
        ax.axis("off")
    for ax, (title, names) in zip(axes.flat, panels, strict=False):
        for name, (label, colour) in names.items():
            if curves[name]:
                steps, values = np.array(curves[name], dtype=float).T
                smooth = _smooth(values)
                if len(values) > 40:
                    ax.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
                mark = {"marker": "o", "markersize": 3} if len(values) <= 40 else {}
                ax.plot(steps, smooth, color=colour, label=label, **mark)
        _leave_out_the_first_plunge(ax, [v for name in names for _, v in curves[name]])
        ax.set_title(title, loc="left")
        ax.set_xlim(first - margin, last + margin)
        if "energy_gap" in names:
            ax.axhline(0, color=INK, linewidth=0.8)
        if len([n for n in names if curves[n]]) > 1:
            ax.legend(frameon=False, labelcolor=INK, fontsize=9)
    for ax in axes.flat[len(panels) - columns : len(panels)]:
        ax.set_xlabel("iteration")
    expert = "/".join(Path(metrics_path).resolve().parts[-3:-1])
    fig.suptitle(f"{expert}: {_length(records)}", x=0.01, ha="left", fontsize=11.5, color=INK)
    save_figure(fig, path)


def _read_metrics(path: Path) -> list[dict[str, float]]:
    records = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                error.add_note(f"in line {number} of {path}")
                raise
    return records


def _length(records: Sequence[Mapping[str, float]]) -> str:
    """How long the training has been going, in words."""
    text = f"{int(max(r['step'] for r in records)):,} iterations"
    seconds = [r["seconds"] for r in records if "seconds" in r]
    if not seconds:
        return text
    return text + (f" in {max(seconds) / 60:.0f} min" if max(seconds) >= 90 else f" in {max(seconds):.0f} s")


def _smooth(values: np.ndarray) -> np.ndarray:
    """A running mean over a fortieth of the curve; short curves as they are."""
    width = len(values) // 40
    if width < 2:
        return values
    kernel = np.ones(2 * width + 1)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def _leave_out_the_first_plunge(ax: Axes, values: Sequence[float]) -> None:
    """Fits a long curve's axis to all but the extreme 2 % at either end of its values."""
    if len(values) > 100:
        low, high = np.nanquantile(values, [0.02, 0.98])
        ax.set_ylim(low - 0.15 * (high - low) - 1e-9, high + 0.15 * (high - low) + 1e-9)


def _shorten(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


@contextmanager
def _whole(path: str | Path) -> Iterator[Path]:
    """A name to write to; the file gets its real name once it is complete."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
