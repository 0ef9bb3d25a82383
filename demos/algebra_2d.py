"""The algebra of energies, drawn: what +, *, |, - and ~ do to two densities of the plane.

`a` is a ring and `b` a blob that overlaps its right side, both closed forms. Shades are the exact
density of each expression, computed on a grid; dots are samples of it, drawn by HMC through the
same call that samples trained experts. No expression was trained.

    python demos/algebra_2d.py --out algebra_2d.png
"""

import argparse
from pathlib import Path

import torch
from matplotlib.colors import LinearSegmentedColormap

import composable_ebm as ceb
from composable_ebm.plotting import BLUE, GREY, ORANGE, figure, save_figure

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
REACH, NUM_CHAINS = 3.0, 400
SHADE_LEVELS = [0.07 + 0.93 * i / 16 for i in range(17)]
SHADES = LinearSegmentedColormap.from_list("shades", ["white", "#cfdfeb", "#8fb4d1", BLUE])


def expressions() -> dict[str, tuple[str, ceb.Energy]]:
    """Title -> what it means, and the expression itself."""
    a = ceb.analytic.Rings([1.5], width=0.3).named("a")
    b = ceb.analytic.Gaussian([1.3, 0.3], [[0.5, 0.2], [0.2, 0.8]]).named("b")
    base = ceb.analytic.Gaussian([0.0, 0.0], 1.5).named("base")
    return {
        "a": ("a ring", a),
        "b": ("a blob", b),
        "a + b": ("AND: both", a + b),
        "2*a + b": ("AND, a counts twice", 2 * a + b),
        "a | b": ("OR: either", a | b),
        "a & ~b": ("a, and NOT b", a & ~b),
        "base + ratio(a, b)": ("more like a than like b", base + ceb.ratio(a, b)),
        "a / 3": ("a at temperature 3", a / 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=IMAGES / "algebra_2d.png")
    options = parser.parse_args()
    torch.set_num_threads(1)

    axis = torch.linspace(-REACH, REACH, 241)
    across, up = torch.meshgrid(axis, axis, indexing="xy")
    points = torch.stack([across, up], dim=-1).reshape(-1, 2)
    start = 1.5 * torch.randn(NUM_CHAINS, 2, generator=torch.Generator().manual_seed(0))
    fig, axes = figure(2, 4, 11, 6.1)
    for ax, (title, (meaning, energy)) in zip(axes.flat, expressions().items(), strict=True):
        kernel = ceb.HMC(0.2, num_leapfrog=6, target_acceptance=0.8)
        out = ceb.sample(energy, init=start, num_steps=100, num_warmup=50, sampler=kernel, seed=0)
        density = energy(points).neg().softmax(0).reshape(across.shape).detach()
        relative = density / density.max()
        ax.contourf(across, up, relative.sqrt(), levels=SHADE_LEVELS, cmap=SHADES)
        ax.contour(across, up, relative, levels=[0.05, 0.3, 0.7], colors=GREY, linewidths=0.7)
        x = out.samples
        ax.scatter(x[:, 0], x[:, 1], s=4, color=ORANGE, alpha=0.8, linewidths=0)
        ax.set(xlim=(-REACH, REACH), ylim=(-REACH, REACH), xticks=[], yticks=[], aspect="equal")
        ax.spines[:].set(visible=True, color="#dfe4e8")
        ax.grid(False)
        ax.set_title(title, loc="left", family="monospace", fontsize=11.5)
        ax.set_xlabel(meaning, loc="left")
    save_figure(fig, options.out, dpi=110)
    print(options.out)


if __name__ == "__main__":
    main()
