"""Scenes of one to five simple objects on a grid of cells, with labels for one of the objects.

The task is that of the CLEVR tables: experts of "there is an object at cell c" are composed, and a
judge counts the images in which every cell that was asked for is taken. So an image holds several
objects, and its labels `position`, `shape` and `colour` are those of ONE of them, drawn at random:

    p(x given position = c) = p(x) * K * [c is taken in x] / count(x)        for K cells

The other objects are anywhere else, so the product of such ratios for several cells has mass
exactly where all of them are taken. It prefers scenes of few objects, which is the price of a label
that says nothing of the others: of n objects with k cells asked for at weight w, see `count_shares`,

    p(n given k cells) ∝ p(n) * n (n - 1) ... (n - k + 1) / n^(w k)

For the judge there is the truth about every cell: `at_r1c2` says whether the cell in row 1 and
column 2 (from 0, at the top left) is taken. `cells_taken` reads it off any picture.

Image i of a split is a function of (split, i) alone. Scenes are drawn when they are loaded, 20,000
in 5 s; nothing is cached.

Reference:
    Liu, Li, Du, Torralba, Tenenbaum (2022), Compositional visual generation with composable
    diffusion models, ECCV, arXiv 2206.01714, section 5 (CLEVR, object positions).
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from composable_ebm.data.dataset import LabelledImages, unknown_name

SIZES = {"train": 20_000, "validation": 2_000, "test": 5_000}
SHAPES = ("circle", "square", "triangle")
COLOURS = {"red": (220, 50, 47), "green": (60, 160, 60), "blue": (45, 95, 210), "yellow": (240, 190, 40)}
BACKGROUND = (200, 200, 200)

MAX_OBJECTS = 5
RADIUS = 0.34  # of a circle, in cells
JITTER = 0.1  # of its centre from that of its cell, in cells: it never leaves its cell

_BLOCK = 1000  # scenes drawn from one generator; to change it is to change every scene


def load(
    split: str = "train",
    root: str | Path | None = None,
    size: int = 32,
    num_images: int | None = None,
    grid: int = 4,
    num_objects: tuple[int, int] = (1, MAX_OBJECTS),
) -> LabelledImages:
    """Scenes with the attributes `position`, `shape` and `colour` of one object, and all cells.

    Args:
        split: "train", "validation" or "test", for judges.
        root: Not used: there is nothing to read.
        size: Height and width in pixels.
        num_images: How many; `SIZES[split]` unless given.
        grid: Rows and columns of cells; each holds at most one object.
        num_objects: The smallest and the largest number of objects, each number equally likely.
    Returns:
        Images of shape (n, 3, size, size). The values of `position` are "r0c0", "r0c1", ...; those of
        `at_r0c0` and so on "free" and "taken".
    Raises:
        ValueError: If there is no such split, or a number cannot be.
    Example:
        >>> scenes = load("train")
        >>> scenes.values["position"][6]
        'r1c2'
    """
    if split not in SIZES:
        raise ValueError(unknown_name("split of the shapes", split, SIZES))
    num_images = SIZES[split] if num_images is None else num_images
    if num_images < 1:
        raise ValueError(f"`num_images` must be at least 1, got {num_images}.")
    if grid < 1 or size < 4 * grid:
        raise ValueError(f"a cell must be 4 pixels or more, got `size` {size} and `grid` {grid}.")
    fewest, most = num_objects
    if not 1 <= fewest <= most <= min(MAX_OBJECTS, grid * grid):
        raise ValueError(
            f"`num_objects` must be two numbers between 1 and {min(MAX_OBJECTS, grid * grid)}, the smaller "
            f"first, got {num_objects}."
        )
    images, labels = [], []
    for block in range(-(-num_images // _BLOCK)):
        scenes = _draw(split, block, grid, fewest, most)
        images.append(_render(scenes, size, grid))
        labels.append(_labels(scenes, grid))
    cells = tuple(f"r{row}c{column}" for row in range(grid) for column in range(grid))
    values = {"position": cells, "shape": SHAPES, "colour": tuple(COLOURS)}
    values["count"] = tuple(str(n) for n in range(1, MAX_OBJECTS + 1))
    values |= {f"at_{cell}": ("free", "taken") for cell in cells}
    return LabelledImages(
        images=torch.cat(images)[:num_images],
        labels={name: torch.cat([part[name] for part in labels])[:num_images] for name in values},
        values=values,
        name=f"shapes/{split}",
    )


def cells_taken(x: Tensor, grid: int = 4) -> Tensor:
    """Which cells of any pictures hold something, by the ink in them, (batch, cells).

    A cell counts as taken from two thirds of the ink of the object that has the least, a yellow
    triangle, so that a faint ghost is no object.

    Args:
        x: Pictures in [-1, 1], shape (batch, 3, size, size).
        grid: Rows and columns of cells, which are in reading order.
    """
    background = torch.tensor(BACKGROUND, device=x.device).view(1, 3, 1, 1) / 127.5 - 1
    contrast = min(sum(abs(c - b) for c, b in zip(rgb, BACKGROUND, strict=True)) for rgb in COLOURS.values())
    least = contrast / (3 * 127.5) * 2 * RADIUS**2  # of a triangle, the smallest shape
    side = x.shape[-1] // grid
    ink = (x - background).abs().mean(dim=1).unflatten(1, (grid, side)).unflatten(3, (grid, side))
    return ink.mean(dim=(2, 4)).flatten(1) > 2 / 3 * least


def count_shares(asked: int, weight: float = 1.0) -> Tensor:
    """p(n objects given that `asked` cells are asked for by ratios of a weight), n = 1 to 5.

    What a perfect expert of `position` composed with a perfect p(x) would show, shape (5,).
    """
    counts = torch.arange(1, MAX_OBJECTS + 1, dtype=torch.float64)
    ways = torch.stack([(counts - i).clamp(min=0) for i in range(asked)]).prod(dim=0)
    shares = ways / counts ** (weight * asked)
    return shares / shares.sum()


def _draw(split: str, block: int, grid: int, fewest: int, most: int) -> dict[str, Tensor]:
    """A block of scenes: for each of MAX_OBJECTS objects its cell, shape, colour and jitter.

    Returns:
        `count` of shape (n,); `cell`, `shape` and `colour` of shape (n, objects); `jitter` of shape
        (n, objects, 2), right and down in cells. Objects from `count` on are not there; the first is
        the one that the labels are about.
    """
    generator = np.random.default_rng((list(SIZES).index(split), block))
    size = (_BLOCK, MAX_OBJECTS)
    scenes = {
        "count": generator.integers(fewest, most, _BLOCK, endpoint=True),
        "shape": generator.integers(len(SHAPES), size=size),
        "colour": generator.integers(len(COLOURS), size=size),
        "jitter": generator.uniform(-JITTER, JITTER, (*size, 2)).astype(np.float32),
        # Different cells in random order, so that the first is any of those that are taken.
        "cell": generator.random((_BLOCK, grid * grid)).argsort(axis=1)[:, :MAX_OBJECTS],
    }
    return {name: torch.from_numpy(drawn) for name, drawn in scenes.items()}


def _labels(scenes: dict[str, Tensor], grid: int) -> dict[str, Tensor]:
    """The labels of a block of scenes."""
    cell, count = scenes["cell"], scenes["count"]
    there = torch.arange(cell.shape[1]) < count[:, None]
    taken = torch.zeros(len(cell), grid * grid, dtype=torch.int64).scatter_(1, cell, there.long())
    labels = {"position": cell[:, 0], "shape": scenes["shape"][:, 0], "colour": scenes["colour"][:, 0]}
    labels["count"] = count - 1
    for index, column in enumerate(taken.unbind(dim=1)):
        labels[f"at_r{index // grid}c{index % grid}"] = column
    return {name: label.contiguous() for name, label in labels.items()}


def _render(scenes: dict[str, Tensor], size: int, grid: int) -> Tensor:
    """A block of scenes, bytes of shape (n, 3, size, size), with soft edges of one pixel."""
    pixel = grid / size  # in cells
    points = (torch.arange(size) + 0.5) * pixel
    palette = torch.tensor(list(COLOURS.values()), dtype=torch.float32)
    image = torch.tensor(BACKGROUND, dtype=torch.float32).view(1, 3, 1, 1).expand(_BLOCK, 3, size, size)
    for k in range(scenes["cell"].shape[1]):
        cell, jitter = scenes["cell"][:, k], scenes["jitter"][:, k]
        across = points - (cell % grid + 0.5 + jitter[:, 0])[:, None]  # (n, size)
        down = points - (cell // grid + 0.5 + jitter[:, 1])[:, None]
        u, v = across[:, None, :], down[:, :, None]
        distance = torch.stack([_circle(u, v), _square(u, v), _triangle(u, v)], dim=1)
        distance = distance[torch.arange(len(cell)), scenes["shape"][:, k]]
        cover = (0.5 - distance / pixel).clamp(0, 1) * (k < scenes["count"])[:, None, None]
        colour = palette[scenes["colour"][:, k]][:, :, None, None]
        image = torch.lerp(image, colour, cover[:, None])
    return image.round().byte()


# Signed distances from the outline, negative inside, exact near the sides; u right and v down.


def _circle(u: Tensor, v: Tensor) -> Tensor:
    return torch.hypot(u, v) - RADIUS


def _square(u: Tensor, v: Tensor) -> Tensor:
    half = 0.5 * np.pi**0.5 * RADIUS  # of the area of the circle
    return torch.maximum(u.abs(), v.abs()) - half


def _triangle(u: Tensor, v: Tensor) -> Tensor:
    """Upright, as wide and as high as the circle."""
    sides = (2 * u.abs() - v - RADIUS) / 5**0.5
    return torch.maximum(v - RADIUS, sides)
