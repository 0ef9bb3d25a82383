"""A folder of your own images, with attributes from a table or from the names of its subfolders.

Any of these will do, see `composable_ebm.data.tables`:

    photos/attributes.csv       file,smile,hair        photos/cat/001.png    one attribute, `class`:
    photos/001.png              001.png,yes,black      photos/cat/002.jpg    "cat" or "dog"
    photos/more/002.jpg         more/002.jpg,,red      photos/dog/001.png

A table has a column with a path inside the folder, and a column for each attribute. Its values are the
entries of its column, in order; an empty one leaves the image unlabelled. Pictures without a table or
subfolders have no attributes.

The split of an image depends on the name of its file alone: 80 % of the names are for training, 10 %
for validation and 10 % for tests. New images and another machine leave the others where they are.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch

from composable_ebm.data.dataset import UNLABELLED, LabelledImages, unknown_name
from composable_ebm.data.pictures import channels_of, check_options, cut_off, read_what_can_be
from composable_ebm.data.tables import THIRDS, Listing, list_folder

SHARES = {"train": 0.8, "validation": 0.1, "test": 0.1}
MAX_VALUES = 200
FEW_VALUES = 10
MUCH = 0.2  # of a picture, cut off
NAMED = 3  # unreadable files that are named
MOST_NAMED = 30  # attributes that are

__all__ = ["MAX_VALUES", "SHARES", "load", "split_of"]


def load(
    split: str = "train",
    root: str | Path | None = None,
    size: int = 32,
    channels: int = 0,
    attributes: Iterable[str] | None = None,
    fit: str = "crop",
) -> LabelledImages:
    """The images of a folder as squares of one size.

    A value is one that some picture for training has. Files that cannot be read are left out, and said in
    the `notes` of what is returned, like everything that was skipped.

    Args:
        split: "train", "validation" or "test".
        root: The folder.
        size: Height and width in pixels.
        channels: 3 for colour, 1 for grey, 0 for what the pictures are.
        attributes: The attributes to keep; all unless given.
        fit: "crop" takes the middle square, "pad" the whole picture with its border's colour around it.
    Returns:
        Images of shape (n, channels, size, size), in the order of the table or of the file names.
    Raises:
        ValueError: If the table or an argument cannot be used, or the split is empty.
        FileNotFoundError: If the folder, or an image of the table, is not there.
    Example:
        >>> train = load("train", root="photos", size=64)
        >>> smiling = train.where("smile")
    """
    if split not in SHARES:
        raise ValueError(unknown_name("split of a folder", split, SHARES))
    if root is None:
        raise ValueError("a folder of images needs `root`, the folder: load(..., root='photos').")
    check_options(size, channels, fit)
    root = Path(root).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {root}.")
    listing = list_folder(root)
    for attribute in listing.columns if attributes is None else (attributes := list(attributes)):
        if attribute not in listing.columns:
            unknown = unknown_name(f"attribute of {root}", attribute, listing.columns)
            why = (
                f" In {root}, {'; '.join(listing.notes[:2])}."
                if not listing.columns and listing.notes
                else ""
            )
            lists = [s for told in listing.about.values() for s in told if s.startswith(f"{attribute} has")]
            raise ValueError(unknown + why + "".join(f" {s}." for s in lists[:1]) + listing.hint)
    splits = [split_of(file) for file in listing.files]
    notes = list(listing.notes)
    if listing.columns and attributes is not None and not attributes:
        notes.append(f"attributes that can be learned, too: {', '.join(list(listing.columns)[:MOST_NAMED])}")
    wanted = listing.columns if attributes is None else attributes
    for name in wanted:
        notes += listing.about.get(name, ())
    values = {name: _values(name, listing.columns[name], splits, notes) for name in wanted}
    name = f"{root.name}/{split}"
    if not any(s == split for s in splits):
        raise ValueError(
            f"none of the {len(splits)} images of {root} falls into the split {split!r}, which takes "
            f"{SHARES[split]:.0%} of the file names: add images."
        )
    return _read(root, listing, [i for i, s in enumerate(splits) if s == split], values, name,
                 (size, channels or channels_of([root / f for f in listing.files]), fit), notes)  # fmt: skip


def split_of(file: str) -> str:
    """The split of an image: a function of its path inside the folder, with `/` between the parts."""
    share = (
        int.from_bytes(hashlib.sha256(file.encode("utf-8", "surrogateescape")).digest()[:8], "big") / 2**64
    )
    for split, part in SHARES.items():
        if share < part:
            return split
        share -= part
    return "test"  # the shares add up to 1 only to rounding


def _read(
    root: Path,
    listing: Listing,
    chosen: list[int],
    values: dict[str, tuple[str, ...]],
    name: str,
    form: tuple[int, int, str],
    notes: list[str],
) -> LabelledImages:
    size, channels, fit = form
    images, unreadable = read_what_can_be(
        [root / listing.files[i] for i in chosen], size, channels, name, fit
    )
    if len(unreadable) == len(chosen):
        first = next(iter(unreadable.values()))
        raise ValueError(f"none of the {len(chosen)} files of {name} can be read as an image: {first}")
    if unreadable:
        shown = [f"{listing.files[chosen[i]]} ({reason})" for i, reason in unreadable.items()]
        more = f" and {len(shown) - NAMED} more" if len(shown) > NAMED else ""
        files = (
            f"{len(shown)} files cannot be read and were"
            if len(shown) > 1
            else "a file cannot be read and was"
        )
        notes.append(f"{files} skipped: {', '.join(shown[:NAMED])}{more}")
    how = "the middle square of each" if fit == "crop" else "each in a square of its border's colour"
    lost = cut_off([root / file for file in listing.files]) if fit == "crop" else 0.0  # as for other splits
    if lost > MUCH:
        how += f", which cuts off {lost:.0%} of them (--data.fit pad keeps all)"
    notes.append(f"{'grey' if channels == 1 else 'colour'}, {size}x{size} pixels, {how}")
    kept = [i for i in range(len(chosen)) if i not in unreadable]
    labels = {
        attribute: torch.tensor([_label(listing.columns[attribute][chosen[i]], known) for i in kept])
        for attribute, known in values.items()
    }
    return LabelledImages(images[kept] if unreadable else images, labels, values, name, tuple(notes))


def _label(entry: str, values: tuple[str, ...]) -> int:
    return values.index(entry) if entry in values else UNLABELLED


def _values(attribute: str, entries: list[str], splits: list[str], notes: list[str]) -> tuple[str, ...]:
    """The values of an attribute among pictures for training: numbers by size, then names by the alphabet."""
    every = Counter(entry for entry in entries if entry)
    if not every:
        raise ValueError(f"attribute {attribute!r} has no value: its column is empty.")
    if len(every) > MAX_VALUES:
        raise ValueError(
            f"attribute {attribute!r} has {len(every)} different values, more than {MAX_VALUES}: group "
            f"them into a few, or leave the column out with load(..., attributes=[...])."
        )
    if len(every) > FEW_VALUES and max(every.values()) == 1:
        raise ValueError(
            f"attribute {attribute!r} has another value for each of its {len(every)} pictures, so there is "
            "nothing to learn: group them into a few."
        )
    seen = Counter(entry for entry, s in zip(entries, splits, strict=True) if entry and s == "train")
    for value, count in every.items():
        if value not in seen:
            notes.append(
                f"{attribute} {value!r} is no value: its {count} pictures all fall outside the training split"
            )
    if not seen:
        raise ValueError(
            f"attribute {attribute!r} has no value for training: its {sum(every.values())} pictures all fall "
            "outside the training split. Label more pictures."
        )
    if set(seen) <= set(THIRDS):
        return tuple(value for value in THIRDS if value in seen)
    return tuple(sorted(seen, key=lambda v: (0, int(v), v) if v.isdecimal() else (1, 0, v)))
