"""A folder of your own images, with attributes from a table or from the names of its subfolders.

Either layout will do:

    photos/attributes.csv       file,smile,hair        photos/cat/001.png    one attribute, `class`:
    photos/001.png              001.png,yes,black      photos/cat/002.jpg    "cat" or "dog"
    photos/more/002.jpg         more/002.jpg,,red      photos/dog/001.png

The table has the column `file`, a path inside the folder, and a column for each attribute. Its
values are the entries of its column, in order; an empty one leaves the image unlabelled. Spaces and
hyphens inside an entry become underscores, since values are named in recipes. The folders are those
of `torchvision.datasets.ImageFolder`.

The split of an image depends on the name of its file alone: 80 % of the names are for training, 10 %
for validation and 10 % for tests. New images and another machine leave the others where they are.
"""

import csv
import hashlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

from composable_ebm.data.dataset import UNLABELLED, LabelledImages, unknown_name

TABLE = "attributes.csv"
SHARES = {"train": 0.8, "validation": 0.1, "test": 0.1}
MODES = {1: "L", 3: "RGB"}
MAX_VALUES = 200
_SEPARATORS = re.compile(r"(?<=\w)[\s-]+(?=\w)")  # -1 stays -1


def load(
    split: str = "train",
    root: str | Path | None = None,
    size: int = 32,
    channels: int = 3,
    attributes: Iterable[str] | None = None,
) -> LabelledImages:
    """The images of a folder, cropped to the middle square and resized.

    Args:
        split: "train", "validation" or "test".
        root: The folder.
        size: Height and width in pixels.
        channels: 3 for colour, 1 for grey.
        attributes: The attributes to keep; all unless given.
    Returns:
        Images of shape (n, channels, size, size), in the order of the table or of the file names.
    Raises:
        ValueError: If the table, an image or an argument cannot be used, or the split is empty.
        FileNotFoundError: If the folder, or an image of the table, is not there.
    Example:
        >>> train = load("train", root="photos", size=64)
        >>> smiling = train.where("smile")
    """
    if split not in SHARES:
        raise ValueError(unknown_name("split of a folder", split, SHARES))
    if root is None:
        raise ValueError("a folder of images needs `root`, the folder: load(..., root='photos').")
    root = Path(root).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {root}.")
    table = root / TABLE
    files, columns = _read_table(table) if table.is_file() else _read_classes(root)
    for attribute in columns if attributes is None else (attributes := list(attributes)):
        if attribute not in columns:
            raise ValueError(unknown_name(f"attribute of {root}", attribute, columns))
    values = {name: _values(name, columns[name]) for name in (columns if attributes is None else attributes)}
    chosen = [i for i, file in enumerate(files) if split_of(file) == split]
    if not chosen:
        raise ValueError(
            f"none of the {len(files)} images of {root} falls into the split {split!r}, which takes "
            f"{SHARES[split]:.0%} of the file names: add images."
        )
    labels = {
        name: torch.tensor([v.index(e) if (e := columns[name][i]) else UNLABELLED for i in chosen])
        for name, v in values.items()
    }
    images = read_images([root / files[i] for i in chosen], size, channels, f"{root.name}/{split}")
    return LabelledImages(images, labels, values, name=f"{root.name}/{split}")


def split_of(file: str) -> str:
    """The split of an image: a function of its path inside the folder, with `/` between the parts."""
    share = int.from_bytes(hashlib.sha256(file.encode()).digest()[:8], "big") / 2**64
    for split, part in SHARES.items():
        if share < part:
            return split
        share -= part
    return "test"  # the shares add up to 1 only to rounding


def _read_classes(root: Path) -> tuple[list[str], dict[str, list[str]]]:
    """The files of an `ImageFolder` and its attribute `class`, one entry a file."""
    try:
        found = ImageFolder(str(root))
    except FileNotFoundError as err:
        raise FileNotFoundError(
            f"{root} has neither a table {TABLE} (columns: file, and one for each attribute) nor a "
            f"subfolder of images for each class: {err}"
        ) from err
    files = [Path(path).relative_to(root).as_posix() for path, _ in found.samples]
    classes = [_SEPARATORS.sub("_", name) for name in found.classes]
    return files, {"class": [classes[index] for _, index in found.samples]}


