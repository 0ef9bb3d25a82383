"""What a training learns from, in plain words."""

from __future__ import annotations

from composable_ebm.data.dataset import UNLABELLED, LabelledImages

MOST = 30  # values that are listed
FEW = 20  # pictures of a value below which it is pointed out

LITTLE = 500  # pictures below which samples are likely to be copies

__all__ = ["summary"]


def summary(train: LabelledImages, held_out: LabelledImages, attribute: str = "", told: bool = False) -> str:
    """Pictures by split and value, and what was skipped and why.

    Args:
        train: What is learned from.
        held_out: What is held out.
        attribute: The attribute that is learned; "" for p(x).
        told: Whether all has been said before but the values of the attribute.
    """
    if told:
        return "\n".join(_table(train, held_out, attribute)) if attribute else ""
    lines = [f"{train.name}: {len(train):,} pictures to learn from, {len(held_out):,} held out"]
    if len(train) < LITTLE:
        lines.append("  that is little to learn from: samples may be copies of these pictures, or like none")
    if attribute:
        lines += _table(train, held_out, attribute)
    notes = list(dict.fromkeys((*train.notes, *held_out.notes)))
    return "\n".join([*lines, *(f"  {note}" for note in notes)])


def _table(train: LabelledImages, held_out: LabelledImages, attribute: str) -> list[str]:
    values = train.values[attribute]
    rows = [
        (value, int((train.labels[attribute] == i).sum()), int((held_out.labels[attribute] == i).sum()))
        for i, value in enumerate(values)
    ]
    width = max(len(attribute), len("(none)"), *(len(value) for value in values[:MOST]))
    lines = [f"  {attribute:{width}}  learned from  held out"]
    lines += [f"  {value:{width}}  {a:12,}  {b:8,}" for value, a, b in rows[:MOST]]
    if len(values) > MOST:
        lines.append(f"  ... and {len(values) - MOST} more values")
    without = [int((data.labels[attribute] == UNLABELLED).sum()) for data in (train, held_out)]
    if any(without):
        lines.append(f"  {'(none)':{width}}  {without[0]:12,}  {without[1]:8,}")
    rare = [f"{value} ({a})" for value, a, _ in rows if a < FEW]
    if rare:
        lines.append(f"  values of few pictures, of which little can be learned: {', '.join(rare[:MOST])}")
    unseen = [value for value, _, b in rows if not b]
    if unseen:
        lines.append(f"  values without a held-out picture: {', '.join(unseen[:MOST])}")
    return lines
