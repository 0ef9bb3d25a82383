"""Results to read: the table as text, the curve, and the energies of long chains."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

from composable_ebm.plotting import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, RED, figure, save_figure

SKY, OCHRE = "#7fb2d9", "#b8860b"
STYLES = {
    "ratio": (BLUE, "given, particles"),
    "chains": (SKY, "given, chains without weights"),
    "weight 3": (GREEN, "given, chains at weight 3"),
    "base ratio": (PURPLE, "ratio to the base"),
    "sum": (ORANGE, "plain sum"),
    "joint": (INK, "joint model"),
    "diffusion": (RED, "composable diffusion"),
    "contrastive": (OCHRE, "contrastive experts"),
    "ebmkit": (GREY, "ebmkit"),
}

__all__ = ["curve", "plot", "plot_agreement", "table"]


def table(result: dict) -> str:
    """Everything as text: accuracies, diversity, NOT and OR, detection, temperature, long chains."""
    sections = [
        _accuracies(result),
        _figures(result),
        _negation(result),
        _alternatives(result),
        _detection(result),
        _agreement(result),
        _stability(result),
    ]
    return "\n\n".join(text for lines in sections if (text := "\n".join(lines)))


def curve(result: dict, form: str, figure_name: str, sizes: Sequence[int]) -> list[float | None]:
    """A figure of a form, a mean over seeds, for each number of attributes; None where there is none.

    Args:
        result: Content of a results file.
        form: A form or rival.
        figure_name: Key of the row; of proportions the value is taken.
        sizes: Numbers of attributes.
    """
    means: list[float | None] = []
    for size in sizes:
        values = _values(result, form, size, figure_name)
        means.append(sum(values) / len(values) if values else None)
    return means


def _values(result: dict, form: str, size: int, name: str) -> list[float]:
    found = []
    for row in result["rows"]:
        value = row.get(name) if (row["form"], row["attributes_asked"]) == (form, size) else None
        value = value["value"] if isinstance(value, dict) else value
        if value is not None and not math.isnan(value):
            found.append(float(value))
    return found


def _forms(result: dict) -> list[str]:
    return list(dict.fromkeys(row["form"] for row in result["rows"]))


def _sizes(result: dict) -> list[int]:
    return sorted({row["attributes_asked"] for row in result["rows"]})


def _line(label: str, cells: Sequence[object], width: int = 9) -> str:
    texts = ["-" if cell is None else _short(cell) for cell in cells]
    return f"{label:<34}" + "".join(text.rjust(max(width, len(text) + 2)) for text in texts)


def _short(cell: object) -> str:
    return f"{cell:.{1 if abs(cell) >= 10 else 2}f}" if isinstance(cell, float) else str(cell)


def _percent(cells: Sequence[float | None]) -> list[str | None]:
    return [None if c is None else f"{100 * c:.1f}" for c in cells]


def _accuracies(result: dict) -> Iterator[str]:
    sizes = _sizes(result)
    if not sizes:
        return
    judges = list(result["judges"])
    held_out = result["settings"].get("held_out", False)
    what = "held-out combinations only" if held_out else "all requests"
    yield _line(f"all attributes right, %, {what}", sizes)
    for form in _forms(result):
        for judge in judges:
            name = f"accuracy_{judge}"
            label = form if judge == judges[0] else f"  seen by {judge}"
            yield _line(label, _percent(curve(result, form, name, sizes)))
        rows = [r for r in result["rows"] if r["form"] == form]
        name = f"accuracy_{judges[0]}"
        if len(result["settings"]["seeds"]) > 1:
            spreads = [_spread(_values(result, form, k, name)) for k in sizes]
            yield _line("  spread over seeds, ±", spreads)
        else:
            intervals = [
                f"{100 * r[name]['low']:.1f}-{100 * r[name]['high']:.1f}"
                for r in sorted(rows, key=lambda r: r["attributes_asked"])
            ]
            yield _line("  95 % interval", intervals if len(intervals) == len(sizes) else [])
        if not held_out and any(f"held_out_{judges[0]}" in r for r in rows):
            for part, words in (("seen", "combinations seen"), ("held_out", "combinations held out")):
                yield _line(f"  {words}", _percent(curve(result, form, f"{part}_{judges[0]}", sizes)))
    lines = {
        "ceiling": "ceiling: real images",
        "codec_ceiling": "  as they come back of the codec",
        "floor": "floor: real images at random",
    }
    for name, words in lines.items():
        if name in result:
            yield _line(words, _percent([result[name].get(str(k)) for k in sizes]))
    for form, reason in result.get("missing", {}).items():
        yield f"{form}: not compared, {reason}"


def _figures(result: dict) -> Iterator[str]:
    sizes = _sizes(result)
    names = {
        "fid_attr_ratio": "fid_attr over that of real images",
        "precision": "precision",
        "recall": "recall",
        "duplicates": "duplicates",
        "seconds_per_64": "seconds for 64 samples",
        "evaluations": "gradient evaluations",
    }
    for form in _forms(result):
        yield _line(f"{form}: diversity and cost", sizes)
        for name, words in names.items():
            yield _line(f"  {words}", curve(result, form, name, sizes))
        for words, pick in (
            ("largest shift of a free attribute", lambda row: _largest_shift(row)),
            ("nearest training image", lambda row: _nearest(row, "samples")),
            ("  of real images", lambda row: _nearest(row, "held_out")),
        ):
            first = {r["attributes_asked"]: r for r in reversed(result["rows"]) if r["form"] == form}
            yield _line(f"  {words}", [pick(first[k]) if k in first else None for k in sizes])


def _largest_shift(row: dict) -> str | None:
    shifts = [free["largest_difference"] for free in row["free"].values()]
    return f"{100 * max(shifts):.1f}" if shifts else None


def _nearest(row: dict, of: str) -> float | None:
    return row.get("nearest_training_image", {}).get(of, {}).get("median")


def _spread(values: Sequence[float]) -> str | None:
    if len(values) < 2:
        return None
    mean = sum(values) / len(values)
    return f"{100 * math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1)):.1f}"


def _negation(result: dict) -> Iterator[str]:
    if result.get("negation"):
        yield _line("NOT, %", ["right", "interval", "absent"])
    for way, found in result.get("negation", {}).items():
        interval = f"{100 * found['low']:.1f}-{100 * found['high']:.1f}"
        yield _line(f"  {way}", [f"{100 * found['value']:.1f}", interval, f"{100 * found['absent']:.1f}"])


def _alternatives(result: dict) -> Iterator[str]:
    rows = result.get("alternatives", [])
    if rows:
        yield _line("OR, %", ["asked", "found", "interval", "error", "accuracy"])
    for first, second in dict.fromkeys((r["first"], r["second"]) for r in rows):
        yield f"  {first}  |  {second}"
        for r in rows:
            if (r["first"], r["second"]) == (first, second):
                share = r["share"]
                interval = f"{100 * share['low']:.1f}-{100 * share['high']:.1f}"
                cells = [f"{100 * r['requested']:.0f}", f"{100 * share['value']:.1f}", interval]
                cells += [f"{r['error_points']:+.1f}", f"{100 * r['accuracy']['value']:.1f}"]
                yield _line(f"    {r['method']}", cells)


def _detection(result: dict) -> Iterator[str]:
    if result.get("detection"):
        yield _line("detection", ["AUROC"])
    for name, value in result.get("detection", {}).items():
        yield _line(f"  {name}", [f"{value:.4f}"], 12)


def _agreement(result: dict) -> Iterator[str]:
    tests = result.get("agreement", {})
    if tests:
        columns = ["KS kept", "samplers", "starts", "chance", "attributes", "MALA", "T = 1"]
        yield _line("chains at T = 1", columns)
    for name, found in tests.items():
        runs = found["runs"]
        kept = [runs[run] for run in runs if run.endswith(" from data")]
        cells = [
            max(run["ks"] for run in kept),
            found["ks_samplers"],
            found["ks_starts"],
            found["ks_chance"],
            max(run["attributes"] for run in kept),
            runs["MALA from data"]["acceptance"],
            "yes" if found["calibrated"] else "no",
        ]
        yield _line(f"  {name}", cells)


def _stability(result: dict) -> Iterator[str]:
    tests = result.get("stability", {})
    multiples = list(dict.fromkeys(chain.from_iterable(tests.values())))
    if tests:
        yield _line("steps, times the usual", multiples)
    for name, found in tests.items():
        accuracies = [found[m].get("accuracy", {}).get("value") for m in multiples]
        if any(a is not None for a in accuracies):
            yield _line(f"  {name}: right, %", _percent(accuracies))
        yield _line(f"  {name}: fid_attr over real", [found[m].get("fid_attr_ratio") for m in multiples])


def plot(result: dict, path: Path) -> None:
    """Accuracy, with its intervals, and fid_attr over that of real images, by number of attributes."""
    sizes, judge = _sizes(result), next(iter(result["judges"]))
    fig, axes = figure(1, 2, width=9.6, height=3.9)
    left, right = axes[0]
    for form in _forms(result):
        colour, label = STYLES.get(form, (INK, form))
        rows = sorted((r for r in result["rows"] if r["form"] == form), key=lambda r: r["attributes_asked"])
        own = sorted({r["attributes_asked"] for r in rows})
        heights = [100 * (h or 0) for h in curve(result, form, f"accuracy_{judge}", own)]
        left.plot(own, heights, marker="o", ms=4, color=colour, label=label)
        if len(rows) == len(own):
            bounds = [[100 * r[f"accuracy_{judge}"][end] for r in rows] for end in ("low", "high")]
            left.fill_between(own, *bounds, color=colour, alpha=0.15, lw=0)
        ratios = [(k, v) for k, v in zip(own, curve(result, form, "fid_attr_ratio", own), strict=True) if v]
        if ratios:
            right.plot(*zip(*ratios, strict=True), marker="o", ms=4, color=colour)
    for name, colour, style, label in (
        ("ceiling", INK, ":", "real images"),
        ("floor", GREY, "--", "real images at random"),
    ):
        known = [(k, 100 * result[name][str(k)]) for k in sizes if str(k) in result[name]]
        if known:
            left.plot(*zip(*known, strict=True), color=colour, ls=style, label=label)
    left.set(
        xlabel="attributes asked for at once", ylabel="all of them right, %", ylim=(0, 102), xticks=sizes
    )
    left.set_title(f"Composing experts of {result['family']}")
    right.set(xlabel="attributes asked for at once", ylabel="fid_attr over that of real images", xticks=sizes)
    if right.lines:
        right.set_yscale("log")
        right.yaxis.set_major_formatter("{x:g}")
        low, high = right.get_ylim()
        right.yaxis.set_minor_formatter("{x:g}" if high < 10 * low else "")
        right.axhline(1, color=INK, ls=":")
    right.set_title("Distance to real images of the same requests")
    fig.legend(
        *left.get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8.5, frameon=False
    )
    save_figure(fig, path)


def plot_agreement(result: dict, path: Path) -> None:
    """For each expert: energies of data and of chains at T = 1 above, long runs below."""
    tests, long_runs = result.get("agreement", {}), result.get("stability", {})
    names = list(tests or long_runs)
    fig, axes = figure(2, len(names), width=max(5.0, 2.2 * len(names)), height=4.8, sharey="row")
    tallest = 1.0
    for column, name in enumerate(names):
        above, below = axes[:, column]
        above.set_title(name)
        if name in tests:
            quantiles = tests[name]["quantiles"]
            shares = [i / (len(quantiles["data"]) - 1) for i in range(len(quantiles["data"]))]
            above.plot(quantiles["data"], shares, color=BLUE, lw=4, alpha=0.35, label="data")
            for start, style in (("data", "-"), ("own samples", ":")):
                for label, colour in (("ULA", ORANGE), ("MALA", GREEN), ("HMC", PURPLE)):
                    run = f"{label} from {start}"
                    above.plot(quantiles[run], shares, color=colour, ls=style, lw=1.2, label=run)
            above.set(xlabel="energy, nats")
        if name in long_runs:
            multiples = list(long_runs[name])
            for figure_name, colour, label in (
                ("fid_attr_ratio", INK, "fid_attr over that of real images"),
                ("accuracy", GREEN, "right"),
            ):
                values = [long_runs[name][m].get(figure_name) for m in multiples]
                values = [v["value"] if isinstance(v, dict) else v for v in values]
                if None not in values:
                    below.plot(range(len(values)), values, marker="o", ms=4, color=colour, label=label)
            below.set(xlabel="steps, times the usual", xticks=range(len(multiples)), xticklabels=multiples)
            tallest = max([tallest, *(v for line in below.lines for v in line.get_ydata())])
    axes[0, 0].set_ylabel("share of chains below")
    axes[1, 0].set_ylim(0, 1.1 * tallest)
    found = [axis.get_legend_handles_labels() for axis in (axes[0, 0], axes[1, -1])]
    handles, labels = ([*first, *second] for first, second in zip(*found, strict=True))
    fig.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=8.5, frameon=False)
    save_figure(fig, path)
