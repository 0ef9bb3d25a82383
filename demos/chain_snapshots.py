"""Images along their chains: a composition turns noise into a digit, step by step.

Each row is one chain of a recipe, each column a moment, with the mean energy of the chains below.
Early steps decide a lot, late ones little, so the moments are spaced geometrically.

    python demos/chain_snapshots.py --recipe "contrastive_digits/digit[7]" --out seven.png
"""

import argparse
from pathlib import Path

import numpy as np
import torch

import composable_ebm as ceb
from composable_ebm.plotting import INK, figure, image_grid, save_figure

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
COLUMNS, SCALE, PADDING = 10, 3, 3


def moments(num_steps: int) -> list[int]:
    """Steps to look at: the start, then geometrically spaced up to the end."""
    spaced = np.geomspace(1, max(1, num_steps), COLUMNS - 1).round().astype(int)
    return [0, *sorted(set(spaced.tolist()))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--recipe", default="contrastive_digits/digit[3] + contrastive_digits/slanted")
    parser.add_argument("--num-chains", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=IMAGES / "chain_snapshots.png")
    options = parser.parse_args()
    torch.set_num_threads(1)

    energy = ceb.parse(options.recipe)
    out = ceb.sample(energy, num_chains=options.num_chains, keep_every=1, seed=options.seed)
    assert out.trajectory is not None
    at = moments(out.num_steps)
    shown = out.trajectory[at]  # (moments, chains, *event)
    with torch.no_grad():
        energies = [float(energy(x).mean()) for x in shown]

    picture = image_grid(shown.transpose(0, 1).flatten(0, 1), len(at), padding=PADDING, scale=SCALE)
    height, width = picture.shape[:2]
    fig, axes = figure(1, 1, 10, 10 * height / width + 0.8)
    ax = axes[0, 0]
    ax.imshow(picture, interpolation="nearest")
    ax.grid(False)
    ax.spines[:].set_visible(False)
    cell = (width - PADDING) / len(at)
    names = [f"step {t:,}" if t else "noise" for t in at]
    nats = [f"{e:,.1f} nats" if abs(e) < 100 else f"{e:,.0f} nats" for e in energies]
    labels = [f"{name}\n{value}" for name, value in zip(names, nats, strict=True)]
    ax.set_xticks([PADDING + cell * (i + 0.5) for i in range(len(at))], labels, color=INK)
    ax.set_yticks([])
    ax.tick_params(length=0)
    ax.set_title(out.recipe, loc="left", family="monospace", fontsize=12)
    save_figure(fig, options.out, dpi=100)
    print(options.out)


if __name__ == "__main__":
    main()
