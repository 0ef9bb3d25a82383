"""The mix: which experts are on, at which values and how strongly; as a recipe.

It is what the page's controls show. A recipe becomes a mix by its composition, so that order, spaces and
the way it is written do not matter; a mix becomes a recipe in which p(x) is counted once.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import reduce
from operator import add, or_
from typing import Any, NamedTuple

from composable_ebm import Energy, Mixture, Not, Sum, ratio
from composable_ebm.experts import Card, Expert
from composable_ebm.pipelines import Pipeline, Prompt

from .terms import left_out, named

AND, NOT, OR = "AND", "NOT", "OR"
ROLES = (AND, NOT, OR)
ANY = "any"
MAX_WEIGHT = 12.0

PLACE = re.compile(r"r(\d+)c(\d+)")
_PROMPT = re.compile(r"(\w+)\[(\".*\")\]", re.DOTALL)
LONGEST_PROMPT = 400  # letters
_PLAIN = {"yes", "true", "1", "on"}  # values that say nothing without their attribute
_CLOSE = 1e-5  # of weights, which recipes write with six digits

__all__ = [
    "AND",
    "ANY",
    "MAX_WEIGHT",
    "NOT",
    "OR",
    "PLACE",
    "Control",
    "Mix",
    "Pick",
    "clamp",
    "controls",
    "shown",
]


class Control(NamedTuple):
    """An expert as the page offers it.

    Attributes:
        name: family/name.
        label: What it is called: of a binary expert, its second value.
        values: What can be chosen.
        base: Whether it is the p(x) that its family shares.
        against: What its density is divided by beside the base; empty in a family without one.
        weight: Where its weights start.
        grid: (rows, columns), where its values are places.
        words: What people say of each value; by its card, which may say nothing.
        usual: The value that it is switched on at.
    """

    name: str
    label: str
    values: tuple[str, ...]
    base: bool = False
    against: str = ""
    weight: float = 1.0
    grid: tuple[int, int] | None = None
    words: tuple[str, ...] = ()
    usual: str = ANY

    @property
    def family(self) -> str:
        return self.name.partition("[")[0].partition("/")[0]

    @property
    def many(self) -> bool:
        """Whether a value is to be chosen: of two, AND is the second and NOT the first."""
        return len(self.values) > 2

    def place(self, value: str) -> int:
        """Where a value stands among the others; before them where it is none of them."""
        return self.values.index(value) if value in self.values else -1


@dataclass
class Pick:
    """What is chosen of one expert.

    Attributes:
        values: Value -> weight.
        role: All of it, none of it, or one at least of all experts in the role OR.
        together: Whether several values are wanted at once, or one of them.
    """

    values: dict[str, float]
    role: str = AND
    together: bool = False


@dataclass
class Mix:
    """What is chosen of the experts of one family, by name."""

    family: str
    base: bool = True
    picks: dict[str, Pick] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """What the page reads."""
        picks = {name: vars(pick) for name, pick in self.picks.items()}
        return {"family": self.family, "base": self.base, "picks": picks}


def controls(cards: Mapping[str, Card]) -> dict[str, Control]:
    """What can be chosen, by name: in each family the base first, then experts with many values, as they
    say what the picture is of."""
    bases = {card.family: name for name, card in reversed(cards.items()) if is_base(card)}
    made = []
    for name, card in cards.items():
        base = bases.get(card.family, "")
        against = f"{name}[any]" if len(card.values) > 1 else base
        label = card.values[1] if len(card.values) == 2 else card.name
        label = (card.attribute if label.lower() in _PLAIN else label).replace("_", " ")
        made.append(
            Control(
                name,
                label,
                card.values,
                base=name == base,
                against=against if base and name != base else "",
                weight=clamp(card.weight, 0.0, MAX_WEIGHT, 1.0),
                grid=_grid(card.values),
                words=card.words,
                usual=_usual(card),
            )
        )
    order = list(dict.fromkeys(control.family for control in made))
    made.sort(key=lambda control: (order.index(control.family), not control.base, not control.many))
    return {control.name: control for control in made}


def of_pipeline(name: str, pipeline: Pipeline) -> Control:
    """The p(x) of a pipeline, to which prompts are added."""
    return Control(name, "all that it knows", (ANY,), base=True)


def of_prompt(name: str, pipelines: Mapping[str, Pipeline]) -> Control | None:
    """What a prompt such as sd["a castle"] is chosen by; None where it is none of these pipelines."""
    match = _PROMPT.fullmatch(name)
    if match is None or (pipeline := pipelines.get(match[1])) is None or len(match[2]) > LONGEST_PROMPT:
        return None
    try:
        text = str(json.loads(match[2]))
    except ValueError:
        return None
    weight = clamp(pipeline.given_weight, 0.0, MAX_WEIGHT, 1.0)
    return Control(name, text, (text,), against=match[1], weight=weight, usual=text)


def is_base(card: Card) -> bool:
    """Whether it is the card of a family's p(x)."""
    return card.attribute == "image" and len(card.values) == 1


