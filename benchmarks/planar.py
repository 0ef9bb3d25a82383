"""Nine compositions in the plan that anyone can judge by eye: products, unions and differences.

Nothing is trained: every shape gives the energy of its density blurred by noise of any level in closed
form. A sample of a product is in place where both shapes are, one of a union where either is, one of a
difference where the first is and the second is not; a shape is where 99.8 % of its own samples have their
energies. Two of the nine are empty, left and right at once, and a disc without the square around it: they
have to be refused, by `problems`, and not to be drawn.

Products and differences are particles, carried by their first shape and weighed by the second; a union is
a density of its own, known at every noise level.

Reference:
    Du, Li and Mordatch (2020), Compositional visual generation with energy based models, arXiv
    2004.06030, figure 2; Du et al. (2023), arXiv 2302.11552, figure 3, for such pictures.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from common import RESULTS, write_results
from torch import Tensor

import composable_ebm as ceb
from composable_ebm.energy import Energy
from composable_ebm.energy.analytic import Analytic, Box, GaussianMixture
from composable_ebm.plotting import BLUE, INK, figure, save_figure
from composable_ebm.sampling.schedule import karras


def _along(x: Tensor, y: Tensor, std: float) -> GaussianMixture:
    return GaussianMixture(torch.stack([x, y], dim=1), std**2)


_TURN = torch.arange(8) * math.pi / 4
_HALF = torch.linspace(0, math.pi, 24)
_THREE = torch.tensor([-0.6, 0.0, 0.6])

RING = _along(0.5 * _TURN.cos(), 0.5 * _TURN.sin(), 0.03)
BAR = Box([-0.2, -1.0], [0.2, 1.0], softness=0.01)
GRID = _along(_THREE.repeat(3), _THREE.repeat_interleave(3), 0.06)
ARC = _along(0.7 * _HALF.cos(), 0.7 * _HALF.sin() - 0.2, 0.04)
DISC = GaussianMixture([[0.0, 0.0]], 0.12**2)
LEFT = Box([-0.9, -0.6], [-0.2, 0.6], softness=0.01)
RIGHT = Box([0.2, -0.6], [0.9, 0.6], softness=0.01)
SQUARE = Box([-0.8, -0.8], [0.8, 0.8], softness=0.01)


@dataclass(frozen=True)
class Planar:
    """One composition: what it is of, what it is, and which states are in place, given those of either."""

    name: str
    first: Analytic
    second: Analytic
    build: Callable[[Energy, Energy], Energy]
    wanted: Callable[[Tensor, Tensor], Tensor]
    empty: bool = False

    @property
    def energy(self) -> Energy:
        """The composition."""
        return self.build(self.first, self.second)

    def in_place(self, x: Tensor) -> Tensor:
        """Which states (n, 2) are in place, (n,)."""
        return self.wanted(*(shape.energy(x) <= shape.energy_range[1] for shape in (self.first, self.second)))

    @property
    def true_share(self) -> float:
        """The share of the density itself that is in place, by quadrature: a NOT has a soft edge."""
        side = torch.linspace(-1.2, 1.2, 300)
        x = torch.cartesian_prod(side, side)
        weights = torch.softmax(-self.energy.energy(x, torch.zeros(())).double(), 0)
        return float(weights[self.in_place(x)].sum())

    @property
    def sampler(self) -> ceb.Annealed:
        """Particles where a shape is weighed, chains where a union is followed."""
        levels = ceb.Schedule(noise_level=karras(2.0, 0.004), noise_power=2, predict=True, num_levels=60)
        if self.build is union:
            return ceb.Annealed(ceb.MALA(0.5), levels)
        return ceb.Particles(ceb.MALA(0.5), levels, carrier=self.first)


def product(a: Energy, b: Energy) -> Energy:
    """Both."""
    return a + b


def union(a: Energy, b: Energy) -> Energy:
    """Either."""
    return a | b


def difference(a: Energy, b: Energy) -> Energy:
    """The first and not the second."""
    return a + 3 * ~b  # a bounded NOT leaves one in thirty at weight 1


def _both(a: Tensor, b: Tensor) -> Tensor:
    return a & b


def _either(a: Tensor, b: Tensor) -> Tensor:
    return a | b


def _without(a: Tensor, b: Tensor) -> Tensor:
    return a & ~b


NINE = (
    Planar("ring and bar", RING, BAR, product, _both),
    Planar("grid and left", GRID, LEFT, product, _both),
    Planar("left and right", LEFT, RIGHT, product, _both, empty=True),
    Planar("ring or bar", RING, BAR, union, _either),
    Planar("arc or disc", ARC, DISC, union, _either),
    Planar("left or right", LEFT, RIGHT, union, _either),
    Planar("bar without disc", BAR, DISC, difference, _without),
    Planar("ring without left", RING, LEFT, difference, _without),
    Planar("disc without square", DISC, SQUARE, difference, _without, empty=True),
)


def run(planar: Planar, num_chains: int, seed: int) -> tuple[dict, Tensor]:
    """Figures of one composition, and its samples."""
    out = ceb.sample(planar.energy, num_chains=num_chains, sampler=planar.sampler, num_steps=240, seed=seed)
    row = {
        "name": planar.name,
        "empty": planar.empty,
        "in_place": float(planar.in_place(out.samples).float().mean()),
        "true_share": None if planar.empty else planar.true_share,
        "refused": bool(out.problems),
        "says": out.problems[:1],
        "log_probability": None if out.weighted is None else round(out.log_probability, 2),
        "gradients": out.evaluations,
    }
    return row, out.samples


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--num-chains", type=int, default=2_000)
    parser.add_argument("--num-seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows, drawn = [], {}
    print("| composition | in place, worst seed | of the density itself | refused |\n|---|---|---|---|")
    for planar in NINE:
        seeds = [run(planar, options.num_chains, seed) for seed in range(options.num_seeds)]
        figures = [row for row, _ in seeds]
        rows += [{**row, "seed": seed} for seed, row in enumerate(figures)]
        drawn[planar.name] = seeds[0][1]
        worst, refused = min(row["in_place"] for row in figures), all(row["refused"] for row in figures)
        true = "" if planar.empty else f"{100 * figures[0]['true_share']:.1f} %"
        print(f"| {planar.name} | {100 * worst:.1f} % | {true} | {'yes' if refused else 'no'} |", flush=True)
    print(write_results("planar", {"num_chains": options.num_chains, "rows": rows}, options.out))
    plot(drawn, options.out / "planar.png")


def plot(drawn: dict[str, Tensor], path: Path) -> None:
    """The nine pictures; empty ones stay empty."""
    fig, axes = figure(3, 3, 7.5, 7.5)
    for planar, ax in zip(NINE, axes.flat, strict=True):
        ax.set(xlim=(-1.1, 1.1), ylim=(-1.1, 1.1), xticks=[], yticks=[], aspect="equal")
        ax.set_title(planar.name + (": refused" if planar.empty else ""), fontsize=9, color=INK)
        if not planar.empty:
            ax.scatter(*drawn[planar.name].T, s=1, color=BLUE, linewidths=0)
    save_figure(fig, path, dpi=110)


if __name__ == "__main__":
    main()
