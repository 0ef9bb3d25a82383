"""The experts as a list to read: a table for the terminal, and the page MODELS.md.

Both are made from the experts' own files and say nothing that is not in them, so that they cannot
disagree with what is loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from composable_ebm.experts.card import Card, CheckpointError
from composable_ebm.experts.catalogue import catalogue
from composable_ebm.experts.store import CODEC, CONFIG, load_folder

__all__ = ["page", "read", "table"]

_COLUMNS = ("expert", "attribute", "values", "parameters", "size", "metrics")
_INTRODUCTION = """\
# Models

The experts that are shipped with the code, family by family. Experts of one family share an image
space and compose. This page is made from their `config.json` files; after a change, run

    composable-ebm models --folder models --markdown > MODELS.md
"""

LISTED = 16  # of a list in a card; of a longer one its ends are named


def read(folder: str | Path | None = None) -> tuple[dict[str, Card], dict[str, str]]:
    """The cards of all experts by name, and for those that cannot be used, why.

    Every expert is loaded, so that weights that are truncated, changed or unfit are found too.

    Args:
        folder: One that holds <family>/<name>; wherever experts are looked for unless given.
    Raises:
        ValueError: If there is no such folder.
    """
    if folder is None:
        folders = catalogue()
    elif Path(folder).is_dir():
        folders = {
            "/".join(c.parts[-3:-1]): c.parent
            for c in sorted(Path(folder).glob(f"*/*/{CONFIG}"))
            if c.parent.name != CODEC
        }
    else:
        raise ValueError(f"there is no folder {folder}.")
    good: dict[str, Card] = {}
    bad: dict[str, str] = {}
    for name, path in folders.items():
        try:
            good[name] = load_folder(path).card
        except CheckpointError as error:
            bad[name] = str(error)
    return good, bad


def table(cards: Mapping[str, Card], damaged: Mapping[str, str]) -> str:
    """The experts in aligned columns, and below them those that cannot be used."""
    lines = []
    if cards:
        rows = [_COLUMNS, *(_row(name, card) for name, card in cards.items())]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            cells = [
                cell.rjust(width) if title in ("parameters", "size") else cell.ljust(width)
                for cell, width, title in zip(row, widths, _COLUMNS, strict=True)
            ]
            lines.append("  ".join(cells).rstrip())
    elif not damaged:
        lines.append("no experts found; train one, or name a folder of them in COMPOSABLE_EBM_MODELS")
    lines += [f"DAMAGED  {name}: {reason}" for name, reason in damaged.items()]
    return "\n".join(lines)


def page(cards: Mapping[str, Card]) -> str:
    """The page MODELS.md."""
    parts = [_INTRODUCTION]
    families: dict[str, dict[str, Card]] = {}
    for name, card in sorted(cards.items()):
        families.setdefault(card.family, {})[name] = card
    for family, members in families.items():
        parts.append(f"## {family}\n")
        parts.append(_markdown_row(_COLUMNS))
        parts.append("|" + " --- |" * len(_COLUMNS))
        for name, card in members.items():
            _, *rest = _row(name, card)
            parts.append(_markdown_row((f"[{name}](#{family}{card.name})", *rest)))
        parts.append("")
        for name, card in members.items():
            parts.append(f"### {name}\n")
            parts += [f"- **{label}:** {text}" for label, text in _details(card) if text]
            parts.append("")
    if not families:
        parts.append("There are none yet.\n")
    return "\n".join(parts)


def _row(name: str, card: Card) -> tuple[str, ...]:
    count, size = card.weights.get("parameters"), card.weights.get("bytes")
    return (
        name,
        card.attribute,
        ", ".join(card.values),
        f"{count:,}" if isinstance(count, int) else "",
        f"{size / 1e6:.2f} MB" if isinstance(size, int) else "",
        _settings(card.metrics, ", "),
    )


def _details(card: Card) -> Iterable[tuple[str, str]]:
    training = dict(card.training)
    command, machine, minutes = (training.pop(key, "") for key in ("command", "machine", "minutes"))
    yield "What", f"{card.attribute}: {', '.join(card.values)}; {card.states}"
    yield "Data", card.data
    yield "Network", _settings(card.network, ", ")
    yield "Weights", f"SHA-256 `{card.weights.get('sha256', 'unknown')}`"
    yield "Trained by", f"`{command}`" if command else ""
    yield "On", ", ".join(t for t in (str(machine), f"{_value(minutes)} minutes" if minutes else "") if t)
    yield "Settings", _settings(training, ", ")
    yield "Metrics", _settings(card.metrics, ", ")
    yield "Sampler", _settings(card.sampler, ", ")
    yield "Temperature", "" if card.temperature is None else f"{card.temperature:g}"
    yield "Known failures", card.failures
    yield "Licence", card.licence


def _settings(values: Mapping, joint: str) -> str:
    return joint.join(f"{key} {_value(value)}" for key, value in values.items())


def _value(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return f"({_settings(value, ', ')})"
    if isinstance(value, (list, tuple)):
        if len(value) > LISTED:
            return f"{len(value)} numbers from {_value(value[0])} to {_value(value[-1])}"
        return f"[{', '.join(map(_value, value))}]"
    return str(value)


def _markdown_row(cells: Iterable[str]) -> str:
    escaped = (cell.replace("|", "\\|").replace("\n", " ") for cell in cells)
    return f"| {' | '.join(escaped)} |"
