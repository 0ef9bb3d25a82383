"""What the controls say, as plain values: rows to recipe text, and numbers within limits.

Pure functions, so that the page has nothing to decide and everything here can be tested without it.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from composable_ebm.experts import Card

AND, NOT, OR = "AND", "NOT", "OR"
ROLES = (AND, NOT, OR)
ANY = "any"
MAX_WEIGHT = 12.0
MAX_SEED = 2**31 - 1
DEFAULT_STEPS = 200

# Where the controls start, for experts of these names: family, then what is on and how.
FIRST_FAMILY = "faces"
START = {"faces/smile": AND, "faces/glasses": AND, "faces/beard": NOT}

MAX_TEXTS = 300_000
MAX_CHOSEN = 100_000

_TERM = re.compile(
    r"(?:(?P<weight>[0-9.]+)\*)?(?:ratio\()?(?P<not>~)?(?P<name>\w+/\w+)(?:\[(?P<value>\w+)\])?(?:, .*\))?",
    re.ASCII,
)
_NUMBER = re.compile(r"[0-9]{1,12}", re.ASCII)

__all__ = [
    "AND",
    "ANY",
    "MAX_SEED",
    "MAX_WEIGHT",
    "NOT",
    "OR",
    "ROLES",
    "Choice",
    "Limits",
    "Request",
    "Row",
]


class Row(NamedTuple):
    """An expert as a row of controls.

    Attributes:
        name: family/name.
        family: Experts that compose.
        label: What the row is called.
        hint: A word of explanation.
        values: What can be chosen, empty where nothing can.
        base: Whether it is the p(x) that its family shares.
        against: What its density is divided by beside the base, so that p(x) is counted once; empty
            in a family without a base.
        weight: Where its weight starts.
    """

    name: str
    family: str
    label: str
    hint: str
    values: tuple[str, ...]
    base: bool = False
    against: str = ""
    weight: float = 1.0


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
    max_players: int = 24


@dataclass(frozen=True)
class Request:
    """What is to be sampled."""

    recipe: str
    num_chains: int
    num_steps: int
    seed: int


def rows(cards: Mapping[str, Card]) -> list[Row]:
    """One row for each expert. In a family the base comes first, then experts with many values, as they
    say what the picture is of.

    A binary expert needs no choice of a value: AND is its second value, NOT its first.
    """
    bases = {card.family: name for name, card in reversed(cards.items()) if _is_base(card)}
    made = []
    for name, card in cards.items():
        values = card.values
        base = bases.get(card.family)
        against = f"{name}[any]" if len(values) > 1 else (base or "")
        made.append(
            Row(
                name,
                card.family,
                values[1] if len(values) == 2 else card.name,
                _hint(values, name == base),
                (ANY, *values) if len(values) > 2 else (),
                base=name == base,
                against=against if base and name != base else "",
                weight=clamp(card.weight, 0.0, MAX_WEIGHT, 1.0),
            )
        )
    started = list(START)

    def place(row: Row) -> tuple:
        wanted = started.index(row.name) if row.name in started else len(started)
        return (row.family != FIRST_FAMILY, row.family, not row.base, wanted, not row.values)

    return sorted(made, key=place)


def _hint(values: tuple[str, ...], base: bool) -> str:
    if base:
        return "what all these pictures share, p(x), counted once"
    return f"NOT: {values[0]}" if len(values) == 2 else ""


def _is_base(card: Card) -> bool:
    return card.attribute == "image" and len(card.values) == 1


def defaults(all_rows: Sequence[Row]) -> list[Choice]:
    """Where the controls start: each base is on, and what `START` names; in a family that it does not
    name, the first expert of many values and the first other one."""
    named = {row.family for row in all_rows if row.name in START}
    seen: set[tuple[str, bool]] = set()
    choices = []
    for row in all_rows:
        kind = (row.family, bool(row.values))
        first = row.family not in named and kind not in seen
        on = row.base or row.name in START or first
        value = "3" if "3" in row.values else (row.values or (ANY,))[min(1, len(row.values))]
        choices.append(Choice(on, value, START.get(row.name, AND), row.weight))
        if not row.base:
            seen.add(kind)
    return choices


def compose(all_rows: Sequence[Row], choices: Sequence[Choice], family: str) -> str:
    """The recipe that the controls of one family describe; empty if none of its experts is on.

    Where the base is on, each of the others is a ratio beside it, so that p(x) is counted once. The
    experts in the role OR are one group, `(a | b)`; of ratios to their own marginal it is exact, as
    exp(-E) of each is p(a | x), and needs no normalising constants.
    """
    chosen = [
        (row, choice, 1.0 if row.base else clamp(choice.weight, 0.0, MAX_WEIGHT, 1.0))
        for row, choice in zip(all_rows, choices, strict=True)
        if row.family == family and choice.on
    ]
    ratios = any(row.base for row, _, _ in chosen)
    terms, group = [], []
    for row, choice, weight in chosen:
        value = f"[{choice.value}]" if choice.value in row.values and choice.value != ANY else ""
        if not weight or (ratios and row.values and not value):
            continue  # any value against any value says nothing
        term = f"{'~' if choice.role == NOT and not row.base else ''}{row.name}{value}"
        if ratios and row.against:
            term = f"ratio({term}, {row.against})"
        written = term if weight == 1 else f"{weight:g}*{term}"
        (group if choice.role == OR and not row.base else terms).append(written)
    either = " | ".join(group)
    return " + ".join([*terms, *([f"({either})" if len(group) > 1 else either] if group else [])])


def decompose(all_rows: Sequence[Row], recipe: str) -> tuple[str, list[Choice]] | None:
    """The family and controls that `compose` turns into `recipe`; None if there are none."""
    named = {row.name: i for i, row in enumerate(all_rows)}
    for family in dict.fromkeys(row.family for row in all_rows):
        choices = [choice._replace(on=False) for choice in defaults(all_rows)]
        for role, term in _roles(recipe):
            match = _TERM.match(term)
            if match is None or (i := named.get(match["name"])) is None:
                break
            value = match["value"] or (ANY if ANY in all_rows[i].values else choices[i].value)
            weight = clamp(match["weight"] or 1, 0.0, MAX_WEIGHT, 1.0)
            choices[i] = Choice(True, value, NOT if match["not"] else role, weight)
        if recipe and compose(all_rows, choices, family) == recipe:
            return family, choices
    return None


def _roles(recipe: str) -> list[tuple[str, str]]:
    """The terms of a recipe as `compose` writes it, each with AND, or OR for those of its group."""
    start = recipe.rfind(" + (") + 3 if " + (" in recipe else 0
    if not (recipe.startswith("(", start) and recipe.endswith(")")):
        return [(AND, term) for term in recipe.split(" + ")]
    before = recipe[: start - 3].split(" + ") if start else []
    return [*((AND, term) for term in before), *((OR, term) for term in recipe[start + 1 : -1].split(" | "))]


def chosen(all_rows: Sequence[Row], text: Any) -> tuple[str, list[Choice]]:
    """The family and the choices that the palette sends, as JSON: {"family": ..., "rows": {name: {"on",
    "value", "role", "weight"}}}. Rows that it does not name are off, as they may be new.

    Raises:
        ValueError: If it is nothing that the palette sends.
    """
    try:
        content = json.loads(text if len(text) <= MAX_CHOSEN else "")
        family, sent = str(content["family"]), dict(content["rows"])
        choices = []
        for row, choice in zip(all_rows, defaults(all_rows), strict=True):
            each = sent.get(row.name, {})
            role = each.get("role", choice.role)
            choices.append(
                Choice(
                    each.get("on", False) is True,
                    str(each.get("value", choice.value)),
                    role if role in ROLES else AND,
                    clamp(each.get("weight"), 0.0, MAX_WEIGHT, choice.weight),
                )
            )
    except (TypeError, ValueError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError("The controls of this page sent nothing that can be read; reload it.") from error
    return family, choices


def moved_to(text: str) -> bool:
    """Whether what the palette sends is sent because another family's tab was opened."""
    return json.loads(text).get("moved") == "family"


