"""One to five objects at the cells that were asked for, by an expert that was told of one at a time.

`shapes/position` has seen scenes, each with the cell of one of its objects. Here it is asked for up to
five cells at once, as one ratio for each: base + Σᵢ w (E(x, cᵢ) - E(x)). The left column shows what is
asked for; thin frames in the samples show the same cells. Figures on the right are % of samples in
which every cell asked for is taken, and % in which no other is.

    python demos/positions.py --out positions.png
"""

import argparse
import math
from pathlib import Path

import numpy as np
import torch

import composable_ebm as ceb
from composable_ebm.data.shapes import BACKGROUND, cells_taken
from composable_ebm.plotting import BLUE, GREY, INK, figure, image_grid, save_figure

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
REQUESTS: tuple[tuple[str, ...], ...] = (
    ("r1c2",),
    ("r0c0", "r3c3"),
    ("r0c1", "r1c1", "r2c1"),
    ("r0c0", "r0c3", "r3c0", "r3c3"),
    ("r0c1", "r1c0", "r1c1", "r1c2", "r2c1"),
)
COLUMNS, SCALE, PADDING = 9, 3, 6


def row_and_column(cell: str) -> tuple[int, int]:
    """r1c2 -> (1, 2)."""
    row, column = cell.removeprefix("r").split("c")
    return int(row), int(column)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--num-chains", type=int, default=100, help="samples of each row")
    parser.add_argument(
        "--weight", type=float, help="of each ratio; what the expert was stored with if absent"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=IMAGES / "positions.png")
    options = parser.parse_args()
    torch.set_num_threads(1)

    base, position = ceb.load_expert("shapes/base"), ceb.load_expert("shapes/position")
    cells = list(position.card.values)
    grid, size = math.isqrt(len(cells)), base.card.event_shape[-1]
    shown, notes = [], []
    for request in REQUESTS:
        mix = ceb.given(base, *(position[cell] for cell in request), weight=options.weight)
        out = ceb.sample(mix, num_chains=options.num_chains, seed=options.seed)
        taken = cells_taken(out.samples, grid)
        asked = torch.tensor([cell in request for cell in cells])
        all_there = taken[:, asked].all(dim=1)
        none_else = all_there & ~taken[:, ~asked].any(dim=1)
        notes.append((100 * float(all_there.float().mean()), 100 * float(none_else.float().mean())))
        blank = (torch.tensor(BACKGROUND) / 127.5 - 1).view(1, 3, 1, 1).expand(1, 3, size, size)
        shown.append(torch.cat([blank, out.samples[: COLUMNS - 1]]))
        print(f"{', '.join(request)}: all there {notes[-1][0]:.0f} %, and no other {notes[-1][1]:.0f} %")

    picture = image_grid(torch.cat(shown), COLUMNS, padding=PADDING, scale=SCALE)
    height, width = picture.shape[:2]
    fig, axes = figure(1, 1, 10.4, 10.4 * (height + 22) / (width + 180) + 0.1)
    ax = axes[0, 0]
    ax.imshow(picture, interpolation="nearest")
    ax.grid(False)
    ax.spines[:].set_visible(False)
    tile, step = size * SCALE + PADDING, size * SCALE / grid
    for i, request in enumerate(REQUESTS):
        for j in range(COLUMNS):
            for row, column in map(row_and_column, request):
                corner = np.array([j * tile + column * step, i * tile + row * step]) + PADDING - 0.5
                frame = {"facecolor": BLUE if j == 0 else "none", "edgecolor": "white" if j == 0 else INK}
                ax.add_patch(_rectangle(corner, step, frame))
        middle = i * tile + PADDING + tile / 2
        ax.text(width + 10, middle, f"{notes[i][0]:.0f} %", va="center", fontsize=13, color=INK)
        ax.text(width + 100, middle, f"{notes[i][1]:.0f} %", va="center", fontsize=13, color=GREY)
    for x, text, colour in ((width + 10, "all there", INK), (width + 100, "no other", GREY)):
        ax.text(x, -4, text, fontsize=9, color=colour, va="bottom")
    ax.text(PADDING, -4, "asked for", fontsize=9, color=BLUE, va="bottom")
    ax.text(tile + PADDING, -4, "samples, from noise", fontsize=9, color=INK, va="bottom")
    ax.set(xticks=[], yticks=[], xlim=(0, width + 180), ylim=(height, -22))
    save_figure(fig, options.out, dpi=100)
    print(options.out)


def _rectangle(corner: np.ndarray, side: float, look: dict):
    from matplotlib.patches import Rectangle

    return Rectangle(tuple(corner), side, side, linewidth=0.8, alpha=0.9, **look)


if __name__ == "__main__":
    main()
