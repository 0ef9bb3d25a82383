"""What can be asked of a family: its experts by attribute and value, and its data.

An attribute here is what a judge sees. Most experts have an attribute of their own, with two or more
values to ask for; positions of objects are one expert whose every value is an attribute, "taken".
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from composable_ebm.data import LabelledImages, load_data
from composable_ebm.data.combinations import parse_combinations, without
from composable_ebm.data.dataset import BETWEEN
from composable_ebm.experts.card import Card
from composable_ebm.experts.catalogue import cards, load_expert
from composable_ebm.experts.expert import Expert

Request = Mapping[str, int]
"""attribute -> position of the value asked for."""

# Attributes whose experts are composed, in order; others of the family are left out.
ATTRIBUTES = {
    "digits": ("digit", "thick", "slanted"),
    "faces": ("smile", "glasses", "beard", "curly", "grey_hair"),
    "portraits": ("smile", "glasses", "beard", "curly", "grey_hair"),
    "letters": ("letter", "bold", "italic", "serif"),
    "shapes": ("position",),
}
# Families one of whose experts has places as values: attribute of the judge for value v.
PLACES = {"shapes": "at_{}"}
SIZES = {"shapes": (1, 2, 3, 4, 5)}
# Attributes whose marginals are reported; all of the data set unless given.
REPORTED = {"shapes": ("count",)}
# Real images to compare samples with: neither experts nor judges learnt from them.
REFERENCES: dict[str, tuple[str, dict[str, int]]] = {
    "digits": ("test", {}),
    "faces": ("validation", {"num_images": 6000}),
    "portraits": ("validation", {}),
    "letters": ("validation", {}),
    "shapes": ("validation", {"num_images": 6000}),
}
BASE = "image"

__all__ = ["Request", "Task", "requests", "task_of"]


@dataclass(frozen=True)
class Task:
    """A family to be evaluated.

    Attributes:
        family: Its name, and that of its data set.
        experts: Name -> expert, in the order of composition.
        terms: Attribute -> position of a value that can be asked for -> the expert at that value.
        base: The expert of p(x), if there is one.
        held_out: Combinations that no expert saw, as requests.
        sizes: Numbers of attributes that are asked for at once.
    """

    family: str
    experts: Mapping[str, Expert]
    terms: Mapping[str, Mapping[int, Expert]]
    base: Expert | None
    held_out: Sequence[Request]
    sizes: tuple[int, ...]

    @property
    def askable(self) -> dict[str, tuple[int, ...]]:
        """Attribute -> positions of the values that can be asked for."""
        return {name: tuple(values) for name, values in self.terms.items()}

    @property
    def all_experts(self) -> dict[str, Expert]:
        """The experts, the base among them."""
        return {**({} if self.base is None else {"base": self.base}), **self.experts}

    def is_held_out(self, request: Request) -> bool:
        """Whether a request asks for all of a combination that no expert saw."""
        return any(all(request.get(n) == v for n, v in part.items()) for part in self.held_out)

    def seen_in_training(self, train: LabelledImages) -> LabelledImages:
        """The training images without the held-out combinations."""
        return without(train, self.held_out)

    def reference(self, root: str | None) -> LabelledImages:
        """Real images that neither experts nor judges learnt from."""
        split, options = REFERENCES.get(self.family, ("validation", {}))
        return load_data(self.family, split, root, **options)

    def reported(self, data: LabelledImages) -> tuple[str, ...]:
        """Attributes whose marginals are reported."""
        return REPORTED.get(self.family, tuple(data.values))


def task_of(family: str, combinations: Sequence[str] = ()) -> Task:
    """The task of a family of experts.

    Args:
        family: Name of the family.
        combinations: Held-out combinations such as "glasses+beard"; those that the experts' cards
            name unless given.
    Raises:
        ValueError: If the family has no experts to compose.
    """
    experts, base = family_experts(family)
    terms: dict[str, dict[int, Expert]] = {}
    for name, expert in experts.items():
        for position, value in enumerate(expert.card.values):
            if value == BETWEEN:
                continue
            if family in PLACES:
                terms[PLACES[family].format(value)] = {1: expert[value]}
            else:
                terms.setdefault(name, {})[position] = expert[value]
    known = combinations or held_out_combinations([e.card for e in experts.values()])
    values = {name: [v for v in e.card.values if v != BETWEEN] for name, e in experts.items()}
    held_out = parse_combinations(known, values, f"experts of {family!r}")
    return Task(family, experts, terms, base, held_out, SIZES.get(family, tuple(range(1, len(experts) + 1))))


def family_experts(family: str, attributes: Sequence[str] = ()) -> tuple[dict[str, Expert], Expert | None]:
    """The experts to compose, by attribute, and the expert of p(x) if there is one."""
    known: dict[str, Card] = {n: c for n, c in cards()[0].items() if c.family == family}
    by_attribute = {card.attribute: name for name, card in known.items()}
    wanted = attributes or ATTRIBUTES.get(family, tuple(a for a in by_attribute if a != BASE))
    found = {a: load_expert(by_attribute[a]) for a in wanted if a in by_attribute}
    if not found:
        there = ", ".join(sorted({name.split("/")[0] for name in cards()[0]})) or "none"
        raise ValueError(f"the family {family!r} has no experts to compose; families with experts: {there}.")
    return found, load_expert(by_attribute[BASE]) if BASE in by_attribute else None


def held_out_combinations(family_cards: Sequence[Card]) -> list[str]:
    """The combinations that every one of these experts was trained without, as their cards say."""
    per_card = [set(_excluded(card.training)) for card in family_cards]
    return sorted(set.intersection(*per_card)) if per_card else []


def _excluded(settings: object) -> Iterator[str]:
    """The entries of every "exclude" in nested settings."""
    if isinstance(settings, Mapping):
        for key, value in settings.items():
            if key == "exclude":
                yield from map(str, value)
            else:
                yield from _excluded(value)


def requests(
    askable: Mapping[str, Sequence[int]],
    size: int,
    count: int,
    generator: torch.Generator,
    held_out: Sequence[Request] = (),
    each: int = 1,
) -> list[Request]:
    """`count` random requests of `size` attributes, shared out evenly over the subsets of attributes.

    Where there are more subsets than requests, each request takes a random one.

    Args:
        askable: Attribute -> values that can be asked for.
        size: Attributes asked for at once.
        count: Number of requests.
        generator: Draws subsets and values.
        held_out: Where given, every request asks for all of one of these, and more at random.
        each: How often each request is repeated: chains of one request are weighed against each other.
    """
    if each > 1:
        few = requests(askable, size, -(-count // each), generator, held_out)
        return [request for request in few for _ in range(each)][:count]

    def one(subset: Sequence[str], fixed: Request) -> Request:
        return {n: fixed[n] if n in fixed else _pick(askable[n], generator) for n in subset}

    if held_out:
        fitting = [combination for combination in held_out if len(combination) <= size]
        drawn = []
        for i in range(count if fitting else 0):
            fixed = fitting[i % len(fitting)]
            rest = [n for n in askable if n not in fixed]
            extra = torch.randperm(len(rest), generator=generator)[: size - len(fixed)].tolist()
            drawn.append(one([n for n in askable if n in fixed or n in {rest[j] for j in extra}], fixed))
        return drawn
    names = list(askable)
    subsets = list(itertools.combinations(names, size))
    if len(subsets) > count:
        picks = [torch.randperm(len(names), generator=generator)[:size].sort().values for _ in range(count)]
        return [one([names[j] for j in pick.tolist()], {}) for pick in picks]
    return [one(subsets[i * len(subsets) // count], {}) for i in range(count)]


def _pick(values: Sequence[int], generator: torch.Generator) -> int:
    return values[int(torch.randint(len(values), (1,), generator=generator))]