def _read_table(table: Path) -> tuple[list[str], dict[str, list[str]]]:
    """The files of a table and its attributes, one entry a file, "" where there is no label."""
    with table.open(encoding="utf-8-sig", newline="") as opened:  # spreadsheets write a byte-order mark
        rows = list(csv.reader(opened, skipinitialspace=True))
    header = [name.strip() for name in rows[0]] if rows else []
    if "file" not in header:
        raise ValueError(f"{table} must have a column `file`, got the columns {header}.")
    if len(set(header)) < len(header) or "" in header:
        raise ValueError(f"the columns of {table} must have different names, got {header}.")
    columns: dict[str, list[str]] = {name: [] for name in header}
    for line, row in enumerate(rows[1:], start=2):
        if not row:
            continue
        if len(row) != len(header):
            raise ValueError(f"row {line} of {table} must have {len(header)} columns, got {len(row)}: {row}.")
        for name, entry in zip(header, row, strict=True):
            columns[name].append(_SEPARATORS.sub("_", entry.strip()) if name != "file" else entry.strip())
    files = [Path(file).as_posix() for file in columns.pop("file")]
    if len(set(files)) < len(files):
        twice = next(file for file in files if files.count(file) > 1)
        raise ValueError(f"{table} names the file {twice!r} twice.")
    missing = [file for file in files if not (table.parent / file).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of the {len(files)} files in {table} are not in {table.parent}, "
            f"the first of them {missing[0]!r}."
        )
    return files, columns


def _values(attribute: str, entries: Sequence[str]) -> tuple[str, ...]:
    """The values of an attribute: numbers by size, then names by the alphabet."""
    values = {entry for entry in entries if entry}
    if not values:
        raise ValueError(f"attribute {attribute!r} has no value: its column is empty.")
    if len(values) > MAX_VALUES:
        raise ValueError(
            f"attribute {attribute!r} has {len(values)} different values, more than {MAX_VALUES}: group "
            f"them into a few, or leave the column out with load(..., attributes=[...])."
        )
    return tuple(sorted(values, key=lambda v: (0, int(v), v) if v.isdecimal() else (1, 0, v)))


def read_images(paths: Sequence[Path], size: int, channels: int, name: str) -> Tensor:
    """Image files as one tensor.

    Args:
        paths: The files.
        size: Height and width in pixels: the middle square, resized.
        channels: 3 for colour, 1 for grey.
        name: What to call them beside the progress bar.
    Returns:
        Bytes of shape (n, channels, size, size).
    Raises:
        ValueError: If a file is not an image of 8 bits a channel, or `size` or `channels` cannot be.
    """
    if channels not in MODES:
        raise ValueError(f"`channels` must be 1 (grey) or 3 (colour), got {channels}.")
    if size < 1:
        raise ValueError(f"`size` must be at least 1, got {size}.")
    images = torch.empty((len(paths), channels, size, size), dtype=torch.uint8)
    for i, path in enumerate(tqdm(paths, desc=f"reading {name}", unit="image", disable=None, delay=2)):
        try:
            images[i] = pil_to_tensor(_read_image(path, size, MODES[channels]))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as err:
            raise ValueError(f"{path} cannot be read as an image: {err}") from err
    return images


def _read_image(path: Path, size: int, mode: str) -> Image.Image:
    """The middle square of an image, upright, on white where it is transparent."""
    with Image.open(path) as opened:
        opened.draft(mode, (2 * size, 2 * size))  # a JPEG is decoded no larger than needed
        image = ImageOps.exif_transpose(opened)
        if image.mode.startswith(("I", "F")):
            raise ValueError(f"it has pixels of type {image.mode!r}; convert it to 8 bits a channel")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        square = image.convert(mode).crop((left, top, left + side, top + side))
        return square.resize((size, size), Image.Resampling.LANCZOS)
