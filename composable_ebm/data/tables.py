"""What is known about the pictures of a folder: tables as people have them, or the names of subfolders.

    attributes.csv, metadata.csv    a column with the file (`file`, `file_name`, ...), others are attributes;
                                    commas, semicolons, tabs or bars; UTF-8 or UTF-16
    metadata.jsonl                  the same, an object a line
    cat/001.jpg, dog/002.jpg        one attribute, `class`
    train/cat/001.jpg, test/...     the same: train, val and test are parts of one set
    train/metadata.csv, test/...    a table in each part
    001.jpg, 002.jpg                none

Columns become attributes of a few named values:

    words, and whole numbers        as they are; spaces and hyphens between letters become underscores, and
                                    what a recipe cannot hold becomes a name that it can
    other numbers                   cut into `low`, `middle` and `high` at thirds of the pictures
    lists of tags                   an attribute for each tag, `yes` or `no`
    true, false                     `yes`, `no`
"""

from __future__ import annotations

import csv
import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS

from composable_ebm.data.names import value_names

TABLES = ("attributes.csv", "metadata.csv", "metadata.jsonl")
FILE_COLUMNS = ("file", "file_name", "filename", "image", "path")
TAG_COLUMNS = ("tags", "keywords", "labels")
EXTENSIONS = (*IMG_EXTENSIONS, ".gif")
MAX_NUMBERS = 20  # whole numbers that still name values
FEW = 10  # pictures of a value, in the mean, below which many whole numbers are a measurement
NO_NUMBER = ("", "nan", "none", "null", "n/a", "na")
OTHER_TABLES = (".csv", ".tsv", ".json", ".jsonl", ".xlsx", ".xls", ".ods", ".parquet")
PARTS = ("train", "training", "val", "valid", "validation", "dev", "test", "testing")
THIRDS = ("low", "middle", "high")
SHOWN = 5  # renamed values that are listed
_TAGS = re.compile(r"\s*[,;|]\s*")

Row = tuple[int, dict[str, object]]

__all__ = ["TABLES", "THIRDS", "Listing", "list_folder"]


@dataclass
class Listing:
    """The pictures of a folder and what is known about them.

    Attributes:
        files: Paths inside the folder, with `/` between the parts.
        columns: Attribute -> one entry a file, "" where there is no label.
        notes: What was skipped or changed, in sentences.
        about: Attribute -> how its values were made, in sentences.
        unread: Tables that are not read, where they are or as they are called.
    """

    files: list[str]
    columns: dict[str, list[str]]
    notes: list[str] = field(default_factory=list)
    about: dict[str, list[str]] = field(default_factory=dict)
    unread: list[str] = field(default_factory=list)

    @property
    def hint(self) -> str:
        """Where attributes come from, for one who looks for another."""
        if not self.unread:
            return ""
        return (
            f" {', '.join(self.unread[:SHOWN])} is not read: attributes come from the first of "
            f"{', '.join(TABLES)} in the folder itself; call yours so, with a column `file`."
        )


def list_folder(root: Path) -> Listing:
    """The pictures of a folder and their attributes.

    Raises:
        ValueError: If its table cannot be used; the message names the file and the line.
        FileNotFoundError: If a file of the table is missing, or there are no pictures at all.
    """
    found = _look_through(root)
    here = {name.lower(): name for name in found.tables if "/" not in name}
    table = next((here.pop(name) for name in TABLES if name in here), None)
    tables = _tables_of_parts(found) if table is None else [table]
    if tables:
        listing = _of_tables(root, tables, found.pictures)
        others = set(found.pictures) - set(listing.files)
        if others:
            named = " and ".join(tables) + (" do" if len(tables) > 1 else " does")
            listing.notes.append(f"{len(others)} pictures that {named} not name were skipped")
        if table is None:
            found.others.subtract(Path(name).suffix.lower() for name in tables)
            listing.notes.append(_one_set([name.partition("/")[0] for name in tables]))
    else:
        listing = _of_subfolders(root, found.pictures)
    listing.unread = [name for name in found.tables if name not in tables]
    listing.notes += found.notes()
    if not tables and listing.hint:
        listing.notes.append(listing.hint.strip().removesuffix("."))
    return listing


# -- what lies in the folder -----------------------------------------------------------------------


