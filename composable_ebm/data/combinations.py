"""Combinations of attributes that are kept out of training, such as "digit[3]+thick+slanted".

What experts make of a combination that none of them has seen says whether they compose or remember.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

import torch

from composable_ebm.data.dataset import LabelledImages, unknown_name

__all__ = ["parse_combination", "parse_combinations", "satisfying", "without"]


def parse_combination(text: str, values: Mapping[str, Sequence[str]], of: str) -> dict[str, int]:
    """The labels that a combination asks for.

    Args:
        text: Attributes joined by "+": `smile` (value 1), `~smile` (value 0) or `skin[tan]`.
        values: Attribute -> names of its values.
        of: Whose attributes they are, for messages.
    Raises:
        ValueError: If an attribute or value is unknown, or named twice.
    Example:
        >>> parse_combination("thick+digit[b]", {"thick": ("no", "yes"), "digit": ("a", "b", "c")}, "digits")
        {'thick': 1, 'digit': 1}
    """
    labels: dict[str, int] = {}
    for term in text.split("+"):
        match = re.fullmatch(r"(~?)\s*(\w+)(?:\[(\w+)\])?", term.strip())
        if match is None or (match[1] and match[3]):
            raise ValueError(
                f"each attribute of a combination must read `smile`, `~smile` or `skin[tan]`, "
                f"got {term.strip()!r} in {text!r}."
            )
        negated, attribute, value = match.groups()
        if attribute not in values:
            raise ValueError(unknown_name(f"attribute of the {of}", attribute, values))
        known = tuple(values[attribute])
        if value is None and len(known) > 2:
            raise ValueError(
                f"{attribute!r} has {len(known)} values: write one of "
                f"{', '.join(f'{attribute}[{v}]' for v in known)} in {text!r}."
            )
        if value is not None and value not in known:
            raise ValueError(unknown_name(f"value of {attribute!r}", value, known))
        if attribute in labels:
            raise ValueError(f"{attribute!r} is named twice in {text!r}.")
        labels[attribute] = int(not negated) if value is None else known.index(value)
    return labels


def parse_combinations(
    exclude: Iterable[str], values: Mapping[str, Sequence[str]], of: str
) -> list[dict[str, int]]:
    """The labels of several combinations.

    Raises:
        TypeError: If `exclude` is a single text.
        ValueError: As `parse_combination`.
    """
    if isinstance(exclude, str):
        raise TypeError(f"`exclude` must be a list of combinations: exclude=({exclude!r},).")
    return [parse_combination(text, values, of) for text in exclude]


def satisfying(combination: Mapping[str, int], data: LabelledImages) -> torch.Tensor:
    """Which images have all labels of a combination, (n,)."""
    has = torch.ones(len(data), dtype=torch.bool)
    for attribute, value in combination.items():
        has &= data.labels[attribute] == value
    return has


def without(data: LabelledImages, combinations: Iterable[Mapping[str, int]]) -> LabelledImages:
    """The images that have not all the labels of any of the combinations."""
    for combination in combinations:
        data = data.select(~satisfying(combination, data))
    return data