def _usual(card: Card) -> str:
    """The second value of two, or of many the one that the expert is named after, or some other."""
    named_after = len(card.values) > 2 and card.name in card.values
    return card.name if named_after else card.values[min(3, len(card.values) - 1)]


def _grid(values: Sequence[str]) -> tuple[int, int] | None:
    """(rows, columns), where values are named r0c0, r0c1, ... row after row."""
    places = [PLACE.fullmatch(value) for value in values]
    if len(values) < 4 or not all(places):
        return None
    rows, columns = (1 + max(int(place[i]) for place in places if place) for i in (1, 2))
    whole = tuple(f"r{i // columns}c{i % columns}" for i in range(rows * columns))
    return (rows, columns) if tuple(values) == whole else None


# -- from the page, and to a recipe -------------------------------------------------------------------------


def names(content: Any) -> list[str]:
    """What the mix that the page sends chooses, by name."""
    picks = content.get("picks") if isinstance(content, dict) else None
    return [str(name) for name in picks] if isinstance(picks, dict) else []


def shown(known: Mapping[str, Control], content: Any) -> Mix:
    """The mix that the page sends: {"family", "base", "picks": {name: {"values": {value: weight}, "role",
    "together"}}}. What is no longer there is left out, and numbers are moved within limits.

    Raises:
        ValueError: If it is nothing that the page sends.
    """
    try:
        mix = Mix(str(content["family"]), content.get("base", True) is True)
        for name, sent in dict(content["picks"]).items():
            control = known.get(name)
            if control is None or control.base or control.family != mix.family:
                continue
            values = {
                value: clamp(weight, 0.0, MAX_WEIGHT, control.weight)
                for value, weight in dict(sent["values"]).items()
                if value in control.values or value == ANY
            }
            role = sent.get("role", AND)
            mix.picks[name] = Pick(values, role if role in ROLES else AND, sent.get("together") is True)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ValueError("The controls of this page sent nothing that can be read; reload it.") from error
    return mix


NOTHING_ON = "Nothing is on: switch on at least one expert."


class _Asked(NamedTuple):
    """One value of an expert, as a mix asks for it; a ratio where the base stands beside it."""

    control: Control
    value: str = ANY
    weight: float = 1.0
    negated: bool = False
    ratio: bool = False

    def __str__(self) -> str:
        chosen = f"[{self.value}]" if self.control.many and self.value != ANY else ""
        term = f"{'~' if self.negated else ''}{self.control.name}{chosen}"
        if self.ratio:
            term = f"ratio({term}, {self.control.against})"
        return term if self.weight == 1 else f"{self.weight:g}*{term}"

    def energy(self, names: Mapping[str, Any]) -> Energy:
        """The same without a text in between."""
        control = self.control
        prompt = "[" in control.name
        expert = names[control.family][control.label] if prompt else names[control.name]
        term = expert[self.value] if control.many and self.value != ANY else expert
        if self.negated:
            term = ~term
        if self.ratio:
            own = control.against.endswith("[any]")
            term = ratio(term, expert[ANY] if own else names[control.against])
        return float(f"{self.weight:g}") * term


def compose(known: Mapping[str, Control], mix: Mix) -> str:
    """The recipe of a mix; empty if nothing is on.

    Where the base is on, each of the others is a ratio beside it, so that p(x) is counted once. An OR of
    ratios to their own marginals is exact, as exp(-E) of each is p(a | x), and needs no normalising
    constants.
    """
    groups = (" | ".join(map(str, group)) for group in _groups(known, mix))
    return " + ".join(f"({group})" if " | " in group else group for group in groups)


def composition(known: Mapping[str, Control], mix: Mix, names: Mapping[str, Energy]) -> Energy:
    """What `compose` writes, as the energy that it describes: nothing is written and read for it.

    Raises:
        ValueError: If nothing is on, or an expert is no longer there.
    """
    groups = _groups(known, mix)
    if not groups:
        raise ValueError(NOTHING_ON)
    try:
        return reduce(add, (reduce(or_, (each.energy(names) for each in group)) for group in groups))
    except KeyError as error:
        raise ValueError(f"The expert {error} is no longer here; reload the page.") from error


def _groups(known: Mapping[str, Control], mix: Mix) -> list[list[_Asked]]:
    """What a mix asks for, the base first: all of these groups, and of each of them one at least."""
    base = next((c for c in known.values() if c.base and c.family == mix.family), None)
    on = base is not None and mix.base
    groups: list[list[_Asked]] = [[_Asked(base)]] if base is not None and on else []
    either: list[_Asked] = []
    for control in known.values():  # in the order in which they stand on the page
        if (pick := mix.picks.get(control.name)) is None:
            continue
        asked = [
            _Asked(control, value, weight, pick.role == NOT, on and bool(control.against))
            for value, weight in sorted(pick.values.items(), key=lambda item: control.place(item[0]))
            if weight and not (on and control.against.endswith("[any]") and value == ANY)
        ]
        if pick.role == OR:
            either += asked
        elif pick.role == AND and not pick.together:
            groups.append(asked)
        else:
            groups += [[each] for each in asked]
    return [group for group in [*groups, either] if group]


