"""Cartoon faces with labels that are true by construction, rendered by dicebear and resvg.

Image i of a split is a function of (split, i) alone: every choice is drawn from a generator seeded
with both, every attribute is independent of all others, and every value of an attribute is equally
likely. What is not an attribute (eyes, eyebrows, the cut within straight or curly, the frame of the
glasses, a shift of up to two thirds of a pixel) varies little, so that small experts can learn it.

    smile, glasses, beard, curly, grey_hair   binary; value 1 has the attribute
    skin, clothes                             a colour each

The style is `avataaars` by Pablo Stanley, free for personal and commercial use. Rendering takes
7 ms an image, so a split is rendered once and cached.

Reference:
    https://avataaars.com, https://www.dicebear.com/styles/avataaars
"""

import functools
import importlib.resources
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from composable_ebm.data.combinations import parse_combinations, without
from composable_ebm.data.dataset import LabelledImages
from composable_ebm.data.rendered import load_rendered

SIZES = {"train": 20_000, "validation": 2_000, "test": 5_000}

RECIPE = 1

# For each attribute its values, and for each value the dicebear options; one of a list is drawn.
_HAIR_COLOURS = {"coloured": ("#2c1b18", "#d6b370", "#c93305"), "grey_hair": ("#e8e1e1",)}
_OPTIONS: dict[str, dict[str, dict[str, tuple[Any, ...]]]] = {
    "smile": {"serious": {"mouthVariant": ("serious",)}, "smile": {"mouthVariant": ("smile",)}},
    "glasses": {
        "bare": {"accessoriesProbability": (0,)},
        "glasses": {
            "accessoriesProbability": (100,),
            "accessoriesVariant": ("prescription02", "sunglasses"),
        },
    },
    "beard": {
        "shaven": {"facialHairProbability": (0,)},
        "beard": {"facialHairProbability": (100,), "facialHairVariant": ("beardMajestic", "beardMedium")},
    },
    "curly": {
        "straight": {"topVariant": ("shortFlat", "straight01")},
        "curly": {"topVariant": ("fro", "dreads02")},
    },
    "grey_hair": {value: {"hairColor": colours} for value, colours in _HAIR_COLOURS.items()},
    "skin": {
        "pale": {"skinColor": ("#ffdbb4",)},
        "tan": {"skinColor": ("#d08b5b",)},
        "brown": {"skinColor": ("#8d5524",)},
    },
    "clothes": {
        "red": {"clothesColor": ("#e02d3c",)},
        "blue": {"clothesColor": ("#2a5fd0",)},
        "green": {"clothesColor": ("#4caf50",)},
        "black": {"clothesColor": ("#262e33",)},
    },
}
_NUISANCES = {"eyesVariant": ("default", "happy"), "eyebrowsVariant": ("default", "raisedExcited")}
_FIXED = {
    "seed": "",
    "scale": 1.45,
    "topProbability": 100,
    "backgroundColor": ["#7fb5c9"],
    "accessoriesColor": ["#262e33"],
    "clothesVariant": ["shirtCrewNeck"],
}
_TRANSLATE_Y = 6.0  # percent of the image, as is the shift
_SHIFT = 2.0

VALUES = {attribute: tuple(values) for attribute, values in _OPTIONS.items()}


def load(
    split: str = "train",
    root: str | Path | None = None,
    size: int = 32,
    num_images: int | None = None,
    exclude: Iterable[str] = (),
    processes: int | None = None,
) -> LabelledImages:
    """Faces with the attributes `smile`, `glasses`, `beard`, `curly`, `grey_hair`, `skin`, `clothes`.

    The first call renders the split (20,000 images take 150 s on one core) and caches it; fewer
    images than are cached are the first of them.

    Args:
        split: "train", "validation" or "test", for judges.
        root: Folder of the cache. Without it the first of the usual folders that holds the split,
            or else the one named by COMPOSABLE_EBM_DATA or `~/.cache/composable_ebm`.
        size: Height and width in pixels.
        num_images: How many to draw, before any are excluded; `SIZES[split]` unless given.
        exclude: Combinations to hold out. An image is dropped if it has all the attributes of any
            of them. An attribute is `smile` (value 1), `~smile` (value 0) or `skin[tan]`.
        processes: Processes that render; as many as there are cores unless given.
    Returns:
        Images of shape (n, 3, size, size) with a label for every attribute.
    Raises:
        TypeError: If `exclude` is a single text.
        ValueError: If there is no such split or attribute, or a number is not positive.
        ImportError: If the images must be rendered and dicebear or resvg is missing.
    Example:
        >>> train = load("train", exclude=("smile+glasses+beard",))
    """
    held_out = parse_combinations(exclude, VALUES, "faces")
    return without(load_rendered("faces", split, root, size, num_images, processes), held_out)


def draw(split: str, index: int) -> tuple[dict[str, int], dict[str, Any]]:
    """The labels of one face, and the dicebear options that make it.

    Args:
        split: A split.
        index: The position of the face in it.
    Returns:
        For each attribute the position of its value; and options in which nothing is left to chance.
    """
    generator = np.random.default_rng((list(SIZES).index(split), index))
    labels, options = {}, dict(_FIXED)
    for attribute, values in VALUES.items():
        labels[attribute] = int(generator.integers(len(values)))
        for name, choices in _OPTIONS[attribute][values[labels[attribute]]].items():
            options[name] = one_of(choices, generator)
    for name, choices in _NUISANCES.items():
        options[name] = one_of(choices, generator)
    options["facialHairColor"] = options["hairColor"]
    across, down = np.round(generator.uniform(-_SHIFT, _SHIFT, 2), 2)
    options["translateX"], options["translateY"] = float(across), float(_TRANSLATE_Y + down)
    return labels, options


def one_of(choices: tuple[Any, ...], generator: np.random.Generator) -> Any:
    """One of the choices: a number as such, names and colours as the lists that dicebear expects."""
    choice = choices[int(generator.integers(len(choices)))]
    return choice if isinstance(choice, int) else [choice]


def render(options: dict[str, Any], size: int = 32) -> np.ndarray:
    """One face, rendered at twice its size and averaged over 2x2 pixels.

    Args:
        options: Options of dicebear's style `avataaars`.
        size: Height and width in pixels.
    Returns:
        Bytes of shape (3, size, size).
    Raises:
        ImportError: If dicebear or resvg is missing.
    """
    dicebear, resvg, style = _renderer()
    svg = str(dicebear.Avatar(style, options))
    png = resvg.svg_to_bytes(svg_string=svg, width=2 * size, height=2 * size, skip_system_fonts=True)
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), dtype=np.uint16)
    means = (pixels.reshape(size, 2, size, 2, 3).sum(axis=(1, 3)) + 2) // 4
    return means.astype(np.uint8).transpose(2, 0, 1)


@functools.cache
def _renderer() -> tuple[Any, Any, Any]:
    """The modules dicebear and resvg_py, and the parsed style; imported only when one is rendered."""
    try:
        import dicebear
        import resvg_py

        definition = importlib.resources.files("dicebear_styles") / "avataaars.json"
    except ImportError as err:
        raise ImportError(
            f"rendering faces needs dicebear-core, dicebear-styles and resvg-py, and {err.name!r} is "
            "missing: pip install 'composable_ebm[faces]'. Faces that are already cached need none of them."
        ) from err
    return dicebear, resvg_py, dicebear.Style(json.loads(definition.read_text(encoding="utf-8")))
