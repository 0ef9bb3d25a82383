"""Capital letters of real typefaces at 64 pixels, black on white.

The typefaces are those that this machine has: TrueType and OpenType files below `/usr/share/fonts`, or in the
folder that COMPOSABLE_EBM_FONTS names. 140 of Debian's packages `fonts-*`, all of free licences, hold 1,136
faces of 358 families with capital letters; `faces()` lists what was found, for a card.

    letter     26
    bold       weight class of 700 and more against 400 and less; no label between
    italic     slanted or italic, by the font's own flags
    serif      by the font's name, its PANOSE numbers or its IBM class; no label where none tells

A family is in one split alone, so that judges and held-out figures speak of typefaces that no expert has
seen. Each letter of a face is drawn at `DRAWINGS` sizes and places; to learn from also `STRETCHED` times a
little narrower or wider, as by another hand: 800 faces are few, and a network learns them by heart.

Reference:
    Microsoft, OpenType specification, tables OS/2 (usWeightClass, panose, fsSelection) and post (angle).
"""

import hashlib
import os
import string
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from composable_ebm.data.dataset import UNLABELLED, LabelledImages, unknown_name

ENVIRONMENT_VARIABLE = "COMPOSABLE_EBM_FONTS"
SHARES = {"train": 0.7, "validation": 0.1, "test": 0.2}
DRAWINGS = 2
STRETCHED = 2
STRETCH = 0.07  # of the width, either way
MOST_FACES = 8  # of a family, so that one with forty weights does not outweigh forty others

VALUES = {
    "letter": tuple(string.ascii_uppercase),
    "bold": ("regular", "bold"),
    "italic": ("upright", "italic"),
    "serif": ("sans", "serif"),
}

__all__ = ["VALUES", "Face", "faces", "load"]


@dataclass(frozen=True)
class Face:
    """A face of a typeface: one font file.

    Attributes:
        family: Name of the family.
        style: Name of the style, such as "Bold Italic".
        path: The file.
        licence: What the file says of its licence.
        bold: Position of the value, as for the others; -1 where it is not known.
    """

    family: str
    style: str
    path: Path
    licence: str
    bold: int
    italic: int
    serif: int

    @property
    def split(self) -> str:
        """The split of its family, which depends on its name alone."""
        place = int(hashlib.sha256(self.family.encode()).hexdigest()[:8], 16) / 16**8
        below = 0.0
        for split, share in SHARES.items():
            below += share
            if place < below:
                return split
        return "test"


def load(
    split: str = "train", root: str | Path | None = None, size: int = 64, num_images: int | None = None
) -> LabelledImages:
    """Letters with the attributes `letter`, `bold`, `italic` and `serif`.

    Args:
        split: "train", "validation" or "test", for judges; each has families of its own.
        root: Folder of fonts; that of the environment variable or `/usr/share/fonts` unless given.
        size: Height and width in pixels.
        num_images: The first so many of a fixed order; all unless given.
    Returns:
        Images of shape (n, 1, size, size).
    Raises:
        ValueError: If there is no such split.
        FileNotFoundError: If no font there has capital letters.
    """
    if split not in SHARES:
        raise ValueError(unknown_name("split of the letters", split, SHARES))
    folder = Path(root or os.environ.get(ENVIRONMENT_VARIABLE) or "/usr/share/fonts").expanduser()
    mine = [face for face in faces(folder) if face.split == split]
    if not mine:
        raise FileNotFoundError(
            f"{folder} holds no font with capital letters for the {split} split. Install some (on Debian "
            f"apt-get install fonts-liberation fonts-dejavu fonts-lato ...), or name a folder of them in "
            f"{ENVIRONMENT_VARIABLE}."
        )
    images, labels = [], []
    for number, face in enumerate(mine):
        for place, letter in enumerate(string.ascii_uppercase):
            for drawing in range(DRAWINGS + (STRETCHED if split == "train" else 0)):
                generator = np.random.default_rng((number, place, drawing))
                stretch = 1 + STRETCH * generator.uniform(-1, 1) if drawing >= DRAWINGS else 1.0
                images.append(draw(face.path, letter, size, generator, stretch))
                labels.append((place, face.bold, face.italic, face.serif))
    order = np.random.default_rng(0).permutation(len(images))[:num_images]
    table = torch.tensor(labels)[order]
    return LabelledImages(
        torch.from_numpy(np.stack(images)[order]),
        {name: table[:, i].clone() for i, name in enumerate(VALUES)},
        VALUES,
        name=f"letters/{split}",
    )


def draw(
    path: Path, letter: str, size: int, generator: np.random.Generator, stretch: float = 1.0
) -> np.ndarray:
    """One letter, black on white, its height within 56 to 60 % of the picture; bytes (1, size, size).

    Args:
        path: The font's file.
        letter: What is drawn.
        size: Height and width in pixels.
        generator: Draws size and place.
        stretch: How much wider it is than the font has it.
    """
    large = 2 * size
    wide = round(large / stretch)  # what is drawn there becomes as wide as the picture
    font = ImageFont.truetype(str(path), large)
    left, top, right, bottom = font.getbbox(letter)
    height = generator.uniform(0.56, 0.6) * large
    scale = min(height / max(bottom - top, 1), 0.86 * wide / max(right - left, 1))
    font = ImageFont.truetype(str(path), max(4, round(large * scale)))
    left, top, right, bottom = font.getbbox(letter)
    across, down = generator.uniform(-0.01, 0.01, 2) * large
    picture = Image.new("L", (wide, large), 255)
    place = ((wide - right - left) / 2 + across, (large - bottom - top) / 2 + down)
    ImageDraw.Draw(picture).text(place, letter, font=font, fill=0)
    return np.asarray(picture.resize((size, size), Image.Resampling.BOX))[None]