# -- from a composition -------------------------------------------------------------------------------------


class _UnlikeError(Exception):
    """The controls cannot show a composition."""


def read(known: Mapping[str, Control], energy: Energy, names: Mapping[str, Energy]) -> Mix | None:
    """The mix whose recipe is the composition `energy`; None where the controls have none.

    Args:
        known: What can be chosen.
        energy: A composition.
        names: What names mean in recipes.
    """
    names_in_it = {_name(each) for each in named(energy) or ()}
    families = {known[name].family for name in names_in_it if name in known}
    if len(families) != 1 or not known.keys() >= names_in_it:
        return None
    mix = Mix(families.pop())
    try:
        for term, weight in _pairs(energy):
            _take(known, mix, term, weight)
    except _UnlikeError:
        return None
    for name, pick in mix.picks.items():  # of one value it makes no difference, until there are more
        if len(pick.values) == 1:
            pick.together = known[name].grid is not None
    for base in (
        True,
        False,
    ):  # by what they name alone: a base that is divided out again is no part of the sum
        mix.base = base
        with suppress(KeyError, ValueError):
            if _same(energy, composition(known, mix, names)):
                return mix
    return None


def _name(energy: Energy) -> str:
    """What the palette knows an expert, a prompt or a pipeline by."""
    return energy.card.full_name if isinstance(energy, Expert) else str(energy)


def _pairs(energy: Energy) -> list[tuple[Energy, float]]:
    whole = Sum([energy])
    return [(term, float(weight)) for term, weight in zip(whole.operands, whole.weights, strict=True)]


def _take(known: Mapping[str, Control], mix: Mix, term: Energy, weight: float) -> None:
    """Notes one term of a sum in the mix; what it is divided by is left to the comparison at the end."""
    if isinstance(term, Prompt) and weight < 0:
        _note(mix, str(term), known[str(term)].usual, -weight, NOT, True)
    if weight < 0 or (isinstance(term, (Expert, Pipeline)) and known[_name(term)].base):
        return
    if isinstance(term, Mixture) and left_out(term) is None:
        parts = [_part(known, component) for component in term.operands]
        if any(part.negated for part in parts):
            raise _UnlikeError
        role = AND if len({part.name for part in parts}) == 1 else OR
        for part in parts:
            _note(mix, part.name, part.value, weight * part.weight, role, False)
        return
    part = _part(known, term)
    _note(mix, part.name, part.value, weight * part.weight, NOT if part.negated else AND, True)


class _Part(NamedTuple):
    """One expert of a composition, whatever it is divided by."""

    name: str
    value: str
    weight: float
    negated: bool


def _part(known: Mapping[str, Control], term: Energy) -> _Part:
    positive = [(each, weight) for each, weight in _pairs(term) if weight > 0]
    if len(positive) != 1:
        raise _UnlikeError
    ((asked, weight),) = positive
    negated = isinstance(asked, Not)
    if isinstance(asked, Not):
        (asked,) = asked.operands
    if isinstance(asked, Mixture) and (left := left_out(asked)) is not None:
        asked, negated = left, True
    if isinstance(asked, Prompt):
        return _Part(str(asked), known[str(asked)].usual, weight, negated)
    if not isinstance(asked, Expert):
        raise _UnlikeError
    control = known[asked.card.full_name]
    if len(control.values) == 2 and asked.value is not None:
        return _Part(control.name, control.usual, weight, negated or asked.value == 0)
    value = ANY if asked.value is None else control.values[asked.value]
    return _Part(control.name, value, weight, negated)


def _note(mix: Mix, name: str, value: str, weight: float, role: str, together: bool) -> None:
    pick = mix.picks.setdefault(name, Pick({}, role, together))
    if value in pick.values or (pick.role, pick.together) != (role, together):
        raise _UnlikeError
    pick.values[value] = weight


def _same(energy: Energy, other: Energy) -> bool:
    """Whether two compositions are the same, in whatever order."""
    mine, theirs = (
        {_key(term): weight for term, weight in _pairs(each) if abs(weight) > _CLOSE}
        for each in (energy, other)
    )
    return mine.keys() == theirs.keys() and all(
        math.isclose(mine[k], theirs[k], rel_tol=_CLOSE, abs_tol=_CLOSE) for k in mine
    )


def _key(term: Energy) -> Any:
    if isinstance(term, Mixture):
        return frozenset(frozenset((t.key, round(w, 5)) for t, w in _pairs(each)) for each in term.operands)
    return term.key


def clamp(value: Any, low: float, high: float, default: float) -> float:
    """`value` between `low` and `high`; `default` where it is no finite number."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return default
    return default if not math.isfinite(number) else min(max(number, low), high)