@dataclass
class _Found:
    """What lies in a folder: pictures, tables, and what is neither."""

    pictures: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)
    hidden: int = 0
    closed: list[str] = field(default_factory=list)

    def notes(self) -> list[str]:
        """Sentences about what is skipped."""
        notes = []
        if self.hidden:
            notes.append(f"{self.hidden} pictures in hidden folders or files were skipped")
        if others := +self.others:
            kinds = ", ".join(f"{count} of {kind}" for kind, count in others.most_common(8))
            notes.append(f"files that are no pictures were skipped: {kinds}")
        if self.closed:
            notes.append(f"folders that cannot be opened were skipped: {', '.join(self.closed[:SHOWN])}")
        return notes


def _look_through(root: Path) -> _Found:
    """The pictures under a folder, sorted, and what else is there; links are followed, once."""
    found = _Found()
    seen: set[tuple[int, int]] = set()

    def closed(error: OSError) -> None:
        found.closed.append(f"{error.filename} ({error.strerror})")

    for place, folders, files in os.walk(root, onerror=closed, followlinks=True):
        here = os.stat(place)
        if (here.st_dev, here.st_ino) in seen:  # a link to what was looked through
            folders[:] = []
            continue
        seen.add((here.st_dev, here.st_ino))
        for name in filter(_is_hidden, folders):
            found.hidden += _pictures_directly_in(os.path.join(place, name))
        folders[:] = sorted(name for name in folders if not _is_hidden(name))
        for name in sorted(files):
            path = (Path(place) / name).relative_to(root).as_posix()
            if _is_hidden(name):
                found.hidden += _is_picture(name)
            elif _is_picture(name):
                if os.path.isfile(os.path.join(place, name)):
                    found.pictures.append(path)
                else:  # a pipe would be waited for, a link may lead nowhere
                    found.others["links to nowhere, pipes or devices"] += 1
            else:
                if name.lower() in TABLES or Path(name).suffix.lower() in OTHER_TABLES:
                    found.tables.append(path)
                if path.lower() not in TABLES:
                    found.others[Path(name).suffix.lower() or name] += 1
    found.pictures.sort()
    return found


def _pictures_directly_in(folder: str) -> int:
    try:
        return sum(map(_is_picture, os.listdir(folder)))
    except OSError:
        return 0


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
    notes: list[str] = []
    about: list[str] = []
    parts = [path.split("/")[:-1] for path in pictures]
    tops = sorted({part[0] for part in parts if part})
    if all(parts) and all(top.lower() in PARTS for top in tops):
        notes.append(_one_set(tops))
        parts = [part[1:] for part in parts]
    if not all(parts):
        notes.append("there is no table, so there are no attributes: only p(x) can be learned")
        if deeper := sum(map(bool, parts)):
            notes.append(
                f"{deeper} pictures in subfolders were taken with the {len(parts) - deeper} beside them"
            )
        return Listing(pictures, {}, notes)
    classes = _named("class", [part[0] for part in parts], about)
    return Listing(pictures, {"class": classes}, notes, {"class": about})


def _tables_of_parts(found: _Found) -> list[str]:
    """The tables of a set whose parts have one each, `train/metadata.csv` and `test/metadata.csv`."""
    tops = {picture.partition("/")[0] for picture in found.pictures}
    if not all(top.lower() in PARTS for top in tops):
        return []
    tables = [f"{top}/{name}" for top in sorted(tops) for name in TABLES if f"{top}/{name}" in found.tables]
    return tables if len({name.partition("/")[0] for name in tables}) == len(tables) else []


def _one_set(parts: Sequence[str]) -> str:
    are = "are parts" if len(parts) > 1 else "is a part"
    return f"{', '.join(parts)} {are} of one set, no classes: it is divided anew by file names"


# -- tables ----------------------------------------------------------------------------------------


