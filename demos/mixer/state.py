"""What the controls say, as plain values: rows to recipe text, and numbers within limits.

Pure functions, so that the page has nothing to decide and everything here can be tested without it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from composable_ebm.experts import Card

AND, NOT = "AND", "NOT"
ANY = "any"
MAX_WEIGHT = 4.0
MAX_SEED = 2**31 - 1

__all__ = ["AND", "ANY", "MAX_SEED", "MAX_WEIGHT", "NOT", "Choice", "Limits", "Request", "Row"]


class Row(NamedTuple):
    """An expert as a row of controls. `values`: what can be chosen, empty where nothing can."""

    name: str
    family: str
    label: str
    hint: str
    values: tuple[str, ...]


class Choice(NamedTuple):
    """What is set in a row."""

    on: bool
    value: str
    role: str
    weight: float


@dataclass(frozen=True)
class Limits:
    """The most that a visitor may ask for."""

    max_chains: int = 64
    max_steps: int = 2000


@dataclass(frozen=True)
class Request:
    """What is to be sampled."""

    recipe: str
    num_chains: int
    num_steps: int
    seed: int


def rows(cards: Mapping[str, Card]) -> list[Row]:
    """One row for each expert: those with many values first, as they say what the picture is of.

    A binary expert needs no choice of a value: AND is its second value, NOT its first.
    """
    made = []
    for name, card in cards.items():
        binary = len(card.values) == 2
        hint = f"NOT: {card.values[0]}" if binary else ""
        choices = (ANY, *card.values) if len(card.values) > 2 else ()
        made.append(Row(name, card.family, card.values[1] if binary else card.name, hint, choices))
    return sorted(made, key=lambda row: (row.family, not row.values))


def defaults(all_rows: Sequence[Row]) -> list[Choice]:
    """Where the controls start: in each family its first expert is on, and the first binary one."""
    seen: set[tuple[str, bool]] = set()
    choices = []
    for row in all_rows:
        kind = (row.family, bool(row.values))
        value = "3" if "3" in row.values else (row.values or (ANY,))[min(1, len(row.values))]
        choices.append(Choice(kind not in seen, value, AND, 1.0))
        seen.add(kind)
    return choices


def compose(all_rows: Sequence[Row], choices: Sequence[Choice], family: str) -> str:
    """The recipe that the controls of one family describe; empty if none of its experts is on."""
    terms = []
    for row, choice in zip(all_rows, choices, strict=True):
        weight = clamp(choice.weight, 0.0, MAX_WEIGHT, 1.0)
        if row.family != family or not choice.on or not weight:
            continue
        chosen = f"[{choice.value}]" if choice.value in row.values and choice.value != ANY else ""
        term = f"{'~' if choice.role == NOT else ''}{row.name}{chosen}"
        terms.append(term if weight == 1 else f"{weight:g}*{term}")
    return " + ".join(terms)


def clamp(value: Any, low: float, high: float, default: float) -> float:
    """`value` between `low` and `high`; `default` where it is no finite number."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return default
    return default if not math.isfinite(number) else min(max(number, low), high)


def clamped(recipe: Any, num_chains: Any, num_steps: Any, seed: Any, limits: Limits) -> Request:
    """What the page asks for, its numbers moved within the limits."""
    return Request(
        str(recipe or ""),
        int(clamp(num_chains, 1, limits.max_chains, 16)),
        int(clamp(num_steps, 1, limits.max_steps, 200)),
        int(clamp(seed, 0, MAX_SEED, 0)),
    )


def checked(recipe: Any, num_chains: Any, num_steps: Any, seed: Any, limits: Limits) -> Request:
    """What a program asks for, refused where it is out of the limits.

    Raises:
        ValueError: If it is; the message says what is wrong.
    """
    if not isinstance(recipe, str):
        raise ValueError(f"`recipe` must be text, got {type(recipe).__name__}.")
    return Request(
        recipe,
        _whole("num_chains", num_chains, 1, limits.max_chains),
        _whole("num_steps", num_steps, 0, limits.max_steps),
        _whole("seed", seed, 0, MAX_SEED),
    )


def _whole(name: str, value: Any, low: int, high: int) -> int:
    number = value if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
    if not (low <= number <= high and number == int(number)):
        raise ValueError(f"`{name}` must be a whole number from {low} to {high}, got {value!r}.")
    return int(number)
