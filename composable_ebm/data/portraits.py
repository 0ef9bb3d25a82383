"""Portraits: cartoon faces at 64 pixels, in the renderer's full variety, labelled by construction.

Picture i of a split is a function of (split, i) alone: every choice is drawn from a generator seeded with
both, every attribute is independent of all others, and every value of an attribute is equally likely.

    smile      smile, twinkle, default against serious, sad, concerned, disbelief, grimace
    glasses    six frames in six colours
    beard      light, medium, majestic
    curly      nine tops against fourteen straight or short ones
    grey_hair  against eight colours
    hair       which of the eight; no label where hair is grey
    skin       seven; clothes: nine colours

What is not an attribute: seven eyes, ten eyebrows, eight clothes with ten prints, six backgrounds, scale
within 5 %, shifts within 3 %. Left out are hats, bald heads and platinum hair, which would leave labels in
doubt.

The style is `avataaars` by Pablo Stanley, free for personal and commercial use. Rendering takes 10 ms a
picture, so a split is rendered once and cached.

Reference:
    https://avataaars.com, https://www.dicebear.com/styles/avataaars
"""

from pathlib import Path
from typing import Any

import numpy as np

from composable_ebm.data import faces
from composable_ebm.data.dataset import UNLABELLED, LabelledImages
from composable_ebm.data.rendered import load_rendered

SIZES = {"train": 72_000, "validation": 2_000, "test": 18_000}

RECIPE = 1

HAIR = {
    "black": "#2c1b18",
    "dark": "#4a312c",
    "brown": "#724133",
    "auburn": "#a55728",
    "blond": "#b58143",
    "golden": "#d6b370",
    "red": "#c93305",
    "pink": "#f59797",
}
_SKIN = {
    "dark": "#614335",
    "brown": "#ae5d29",
    "tan": "#d08b5b",
    "light": "#edb98a",
    "pale": "#ffdbb4",
    "orange": "#fd9841",
    "yellow": "#f8d25c",
}
_CLOTHES = {
    "black": "#262e33",
    "grey": "#929598",
    "white": "#ffffff",
    "navy": "#25557c",
    "sky": "#65c9ff",
    "mint": "#a7ffc4",
    "lemon": "#ffffb1",
    "pink": "#ff488e",
    "red": "#e02d3c",
}
# For each attribute its values, and for each value the dicebear options; one of a list is drawn.
_OPTIONS: dict[str, dict[str, dict[str, tuple[Any, ...]]]] = {
    "smile": {
        "serious": {"mouthVariant": ("serious", "sad", "concerned", "disbelief", "grimace")},
        "smile": {"mouthVariant": ("smile", "twinkle", "default")},
    },
    "glasses": {
        "bare": {"accessoriesProbability": (0,)},
        "glasses": {
            "accessoriesProbability": (100,),
            "accessoriesVariant": (
                *("round", "prescription01", "prescription02"),
                *("sunglasses", "wayfarers", "kurt"),
            ),
        },
    },
    "beard": {
        "shaven": {"facialHairProbability": (0,)},
        "beard": {
            "facialHairProbability": (100,),
            "facialHairVariant": ("beardLight", "beardMedium", "beardMajestic"),
        },
    },
    "curly": {
        "straight": {
            "topVariant": (
                *("bob", "bun", "longButNotTooLong", "miaWallace", "shavedSides", "shortFlat"),
                *("shortRound", "shortWaved", "straight01", "straight02", "straightAndStrand"),
                *("theCaesar", "theCaesarAndSidePart", "shaggyMullet"),
            )
        },
        "curly": {
            "topVariant": (
                *("bigHair", "curly", "dreads", "dreads01", "dreads02"),
                *("frizzle", "fro", "shaggy", "shortCurly"),
            )
        },
    },
    "grey_hair": {
        "coloured": {"hairColor": tuple(HAIR.values())},
        "grey_hair": {"hairColor": ("#e8e1e1",)},
    },
    "skin": {name: {"skinColor": (colour,)} for name, colour in _SKIN.items()},
    "clothes": {name: {"clothesColor": (colour,)} for name, colour in _CLOTHES.items()},
}
_NUISANCES = {
    "eyesVariant": ("default", "happy", "side", "squint", "surprised", "wink", "closed"),
    "eyebrowsVariant": (
        *("default", "defaultNatural", "flatNatural", "raisedExcited", "raisedExcitedNatural"),
        *("upDown", "upDownNatural", "angry", "angryNatural", "sadConcerned"),
    ),
    "accessoriesColor": ("#262e33", "#25557c", "#5199e4", "#ff488e", "#a7ffc4", "#ff5c5c"),
    "clothesVariant": (
        *("blazerAndShirt", "blazerAndSweater", "collarAndSweater", "graphicShirt"),
        *("hoodie", "shirtCrewNeck", "shirtScoopNeck", "shirtVNeck"),
    ),
    "clothesGraphicVariant": (
        *("bat", "bear", "cumbia", "deer", "diamond"),
        *("hola", "pizza", "resist", "skull", "skullOutline"),
    ),
    "backgroundColor": ("#7fb5c9", "#e8eef5", "#c8b48c", "#c9b1d0", "#b5c9a0", "#8c9bb0"),
}
_SHIFT, _DOWN = 3.0, 6.0  # percent of the picture
_SCALE, _SCALE_BY = 1.45, 0.05

