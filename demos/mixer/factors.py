"""Where the experts stand in a recipe's text, each with the weight in front of it.

A factor is `weight*expert`, or `weight*ratio(expert, what it is divided by)`, wherever it stands: in a
sum or in one of the groups of an OR. Only text is read here; what it means is `parse`'s to say.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from composable_ebm.energy import Energy
from composable_ebm.experts import Expert

__all__ = ["Factor", "alone", "factors", "find", "with_weights"]

_NAME = r"[A-Za-z_]\w*(?:/[A-Za-z_]\w*)*"
_EXPERT = rf"(?:(?P<not>~)\s*)?(?P<name>{_NAME})(?:\[\s*(?P<value>\w+)\s*\])?"
_FACTOR = re.compile(
    r"(?:(?P<weight>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*\*\s*)?"
    rf"(?P<body>ratio\(\s*{_EXPERT}\s*,[^()]*\)|{_EXPERT.replace('?P<', '?P<alone_')}(?!\w|\s*[(/=]))",
    re.ASCII,
)


class Factor(NamedTuple):
    """An expert of a recipe.

    Attributes:
        expert: Its name, `family/name`, with a value where one is chosen: `digits/digit[3]`.
        negated: Whether a ~ stands before it.
        body: Its text without its weight: the expert, or a ratio of it.
        weight: The number in front, 1 where there is none.
        start: Where its text begins in the recipe, the weight included.
        stop: Where it ends.
    """

    expert: str
    negated: bool
    body: str
    weight: float
    start: int
    stop: int

    @property
    def name(self) -> str:
        """Its name without a value."""
        return self.expert.partition("[")[0]

    @property
    def text(self) -> str:
        """The factor as a recipe of its own."""
        return self.body if self.weight == 1 else f"{self.weight:g}*{self.body}"

    @property
    def label(self) -> str:
        """What to call it in a picture: without its family."""
        return ("not " if self.negated else "") + self.expert.rpartition("/")[2].replace("[", " ").rstrip("]")


def factors(recipe: str) -> list[Factor]:
    """The experts of a recipe, in the order in which they stand."""
    found = []
    for match in _FACTOR.finditer(recipe):
        parts = match.groupdict()
        prefix = "" if parts["name"] else "alone_"
        value = parts[prefix + "value"]
        expert = parts[prefix + "name"] + (f"[{value}]" if value else "")
        weight = float(parts["weight"] or 1)
        found.append(Factor(expert, bool(parts[prefix + "not"]), match["body"], weight, *match.span()))
    return found


def find(recipe: str, expert: str) -> Factor:
    """The factor of one expert, named with its value or without.

    Raises:
        ValueError: If the recipe does not name it, or names it more than once.
    """
    all_factors = factors(recipe)
    found = [each for each in all_factors if expert in (each.expert, each.name)]
    if len(found) == 1:
        return found[0]
    known = ", ".join(dict.fromkeys(each.expert for each in all_factors)) or "none"
    if not found:
        raise ValueError(f"the recipe does not name the expert {expert!r}; it names: {known}.")
    raise ValueError(f"the recipe names {expert} {len(found)} times; say which: {known}.")


def with_weights(recipe: str, weights: Mapping[Factor, float]) -> str:
    """The recipe with other weights in front of some of its factors."""
    for factor, weight in sorted(weights.items(), key=lambda item: -item[0].start):
        number = f"{weight!r}*" if weight >= 0 else f"({weight!r})*"
        recipe = recipe[: factor.start] + number + factor.body + recipe[factor.stop :]
    return recipe


def alone(recipe: str, library: Mapping[str, Energy]) -> list[tuple[str, str]]:
    """Every expert of a recipe by itself, beside the p(x) that all share where the recipe has one.

    Args:
        recipe: A recipe that can be parsed.
        library: What its names mean.
    Returns:
        What to call it, and a recipe of its own, for each expert other than that of p(x).
    """
    named = factors(recipe)
    base = next((each for each in named if _is_base(library[each.name])), None)
    if base is None:
        return [(each.label, each.text) for each in named]
    return [(each.label, f"{base.body} + {each.text}") for each in named if each.name != base.name]


def _is_base(energy: Energy) -> bool:
    return isinstance(energy, Expert) and energy.card.attribute == "image" and len(energy.card.values) == 1
