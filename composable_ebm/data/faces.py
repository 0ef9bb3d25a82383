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
import hashlib
import importlib.resources
import io
import json
import multiprocessing
import os
import re
import tempfile
import warnings
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from composable_ebm.data.dataset import LabelledImages, unknown_name
from composable_ebm.data.root import download_root, search_path

SIZES = {"train": 20_000, "validation": 2_000, "test": 5_000}

# Raise it with every change to what is drawn: caches of another recipe are not read.
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

_CHUNK = 100  # images that a process renders before it reports


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
    if split not in SIZES:
        raise ValueError(unknown_name("split of the faces", split, SIZES))
    num_images = SIZES[split] if num_images is None else num_images
    processes = os.cpu_count() or 1 if processes is None else processes
    for name, number in (("size", size), ("num_images", num_images), ("processes", processes)):
        if number < 1:
            raise ValueError(f"`{name}` must be at least 1, got {number}.")
    if isinstance(exclude, str):
        raise TypeError(f"`exclude` must be a list of combinations: exclude=({exclude!r},).")
    held_out = [parse_combination(combination) for combination in exclude]
    images, labels = _cached(split, None if root is None else Path(root), size, num_images, processes)
    faces = LabelledImages(images, labels, VALUES, name=f"faces/{split}")
    for combination in held_out:
        has_all = torch.ones(len(faces), dtype=torch.bool)
        for attribute, value in combination.items():
            has_all &= faces.labels[attribute] == value
        faces = faces.select(~has_all)
    return faces


def parse_combination(text: str) -> dict[str, int]:
    """The labels that a combination such as "smile+~beard+skin[tan]" asks for.

    Raises:
        ValueError: If an attribute or value is unknown, or named twice.
    Example:
        >>> parse_combination("smile+~beard+skin[tan]")
        {'smile': 1, 'beard': 0, 'skin': 1}
    """
    labels: dict[str, int] = {}
    for term in text.split("+"):
        match = re.fullmatch(r"(~?)\s*(\w+)(?:\[(\w+)\])?", term.strip())
        if match is None or (match[1] and match[3]):
            raise ValueError(
                f"each attribute of a combination must read `smile`, `~smile` or `skin[tan]`, "
                f"got {term.strip()!r} in {text!r}."
            )
        negated, attribute, value = match.groups()
        if attribute not in VALUES:
            raise ValueError(unknown_name("attribute of the faces", attribute, VALUES))
        values = VALUES[attribute]
        if value is None and len(values) > 2:
            raise ValueError(
                f"{attribute!r} has {len(values)} values: write one of "
                f"{', '.join(f'{attribute}[{v}]' for v in values)} in {text!r}."
            )
        if value is not None and value not in values:
            raise ValueError(unknown_name(f"value of {attribute!r}", value, values))
        if attribute in labels:
            raise ValueError(f"{attribute!r} is named twice in {text!r}.")
        labels[attribute] = int(not negated) if value is None else values.index(value)
    return labels


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
            options[name] = _one_of(choices, generator)
    for name, choices in _NUISANCES.items():
        options[name] = _one_of(choices, generator)
    options["facialHairColor"] = options["hairColor"]
    across, down = np.round(generator.uniform(-_SHIFT, _SHIFT, 2), 2)
    options["translateX"], options["translateY"] = float(across), float(_TRANSLATE_Y + down)
    return labels, options


def _one_of(choices: tuple[Any, ...], generator: np.random.Generator) -> Any:
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


def _render_range(split: str, start: int, stop: int, size: int) -> np.ndarray:
    """Faces start to stop - 1 of a split, bytes of shape (stop - start, 3, size, size)."""
    return np.stack([render(draw(split, index)[1], size) for index in range(start, stop)])


def _render_all(split: str, size: int, num_images: int, processes: int) -> Tensor:
    """The first faces of a split, rendered in several processes."""
    _renderer()  # what is missing is said here, not in a worker
    starts = range(0, num_images, _CHUNK)
    images = np.empty((num_images, 3, size, size), dtype=np.uint8)
    with tqdm(total=num_images, desc=f"rendering faces/{split}", unit="face", disable=None) as progress:

        def put(start: int, chunk: np.ndarray) -> None:
            images[start : start + len(chunk)] = chunk
            progress.update(len(chunk))

        processes = min(processes, len(starts))
        if processes == 1:
            for start in starts:
                put(start, _render_range(split, start, min(start + _CHUNK, num_images), size))
            return torch.from_numpy(images)
        # Spawned, because a fork of a process that has used torch's threads may hang.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(processes, mp_context=context) as pool:
            try:
                stops = [min(start + _CHUNK, num_images) for start in starts]
                repeat = len(starts)
                chunks = pool.map(_render_range, [split] * repeat, starts, stops, [size] * repeat)
                for start, chunk in zip(starts, chunks, strict=True):
                    put(start, chunk)
            except BrokenProcessPool as err:
                err.add_note(
                    "while rendering faces: a script that loads them in several processes must do so "
                    'under `if __name__ == "__main__":`; or render in one: load(..., processes=1).'
                )
                raise
    return torch.from_numpy(images)


def _cached(
    split: str, root: Path | None, size: int, num_images: int, processes: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """The first faces of a split and their labels, from the cache or else rendered into it."""
    stem = f"recipe{RECIPE}-{size}px-{split}"
    roots = search_path() if root is None else (root.expanduser(),)
    for path in (path for folder in roots for path in _holding(folder / "faces", stem, num_images)):
        try:
            images, labels = _read(path)
        except (SafetensorError, ValueError, OSError) as err:
            warnings.warn(f"{path} is damaged and will not be used: {err}", stacklevel=3)
            continue
        return images[:num_images], {name: label[:num_images] for name, label in labels.items()}
    images = _render_all(split, size, num_images, processes)
    drawn = [draw(split, index)[0] for index in range(num_images)]
    labels = {name: torch.tensor([label[name] for label in drawn]) for name in VALUES}
    folder = (download_root() if root is None else root.expanduser()) / "faces"
    _write(folder / f"{stem}-{num_images}.safetensors", images, labels)
    return images, labels


def _holding(folder: Path, stem: str, num_images: int) -> list[Path]:
    """The caches in a folder that hold enough images, the smallest first."""
    sizes = {path: int(path.stem.rpartition("-")[2]) for path in folder.glob(f"{stem}-*.safetensors")}
    return sorted((path for path, held in sizes.items() if held >= num_images), key=sizes.__getitem__)


def _write(path: Path, images: Tensor, labels: dict[str, Tensor]) -> None:
    """Writes a cache in one move, so that nobody reads half of one, readable to whom the umask allows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {"images": images, **labels}
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as folder:
        written = Path(folder) / path.name
        written.write_bytes(save(tensors, metadata={"sha256": _digest(tensors)}))
        written.replace(path)


def _read(path: Path) -> tuple[Tensor, dict[str, Tensor]]:
    """Images and labels of a cache.

    Raises:
        ValueError: If they are not what was written.
    """
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in ("images", *VALUES)}
        expected = (file.metadata() or {}).get("sha256")
    if _digest(tensors) != expected:
        raise ValueError("its checksum does not match")
    return tensors.pop("images"), tensors


def _digest(tensors: dict[str, Tensor]) -> str:
    """The SHA-256 of some tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].contiguous().numpy().data)
    return digest.hexdigest()
