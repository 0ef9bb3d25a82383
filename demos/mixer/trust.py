"""What is doubtful about a recipe, in sentences, before a picture of it is made."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch

from composable_ebm.energy import Energy, Sum
from composable_ebm.experts import Card, Expert
from composable_ebm.sampling.request import check_positive_term

from .terms import named, parts

_TERM = re.compile(r"(?P<not>~?)(?P<attribute>\w+)(?:\[(?P<value>\w+)\])?")

__all__ = ["doubts", "unseen"]


def doubts(energy: Energy) -> list[str]:
    """What to say of a recipe beside its picture.

    Raises:
        ValueError: If nothing can be drawn from it.
    """
    check_positive_term(energy)
    whole = Sum([energy])
    said = []
    net = float(sum(torch.as_tensor(weight).mean() for weight in whole.weights))
    if net < -1e-6:
        said.append(
            f"The weights sum to {net:.3g}: far from the data nothing holds this density together, it may be "
            "improper. Add what the pictures share (the base), or lower what is subtracted."
        )
    wanted = [part for part in parts(energy) if part.weight > 0 and not part.group]
    asked = {
        part.asked.card.attribute: part.asked.card.values[part.asked.value]
        for part in wanted
        if isinstance(part.asked, Expert) and part.asked.value is not None
    }
    missing = unseen((each.card for each in named(energy) or () if isinstance(each, Expert)), asked)
    said += [
        f"No picture with {combination} was in the training data: this mix goes beyond what was seen."
        for combination in missing
    ]
    return said


def unseen(cards: Iterable[Card], asked: Mapping[str, str]) -> list[str]:
    """The combinations held out of training that a request asks for.

    Args:
        cards: Cards of experts; their `data` ends with ", without a+~b+c[value], ..." where
            combinations were held out.
        asked: Attribute -> the value that is asked for.
    """
    values = {}
    held_out: dict[str, None] = {}
    for card in cards:
        values[card.attribute] = card.values
        _, _, text = card.data.partition(", without ")
        held_out.update(dict.fromkeys(each.strip() for each in text.split(",") if each.strip()))
    found = []
    for combination in held_out:
        wanted = {}
        for term in combination.split("+"):
            match = _TERM.fullmatch(term.strip())
            known = values.get(match["attribute"]) if match else None
            if match is None or known is None:
                break
            wanted[match["attribute"]] = match["value"] or known[0 if match["not"] else -1]
        else:
            if all(asked.get(attribute) == value for attribute, value in wanted.items()):
                found.append(" and ".join(value.replace("_", " ") for value in wanted.values()))
    return found