@cache
def faces(folder: Path) -> tuple[Face, ...]:
    """The faces below a folder that draw all capital letters, each differently, at most 8 of a family."""
    found: dict[str, list[Face]] = {}
    seen: set[bytes] = set()
    for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".ttf", ".otf")):
        face = _read(path)
        if face is None or len(found.get(face.family, ())) >= MOST_FACES:
            continue
        try:
            drawn = b"".join(draw(path, letter, 16, np.random.default_rng(0)).tobytes() for letter in "AGQRS")
        except (OSError, ValueError):
            continue
        if drawn not in seen and len(set(drawn)) > 1:
            seen.add(drawn)
            found.setdefault(face.family, []).append(face)
    return tuple(face for family in sorted(found) for face in found[family])


SKIPPED = (
    *("Symbol", "Math", "Music", "Keyboard", "Initials", "Dingbat", "Barcode", "Phonetic", "Braille"),
    *("D050000L", "stmary10", "cmex10", "cmsy10", "msam10", "rsfs10", "eufm10", "Inverted"),
    *("pautada", "Ecolier_court", "Alfa-beta", "Elegan", "Ellhnikh", "MuseumFourteen", "Winks"),
    *("Isabella", "femkeklaver", "F500", "Le Murmure", "Solothurn", "flatline", "Kristi", "Durandus"),
)
"""Words in the names of fonts whose capital letters are none, or are pictures; and those that a small network
which learned to read from the other families took for another letter more often than not."""


def _read(path: Path) -> Face | None:
    """What a font file says of itself; None if it has no capital letters."""
    from fontTools.ttLib import TTFont, TTLibError  # only needed here

    try:
        font = TTFont(path, lazy=True)
        known = font.getBestCmap() or {}
        names, os2, post = font["name"], font["OS/2"], font["post"]
        style = names.getBestSubFamilyName() or ""
        family = names.getBestFamilyName() or path.stem
    except (TTLibError, KeyError, AssertionError, OSError, ValueError):
        return None
    if any(ord(letter) not in known for letter in string.ascii_uppercase):
        return None
    if any(word.lower() in f"{family} {path.stem}".lower() for word in SKIPPED):
        return None
    said = f"{family} {style}".lower()
    slanted = bool(os2.fsSelection & 1) or post.italicAngle != 0 or "italic" in said or "oblique" in said
    licence = " ".join((names.getDebugName(13) or names.getDebugName(14) or "").split())[:200]
    return Face(family, style, path, licence, _bold(os2, said), int(slanted), _serif(os2, said))


def _bold(os2: object, said: str) -> int:
    """1 of weight class 700 or more, or so called; 0 of 400 or less; -1 for what is between."""
    if any(word in said for word in ("semibold", "demi", "semi bold", "medium")):
        return UNLABELLED
    weight = getattr(os2, "usWeightClass", 400)
    if weight >= 700 or "bold" in said or "black" in said or "heavy" in said:
        return 1
    return 0 if weight <= 400 else UNLABELLED


_SERIF = (
    *("arapey", "baskervald", "berenis", "bookman", "c059", "cmu concrete", "cmu typewriter", "caslon"),
    *("charis", "courier", "doulos", "elstob", "essays1743", "fanwood", "gfs artemisia", "gfs didot"),
    *("gnutypewriter", "galatia", "gentium", "goudy bookletter", "induni-c", "induni-n", "induni-p"),
    *("induni-t", "irianis", "junicode", "latin modern mono", "linden hill", "nimbus mono", "p052"),
    *("palladio", "prociono", "quattrocento", "stixgeneral", "schoolbook", "tex gyre bonum", "vollkorn"),
    *("tex gyre cursor", "tex gyre pagella", "tex gyre schola", "tex gyre termes", "mono uralic"),
)
_SANS = (
    *("allerta", "andika", "bebas", "cantarell", "cmu bright", "comfortaa", "fira code", "gfs neohellenic"),
    *("induni-h", "inter", "jetbrains", "junction", "jura", "karla", "karmilla", "league spartan"),
    *("libris", "m plus", "mplus", "manrope", "national park", "quicksand", "roadgeek", "sora", "roboto"),
    *("tex gyre adventor", "tex gyre heros", "tiresias", "verana", "yanone", "osifont", "mononoki"),
    *("okolaks", "ubuntu-title", "oxygen", "gemunu"),
)
"""Families whose files do not say it, in lower case."""


def _serif(os2: object, said: str) -> int:
    """1 with serifs, 0 without, -1 where nothing tells."""
    if "sans" in said or "grotesk" in said or "gothic" in said:
        return 0
    if "serif" in said or "roman" in said or "slab" in said:
        return 1
    panose = getattr(os2, "panose", None)
    style = getattr(panose, "bSerifStyle", 0) if getattr(panose, "bFamilyType", 0) == 2 else 0
    if style > 1:
        return 1 if style <= 10 else 0
    kind = getattr(os2, "sFamilyClass", 0) >> 8
    if said.startswith(_SERIF) or kind in (1, 2, 3, 4, 5, 7):
        return 1
    return 0 if said.startswith(_SANS) or kind == 8 else UNLABELLED
