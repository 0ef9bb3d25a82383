"""Names that recipes can hold, made of any text, so that different texts stay different."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable

RESERVED = "any"
_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_]*|[0-9]+")
_SEPARATORS = re.compile(r"(?<=\w)[\s-]+(?=\w)")  # -1 stays -1

__all__ = ["value_names", "word"]


def word(text: str) -> str:
    """A name of letters, digits and underscores; of letters that it cannot hold, a digest keeps names apart.

    Example:
        >>> word("my cats"), word("Żółw")
        ('my_cats', 'Zow_dc7a14')
    """
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    name = re.sub(r"[^A-Za-z0-9_]+", "_", plain).strip("_")
    lost = sum(c.isalnum() for c in text) - sum(c.isalnum() for c in plain)
    if lost or not name:
        name = f"{name}_{_digest(text)}"
    return f"_{name}" if name[0].isdigit() else name


def value_names(texts: Iterable[str]) -> dict[str, str]:
    """The name of each text as a value of an attribute; no two get the same, however alike they are.

    Words and whole numbers are their own names; spaces and hyphens between letters become underscores.
    """
    names: dict[str, str] = {}
    taken: set[str] = {RESERVED}
    # What is a name already keeps it.
    for text in sorted(set(texts), key=lambda text: (not _PLAIN.fullmatch(text), text)):
        joined = _SEPARATORS.sub("_", text)
        name = joined if _PLAIN.fullmatch(joined) else word(text)
        if name in taken:
            name = f"{name}_{_digest(text)}"
        names[text] = name
        taken.add(name)
    return names


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:6]