VALUES = {**{attribute: tuple(values) for attribute, values in _OPTIONS.items()}, "hair": tuple(HAIR)}


def load(
    split: str = "train",
    root: str | Path | None = None,
    size: int = 64,
    num_images: int | None = None,
    processes: int | None = None,
) -> LabelledImages:
    """Portraits with the attributes above.

    The first call renders the split (72,000 pictures take 14 minutes on one core) and caches it; fewer
    pictures than are cached are the first of them.

    Args:
        split: "train", "validation" or "test", for judges.
        root: Folder of the cache. Without it the first of the usual folders that holds the split,
            or else the one named by COMPOSABLE_EBM_DATA or `~/.cache/composable_ebm`.
        size: Height and width in pixels.
        num_images: How many to draw; `SIZES[split]` unless given.
        processes: Processes that render; as many as there are cores unless given.
    Returns:
        Images of shape (n, 3, size, size) with a label for every attribute, -1 for `hair` where it is grey.
    Raises:
        ValueError: If there is no such split, or a number is not positive.
        ImportError: If the pictures must be rendered and dicebear or resvg is missing.
    """
    return load_rendered("portraits", split, root, size, num_images, processes)


def draw(split: str, index: int) -> tuple[dict[str, int], dict[str, Any]]:
    """The labels of one portrait, and the dicebear options that make it.

    Args:
        split: A split.
        index: The position of the portrait in it.
    """
    generator = np.random.default_rng((64, list(SIZES).index(split), index))
    labels: dict[str, int] = {}
    options: dict[str, Any] = {"seed": "", "topProbability": 100}
    for attribute, values in _OPTIONS.items():
        names = tuple(values)
        labels[attribute] = int(generator.integers(len(names)))
        for name, choices in values[names[labels[attribute]]].items():
            options[name] = faces.one_of(choices, generator)
    for name, choices in _NUISANCES.items():
        options[name] = faces.one_of(choices, generator)
    colours = list(HAIR.values())
    hair = options["hairColor"][0]
    labels["hair"] = colours.index(hair) if hair in colours else UNLABELLED
    options["facialHairColor"] = options["hairColor"]
    across, down = np.round(generator.uniform(-_SHIFT, _SHIFT, 2), 2)
    options["translateX"], options["translateY"] = float(across), float(_DOWN + down)
    options["scale"] = float(np.round(_SCALE * generator.uniform(1 - _SCALE_BY, 1 + _SCALE_BY), 3))
    return labels, options


def render(options: dict[str, Any], size: int = 64) -> np.ndarray:
    """One portrait, bytes of shape (3, size, size); see `faces.render`."""
    return faces.render(options, size)
