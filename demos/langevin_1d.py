"""Langevin dynamics in one dimension: a uniform start becomes the density.

Every chain walks downhill in energy and is kicked by noise, x ← x - η dE/dx + √(2η) ξ. No chain
knows the density; together they have it. The shape of each hump is right after a few dozen steps,
the proportion of the two only when chains have crossed between them often enough, which is why
runs must be longer than they first look.

    python demos/langevin_1d.py --out langevin_1d.png
"""

import argparse
from pathlib import Path

import torch

import composable_ebm as ceb
from composable_ebm.plotting import BLUE, GREY, INK, ORANGE, figure, save_figure

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
NUM_CHAINS, STEP_SIZE, REACH = 8_000, 0.01, 4.5
TIMES = (0, 10, 100, 3_000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=IMAGES / "langevin_1d.png")
    options = parser.parse_args()
    torch.set_num_threads(1)

    energy = ceb.analytic.GaussianMixture([[-1.6], [1.2]], [[[0.30]], [[0.22]]], weights=[0.3, 0.7])
    start = REACH * (2 * torch.rand(NUM_CHAINS, 1, generator=torch.Generator().manual_seed(1)) - 1)
    out = ceb.sample(
        energy, init=start, num_steps=TIMES[-1], sampler=ceb.Langevin(STEP_SIZE), keep_every=5, seed=0
    )
    assert out.trajectory is not None
    steps = 5 * torch.arange(len(out.trajectory))

    grid = torch.linspace(-REACH, REACH, 400)
    density = (-energy(grid[:, None])).exp().detach()
    fig, axes = figure(2, len(TIMES), 11, 5.4, height_ratios=[1, 1.15])
    for ax, time in zip(axes[0], TIMES, strict=True):
        x = out.trajectory[time // 5, :, 0]
        ax.hist(x.numpy(), bins=60, range=(-REACH, REACH), density=True, color=ORANGE, alpha=0.55)
        ax.plot(grid, density, color=BLUE)
        right = 100 * (x > 0).float().mean()
        ax.set_title(f"step {time:,}" if time else "start: uniform", loc="left")
        ax.text(0.03, 0.9, f"{right:.0f} % on the right", transform=ax.transAxes, color=INK, fontsize=9)
        ax.set(xlim=(-REACH, REACH), ylim=(0, 1.2 * float(density.max())), yticks=[])

    # The paths of a few chains, time running to the right, one axis for the whole row.
    ax = axes[1, 0]
    ax.set_subplotspec(ax.get_gridspec()[1, :])
    for unused in axes[1, 1:]:
        unused.remove()
    shown = steps <= 1_000
    for k in range(14):
        path = out.trajectory[shown, k, 0]
        colour, width = (ORANGE, 1.1) if k < 3 else (GREY, 0.6)
        ax.plot(steps[shown], path, color=colour, linewidth=width, alpha=0.9, zorder=3 if k < 3 else 2)
    ax.fill_betweenx(grid, 1_010, 1_010 + 150 * density, color=BLUE, alpha=0.25, linewidth=0)
    ax.plot(1_010 + 150 * density, grid, color=BLUE)
    ax.set(xlim=(0, 1_120), ylim=(-REACH, REACH), xlabel="step", ylabel="x")
    ax.set_xticks(range(0, 1_001, 200))
    ax.set_title("fourteen of the chains, and the density they settle into", loc="left")
    save_figure(fig, options.out, dpi=100)
    print(options.out)


if __name__ == "__main__":
    main()