def wanted(all_rows: Sequence[Row], chosen_text: str, answered: str, recipe: str) -> str:
    """The recipe to run: what is in its box, or what the controls say, where they were moved and the
    box does not show it yet."""
    if not chosen_text or chosen_text == answered:
        return recipe
    family, choices = chosen(all_rows, chosen_text)
    return compose(all_rows, choices, family)


def restored(text: Any, limits: Limits) -> Request:
    """What a saved picture asks for, from its texts as one JSON object.

    Raises:
        ValueError: If it carries no recipe or its numbers are out of the limits.
    """
    try:
        texts = json.loads(text if len(text) <= MAX_TEXTS else "")
    except (TypeError, ValueError, RecursionError):
        texts = None
    if not isinstance(texts, dict) or not isinstance(texts.get("recipe"), str):
        raise ValueError(
            "This picture carries no recipe. Pictures saved here do, unless they were edited since."
        )
    numbers = {}
    for name, default in (("num_chains", 16), ("num_steps", DEFAULT_STEPS), ("seed", 0)):
        written = str(texts.get(name, default))
        numbers[name] = int(written) if _NUMBER.fullmatch(written) else written
    try:
        return checked(texts["recipe"], limits=limits, **numbers)
    except ValueError as error:
        raise ValueError(f"This picture's {error}") from error


def as_python(asked: Request) -> str:
    """A script that makes the same picture."""
    return (
        "import composable_ebm as ceb\n\n"
        f"mix = ceb.parse({asked.recipe!r})\n"
        f"out = ceb.sample(mix, num_chains={asked.num_chains}, "
        f"num_steps={asked.num_steps}, seed={asked.seed})\n"
        "print(out.report())\n"
        'out.save("grid.png")\n'
    )


def as_command(asked: Request) -> str:
    """A command line that makes the same picture."""
    return (
        f"composable-ebm sample {shlex.quote(asked.recipe)} --num-chains {asked.num_chains} "
        f"--num-steps {asked.num_steps} --seed {asked.seed} --out grid.png"
    )


def steps(cards: Mapping[str, Card]) -> dict[str, int]:
    """The steps that the experts of each family were calibrated with."""
    known: dict[str, int] = {}
    for card in cards.values():
        known[card.family] = max(known.get(card.family, 0), int(card.sampler.get("num_steps", 0)))
    return {family: count or DEFAULT_STEPS for family, count in known.items()}


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
        int(clamp(num_steps, 1, limits.max_steps, DEFAULT_STEPS)),
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
