"""The palette: every expert as a row of controls, a family at a time.

Plain HTML, so that it can be written anew on every visit, when experts have come or gone. What is set in
it is sent by the page's script as the JSON that `state.chosen` reads.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

from composable_ebm.experts import Card

from . import state
from .state import Choice, Row

__all__ = ["cannot", "palette"]

_ROLE_HINTS = {
    state.AND: "all of these",
    state.NOT: "the opposite of it",
    state.OR: "one at least of those in the role OR",
}


def palette(rows: Sequence[Row], choices: Sequence[Choice], family: str, serial: str = "") -> str:
    """All rows, those of `family` in sight.

    Args:
        rows: The experts.
        choices: What is set in each row.
        family: Whose tab is open.
        serial: Another one has the page's script set all controls anew, moved since or not.
    """
    families = list(dict.fromkeys(row.family for row in rows))
    tabs = "".join(_chip("family", name, name == family) for name in families)
    panels = []
    for name in families:
        shown = "" if name == family else " hidden"
        pairs = zip(rows, choices, strict=True)
        inside = "".join(_row(row, choice) for row, choice in pairs if row.family == name)
        panels.append(f'<div class="experts" data-family="{_safe(name)}"{shown}>{inside}</div>')
    choose = _group("Family", tabs, "tabs") if len(families) > 1 else ""
    marks = f'data-family="{_safe(family)}" data-serial="{_safe(serial)}"'
    return f'<div class="palette" {marks}>{choose}{"".join(panels)}</div>'


def cannot(cards: Mapping[str, Card]) -> str:
    """What the experts are known to get wrong, by their own cards, a family at a time."""
    families = dict.fromkeys(card.family for card in cards.values())
    parts = []
    for family in families:
        known = [(card.name, card.failures) for card in cards.values() if card.family == family]
        said = "".join(f"<li><b>{_safe(name)}</b>: {_safe(text)}</li>" for name, text in known if text)
        parts.append(f"<h3>{_safe(family)}</h3><ul>{said or '<li>Nothing is recorded.</li>'}</ul>")
    return (
        "<p>Experts know only the pictures they were trained on, small and of one kind. Weights are "
        "strengths, not probabilities. What each of them is known to get wrong:</p>" + "".join(parts)
    )


def _row(row: Row, choice: Choice) -> str:
    checked = " checked" if choice.on else ""
    hint = f"<small>{_safe(row.hint)}</small>" if row.hint else ""
    label = _safe(row.label.replace("_", " "))
    on = (
        f'<label class="on"><input type="checkbox" aria-label="{label}"{checked}>'
        f"<span>{label}{hint}</span></label>"
    )
    if row.base:
        return f'<div class="expert" data-name="{_safe(row.name)}">{on}</div>'
    roles = "".join(
        _chip(f"role {row.name}", role, role == choice.role, _ROLE_HINTS[role]) for role in state.ROLES
    )
    numbers = f'min="0" max="{state.MAX_WEIGHT:g}" value="{choice.weight:g}"'
    weight = (
        f'<input type="range" step="0.05" {numbers} aria-label="{label} weight">'
        f'<input type="number" step="any" {numbers} aria-label="number input for {label} weight">'
    )
    values = "".join(_chip(f"value {row.name}", value, value == choice.value) for value in row.values)
    return (
        f'<div class="expert" data-name="{_safe(row.name)}">{on}'
        f"{_group(f'{label} role', roles, 'role')}"
        f'<div class="weight">{weight}</div>'
        f"{_group(f'{label} value', values, 'value') if values else ''}</div>"
    )


def _group(name: str, inside: str, kind: str) -> str:
    return f'<fieldset class="chips {kind}"><legend>{_safe(name)}</legend>{inside}</fieldset>'


def _chip(group: str, value: str, checked: bool, hint: str = "") -> str:
    title = f' title="{_safe(hint)}"' if hint else ""
    mark = " checked" if checked else ""
    return (
        f'<label{title}><input type="radio" name="{_safe(group)}" value="{_safe(value)}"{mark}>'
        f"<span>{_safe(value)}</span></label>"
    )


def _safe(text: str) -> str:
    return html.escape(text)