def _of_tables(root: Path, tables: Sequence[str], pictures: Sequence[str]) -> Listing:
    """What tables say, each of files beside it."""
    entries: list[dict[str, object]] = []
    files: list[str] = []
    left: dict[str, None] = {}
    for name in tables:
        folder = name.rpartition("/")[0]
        before = f"{folder}/" if folder else ""
        own = [picture.removeprefix(before) for picture in pictures if picture.startswith(before)]
        rows, column = _rows_of(root / name)
        files += [before + file for file in _files_of(root / name, rows, column, own)]
        left |= dict.fromkeys(key for _, row in rows for key in row if key != column)
        entries += [row for _, row in rows]
    columns: dict[str, list[str]] = {}
    about: dict[str, list[str]] = {}
    for attribute in left:
        told: list[str] = []
        made = _attributes(attribute, [row.get(attribute) for row in entries], told)
        columns |= made
        about |= dict.fromkeys(made, told)
    return Listing(files, columns, [], about)


def _rows_of(table: Path) -> tuple[list[Row], str]:
    """The rows of a table, and the column that names files."""
    rows = list(_lines_of_json(table) if table.suffix.lower() == ".jsonl" else _rows_of_csv(table))
    names = list(dict.fromkeys(name for _, row in rows for name in row))
    column = next((name for known in FILE_COLUMNS for name in names if name.lower() == known), None)
    if column is None:
        raise ValueError(f"{table} must have a column `file` (or `file_name`), got the columns {names}.")
    return rows, column


def _files_of(table: Path, rows: Sequence[Row], column: str, pictures: Sequence[str]) -> list[str]:
    """The file of each row, beside the table."""
    files: dict[str, int] = {}
    meant = _as_meant(table.parent, pictures)
    for line, row in rows:
        file = meant(_inside(str(row.get(column) or "").strip(), f"{table}, line {line}"))
        if file in files:
            raise ValueError(f"{table} names the file {file!r} twice, in lines {files[file]} and {line}.")
        files[file] = line
    missing = [file for file in files if not (table.parent / file).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of the {len(files)} files in {table} are not in {table.parent}, "
            f"the first of them {missing[0]!r} in line {files[missing[0]]}."
        )
    return list(files)


def _as_meant(root: Path, pictures: Sequence[str]) -> Callable[[str], str]:
    """What a table means by a name: a file that is there, written as on Windows or without its ending."""
    stems = Counter(picture.rpartition(".")[0] for picture in pictures)
    whole = {picture.rpartition(".")[0]: picture for picture in pictures}

    def meant(file: str) -> str:
        if (root / file).is_file():
            return file
        file = file.replace("\\", "/")
        return whole[file] if stems[file] == 1 else file

    return meant


def _inside(file: str, where: str) -> str:
    if not file:
        raise ValueError(f"{where}: the row names no file.")
    path = Path(file)
    if path.is_absolute() or ".." in file.replace("\\", "/").split("/"):
        raise ValueError(f"{where}: {file!r} is not inside the folder.")
    return path.as_posix()


def _text_of(table: Path) -> str:
    """The text of a table in UTF-8 or UTF-16, without its byte-order mark."""
    content = table.read_bytes()
    if content.startswith((b"PK\x03\x04", b"\xd0\xcf\x11\xe0")):
        raise ValueError(f"{table} is a workbook, no table of text: save it as CSV.")
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
    delimiter = max(",;\t|", key=first.count)
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
    return {name: _named(name, texts, notes)}


def _as_text(entry: object) -> str:
    if entry is None:
        return ""
    if isinstance(entry, bool):
        return "yes" if entry else "no"
    return str(entry).strip()


def _named(attribute: str, texts: list[str], notes: list[str]) -> list[str]:
    """Entries as values that recipes can hold, with a note of those that become another word."""
    texts = [unicodedata.normalize("NFC", text.strip()) for text in texts]
    names = value_names(filter(None, texts))
    other = [f"{text!r} {name}" for text, name in names.items() if name != re.sub(r"[\s-]+", "_", text)]
    if other:
        more = f" and {len(other) - SHOWN} more" if len(other) > SHOWN else ""
        notes.append(f"values of {attribute} are called by words: {', '.join(other[:SHOWN])}{more}")
    return [names[text] if text else "" for text in texts]


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
    names = THIRDS if len(ends) == 2 else THIRDS[::2]
    cuts = " and ".join(f"{end:.4g}" for end in ends)
    notes.append(f"{name} has numbers: {', '.join(names[:-1])} and {names[-1]} are cut at {cuts}")
    return ["" if n is None else names[sum(n >= end for end in ends)] for n in numbers]
