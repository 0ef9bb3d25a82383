"""A table of pictures with numbers along its sides."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from composable_ebm.plotting import image_grid

# A picture of its own, the same on a light page and on a dark one.
PAPER, INK, GREY, ALERT = "#ffffff", "#1f2d3a", "#5d6b78", "#b8433a"
CELL, GAP = 96, 4  # pixels
LEFT, TOP, RIGHT, BELOW = 84, 8, 8, 60

__all__ = ["labelled_grid"]


def labelled_grid(
    images: Tensor,
    lost: Tensor,
    names: Sequence[str],
    axes: tuple[Sequence[float], Sequence[float]],
) -> Image.Image:
    """Samples at pairs of two weights as one picture.

    Args:
        images: In [-1, 1], cell after cell from the top left, (cells, 1 or 3, height, width).
        lost: Chains that diverged, (cells,): a cross goes through their cells.
        names: What the weights are of, horizontally and vertically.
        axes: The weights from left to right, and from the bottom up.
    """
    columns, rows = len(axes[0]), len(axes[1])
    scale = max(1, round(CELL / images.shape[-1]))
    tiles = [Image.fromarray(image_grid(each[None], padding=0, scale=scale)) for each in images]
    across, down = tiles[0].width + GAP, tiles[0].height + GAP
    bottom = TOP + rows * down
    picture = Image.new("RGB", (LEFT + columns * across + RIGHT, bottom + BELOW), PAPER)
    draw = ImageDraw.Draw(picture)
    for i, (tile, bad) in enumerate(zip(tiles, lost.tolist(), strict=True)):
        x, y = LEFT + i % columns * across, TOP + i // columns * down
        picture.paste(tile, (x, y))
        if bad:
            draw.line((x, y, x + tile.width - 1, y + tile.height - 1), ALERT, 3)
            draw.line((x, y + tile.height - 1, x + tile.width - 1, y), ALERT, 3)
    number, title = ImageFont.load_default(15), ImageFont.load_default(17)
    for i, weight in enumerate(axes[0]):
        draw.text((LEFT + (i + 0.5) * across, bottom + 4), f"{weight:.3g}", GREY, number, "ma")
    for i, weight in enumerate(reversed(axes[1])):
        draw.text((LEFT - 8, TOP + (i + 0.5) * down), f"{weight:.3g}", GREY, number, "rm")
    draw.text((LEFT + columns * across / 2, bottom + 30), f"weight of {names[0]}", INK, title, "ma")
    side = Image.new("RGB", (rows * down, 28), PAPER)
    ImageDraw.Draw(side).text((side.width / 2, 2), f"weight of {names[1]}", INK, title, "ma")
    picture.paste(side.rotate(90, expand=True), (4, TOP))
    return picture
