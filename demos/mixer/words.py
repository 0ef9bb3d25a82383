"""A mix in plain words, as people would ask for it."""

from __future__ import annotations

from collections.abc import Mapping

from .mix import AND, ANY, NOT, OR, PLACE, Control, Mix, Pick

__all__ = ["lone", "words"]


def words(known: Mapping[str, Control], mix: Mix) -> str:
    """A mix in plain words, what is not wanted last: "glasses, smiling, no beard"."""
    said, unwanted, either = [], [], []
    for control in known.values():
        pick = mix.picks.get(control.name)
        if pick is None or not (values := [value for value, weight in pick.values.items() if weight]):
            continue
        values.sort(key=control.place)
        phrase = _phrase(control, values, pick)
        if phrase:
            {AND: said, NOT: unwanted, OR: either}[pick.role].append(phrase)
    if either:
        said.append(" or ".join(either))
    return ", ".join(said + unwanted) or f"any of {mix.family.replace('_', ' ')}"


def _phrase(control: Control, values: list[str], pick: Pick) -> str:
    if not control.many:
        if pick.role == NOT:
            return control.words[0] if len(control.words) > 1 else f"no {control.label}"
        return control.words[-1] if control.words else control.label
    if values == [ANY]:
        return f"any {control.label}"
    if control.grid is not None and len(values) > 2:
        where = f"{len(values)} places" if pick.together else f"one of {len(values)} places"
        return f"nothing at {where}" if pick.role == NOT else where
    head = "" if control.grid or control.words else f"{control.label} "
    joined = (" and " if pick.together and pick.role == AND else " or ").join(
        control.words[control.values.index(value)]
        if control.words
        else _place_name(value)
        if control.grid
        else value.replace("_", " ")
        for value in values
    )
    return f"{'not ' if pick.role == NOT else ''}{head}{joined}"


def _place_name(value: str) -> str:
    """What people call a place of a grid: "row 1 column 4"."""
    match = PLACE.fullmatch(value)
    assert match is not None
    return f"row {int(match[1]) + 1} column {int(match[2]) + 1}"


def lone(known: Mapping[str, Control], mix: Mix) -> str:
    """What to say of an OR that has nothing to choose between."""
    chosen = [(name, len(pick.values)) for name, pick in mix.picks.items() if pick.role == OR]
    if len(chosen) != 1 or chosen[0][1] != 1:
        return ""
    label = known[chosen[0][0]].label
    return f"{label} is the only one in OR, so it is simply asked for; choose OR for another one too."
