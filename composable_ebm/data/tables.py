"""What is known about the pictures of a folder: tables as people have them, or the names of subfolders.

    attributes.csv, metadata.csv    a column with the file (`file`, `file_name`, ...), others are attributes;
                                    commas, semicolons or tabs; UTF-8 or UTF-16
    metadata.jsonl                  the same, an object a line
    cat/001.jpg, dog/002.jpg        one attribute, `class`
    001.jpg, 002.jpg                none

Columns become attributes of a few named values:

    words, and whole numbers        as they are; spaces and hyphens between letters become underscores
    other numbers                   cut into `low`, `middle` and `high` at thirds of the pictures
    lists of tags                   an attribute for each tag, `yes` or `no`
    true, false                     `yes`, `no`
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS

TABLES = ("attributes.csv", "metadata.csv", "metadata.jsonl")
FILE_COLUMNS = ("file", "file_name", "filename", "image", "path")
TAG_COLUMNS = ("tags", "keywords", "labels")
EXTENSIONS = (*IMG_EXTENSIONS, ".gif")
MAX_NUMBERS = 20  # whole numbers that still name values
FEW = 10  # pictures of a value, in the mean, below which many whole numbers are a measurement
NO_NUMBER = ("", "nan", "none", "null", "n/a", "na")
_SEPARATORS = re.compile(r"(?<=\w)[\s-]+(?=\w)")  # -1 stays -1
_TAGS = re.compile(r"\s*[,;|]\s*")

Row = tuple[int, dict[str, object]]

__all__ = ["TABLES", "Listing", "list_folder"]


@dataclass
class Listing:
    """The pictures of a folder and what is known about them.

    Attributes:
        files: Paths inside the folder, with `/` between the parts.
        columns: Attribute -> one entry a file, "" where there is no label.
        notes: What was skipped, changed or cut, in sentences.
    """

    files: list[str]
    columns: dict[str, list[str]]
    notes: list[str] = field(default_factory=list)


def list_folder(root: Path) -> Listing:
    """The pictures of a folder and their attributes.

    Raises:
        ValueError: If its table cannot be used; the message names the file and the line.
        FileNotFoundError: If a file of the table is missing, or there are no pictures at all.
    """
    pictures, skipped = _pictures(root)
    table = next((root / name for name in TABLES if (root / name).is_file()), None)
    if table is not None:
        listing = _of_table(table)
        others = set(pictures) - set(listing.files)
        if others:
            listing.notes.append(f"{len(others)} pictures that {table.name} does not name were skipped")
    else:
        listing = _of_subfolders(root, pictures)
    listing.notes += skipped
    return listing


# -- what lies in the folder -----------------------------------------------------------------------


def _pictures(root: Path) -> tuple[list[str], list[str]]:
    """The pictures under a folder, sorted, and sentences about what else is there."""
    found: list[str] = []
    others: Counter[str] = Counter()
    hidden = 0
    for place, folders, files in os.walk(root):
        visible = [name for name in folders if not _is_hidden(name)]
        for name in set(folders) - set(visible):
            hidden += sum(map(_is_picture, os.listdir(Path(place) / name)))
        folders[:] = sorted(visible)
        for name in sorted(files):
            path = (Path(place) / name).relative_to(root).as_posix()
            if _is_hidden(name):
                hidden += _is_picture(name)
            elif _is_picture(name):
                found.append(path)
            elif path not in TABLES:
                others[Path(name).suffix.lower() or name] += 1
    notes = [f"{hidden} pictures in hidden folders or files were skipped"] if hidden else []
    if others:
        kinds = ", ".join(f"{count} of {kind}" for kind, count in others.most_common(8))
        notes.append(f"files that are no pictures were skipped: {kinds}")
    return sorted(found), notes


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "__"))


def _is_picture(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS)


def _of_subfolders(root: Path, pictures: list[str]) -> Listing:
    if not pictures:
        raise FileNotFoundError(
            f"{root} holds no pictures ({', '.join(EXTENSIONS)}), neither itself nor in subfolders for each "
            f"class, and no table ({', '.join(TABLES)})."
        )
    if any("/" not in path for path in pictures):
        deeper = sum("/" in path for path in pictures)
        notes = ["there is no table, so there are no attributes: only p(x) can be learned"]
        if deeper:
            notes.append(f"{deeper} pictures in subfolders were taken with those beside them")
        return Listing(pictures, {}, notes)
    classes = [_as_word(path.split("/")[0]) for path in pictures]
    return Listing(pictures, {"class": classes})


# -- tables ----------------------------------------------------------------------------------------


def _of_table(table: Path) -> Listing:
    rows = list(_lines_of_json(table) if table.suffix == ".jsonl" else _rows_of_csv(table))
    notes: list[str] = []
    names = list(dict.fromkeys(name for _, row in rows for name in row))
    column = next((name for known in FILE_COLUMNS for name in names if name.lower() == known), None)
    if column is None:
        raise ValueError(f"{table} must have a column `file` (or `file_name`), got the columns {names}.")
    files: dict[str, int] = {}
    for line, row in rows:
        file = _inside(str(row.get(column) or "").strip(), f"{table}, line {line}")
        if file in files:
            raise ValueError(f"{table} names the file {file!r} twice, in lines {files[file]} and {line}.")
        files[file] = line
    missing = [file for file in files if not (table.parent / file).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of the {len(files)} files in {table} are not in {table.parent}, "
            f"the first of them {missing[0]!r} in line {files[missing[0]]}."
        )
    columns: dict[str, list[str]] = {}
    for name in names:
        if name != column:
            columns |= _attributes(name, [row.get(name) for _, row in rows], notes)
    return Listing(list(files), columns, notes)


def _inside(file: str, where: str) -> str:
    if not file:
        raise ValueError(f"{where}: the row names no file.")
    path = Path(file)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{where}: {file!r} is not inside the folder.")
    return path.as_posix()


def _text_of(table: Path) -> str:
    """The text of a table in UTF-8 or UTF-16, without its byte-order mark."""
    content = table.read_bytes()
    encoding = "utf-16" if content.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(
            f"{table}, line {line}: the byte 0x{content[error.start]:02x} is no "
            f"{encoding.removesuffix('-sig').upper()}: save the table as UTF-8."
        ) from error


def _rows_of_csv(table: Path) -> Iterator[Row]:
    """Rows of a table with the line each begins in."""
    text = _text_of(table)
    first = text.split("\n", 1)[0]
    delimiter = max(",;\t", key=first.count)
    lines = text.splitlines(keepends=True)
    before = csv.field_size_limit(max(len(text), 1))  # long remarks are no mistake
    try:
        reader = csv.reader(lines, delimiter=delimiter, skipinitialspace=True, strict=True)
        header: list[str] = []
        start = 1
        while True:
            try:
                cells = next(reader, None)
            except csv.Error as error:
                raise ValueError(f"{table}, line {start}: {_what_is_wrong(error)}") from error
            if cells is None:
                break
            line, start = start, reader.line_num + 1
            if not any(cell.strip() for cell in cells):
                continue
            if not header:
                header = _checked_header([name.strip() for name in cells], table)
                continue
            if len(cells) != len(header):
                raise ValueError(
                    f"{table}, line {line}: expected {len(header)} columns as in its header, got "
                    f"{len(cells)}: {_shortened(cells)}."
                )
            _refuse_swallowed_rows(lines[line : start - 1], cells, delimiter, header, table, line)
            yield line, dict(zip(header, cells, strict=True))
        if not header:
            _checked_header([], table)
    finally:
        csv.field_size_limit(before)


def _what_is_wrong(error: csv.Error) -> str:
    if "unexpected end of data" in str(error) or "expected after" in str(error):
        return 'a quote (") is opened in this row and not closed: close it, or write it twice ("").'
    return f"{error}."


def _refuse_swallowed_rows(
    inner: Sequence[str], cells: list[str], delimiter: str, header: list[str], table: Path, line: int
) -> None:
    """An unclosed quote that finds its end in another row has taken the rows between into one entry."""
    place = next((i for i, name in enumerate(header) if name.lower() in FILE_COLUMNS), None)
    if place is None or not inner:
        return
    for text in inner:
        parts = text.split(delimiter)
        if len(parts) > place and (table.parent / parts[place].strip().strip('"')).is_file():
            raise ValueError(
                f'{table}, line {line}: a quote (") is opened in this row and not closed, so that the '
                f"following rows would be one entry of it: {_shortened(cells)}."
            )


def _shortened(cells: list[str]) -> str:
    text = str(cells)
    return text if len(text) < 120 else f"{text[:100]}…"


def _checked_header(names: list[str], table: Path) -> list[str]:
    if not any(name.lower() in FILE_COLUMNS for name in names):
        raise ValueError(f"{table} must have a column `file` (or `file_name`), got the columns {names}.")
    if len(set(names)) < len(names) or "" in names:
        raise ValueError(f"the columns of {table} must have different names, got {names}.")
    return names


def _lines_of_json(table: Path) -> Iterator[Row]:
    for line, text in enumerate(_text_of(table).splitlines(), start=1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{table}, line {line}: it is no JSON: {error}.") from error
        if not isinstance(row, dict):
            raise ValueError(f"{table}, line {line}: expected an object, got {text[:40]!r}.")
        yield line, row


# -- columns ---------------------------------------------------------------------------------------


def _attributes(name: str, entries: list[object], notes: list[str]) -> dict[str, list[str]]:
    """The attributes that a column stands for."""
    if any(isinstance(entry, list) for entry in entries):
        return _tags([_listed(entry) for entry in entries], name, notes)
    texts = [_as_text(entry) for entry in entries]
    known = [text for text in texts if text]
    if name.lower() in TAG_COLUMNS and any(_TAGS.search(text) for text in known):
        return _tags([_TAGS.split(text) if text else None for text in texts], name, notes)
    if _is_measurement(known):
        return {name: _cut(name, texts, notes)}
    return {name: [_as_word(text) for text in texts]}


def _as_text(entry: object) -> str:
    if entry is None:
        return ""
    if isinstance(entry, bool):
        return "yes" if entry else "no"
    return str(entry).strip()


def _as_word(text: str) -> str:
    return _SEPARATORS.sub("_", text.strip())


def _listed(entry: object) -> list[str] | None:
    if entry is None:
        return None
    return [_as_text(tag) for tag in entry] if isinstance(entry, list) else [_as_text(entry)]


def _tags(lists: Sequence[list[str] | None], name: str, notes: list[str]) -> dict[str, list[str]]:
    """An attribute for each tag, in the order of their number."""
    counts = Counter(tag for tags in lists if tags for tag in set(tags) if tag)
    notes.append(f"{name} has lists: each of {len(counts)} tags is an attribute of its own, yes or no")
    return {
        tag: ["" if tags is None else "yes" if tag in tags else "no" for tags in lists]
        for tag, _ in counts.most_common()
    }


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _is_measurement(known: list[str]) -> bool:
    """Whether entries are numbers that name no values."""
    entries = [text for text in known if text.lower() not in NO_NUMBER]
    if not entries or any(_number(text) is None for text in entries):
        return False
    distinct = set(entries)
    if all(text.isdecimal() for text in distinct):
        return len(distinct) > MAX_NUMBERS and len(entries) < FEW * len(distinct)
    return True


def _cut(name: str, texts: list[str], notes: list[str]) -> list[str]:
    """Entries as `low`, `middle` and `high` thirds, or `low` and `high` where there are few numbers."""
    numbers = [None if text.lower() in NO_NUMBER else _number(text) for text in texts]
    order = sorted(number for number in numbers if number is not None)
    thirds = [order[len(order) // 3], order[2 * len(order) // 3]]
    ends = sorted({end for end in thirds if end > order[0]}) or [order[-1]]
    names = ["low", "middle", "high"] if len(ends) == 2 else ["low", "high"]
    cuts = " and ".join(f"{end:g}" for end in ends)
    notes.append(f"{name} has numbers: {' and '.join(names)} are cut at {cuts}")
    return ["" if n is None else names[sum(n >= end for end in ends)] for n in numbers]
