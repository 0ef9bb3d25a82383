"""Ways to learn an energy from data, on one density whose gradient is known everywhere.

Three blobs in the plane, one small network of 4,000 weights, the same number of iterations. The curves
show the Fisher divergence against the truth, ½ mean ‖∇E - ∇E*‖² over fresh samples, as each objective of
the trainer goes on; the pictures show exp(-E) on a grid. Score matching needs no chains and knows
slopes, but not how much mass lies beyond a gap; contrastive divergence runs chains and knows both.

    python demos/score_matching.py --out score_matching.png
"""

import argparse
import math
from pathlib import Path

import torch
from matplotlib.colors import LinearSegmentedColormap
from torch import Tensor, nn

import composable_ebm as ceb
from composable_ebm.plotting import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, RED, figure, save_figure
from composable_ebm.sampling.diagnostics import fisher_divergence
from composable_ebm.train.objectives.base import Objective, Setting
from composable_ebm.train.objectives.contrastive import ContrastiveDivergence
from composable_ebm.train.objectives.denoising import DenoisingAtOneLevel
from composable_ebm.train.objectives.score_matching import ScoreMatching, SlicedScoreMatching

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
REACH, BATCH, POINTS = 2.9, 256, 25
TRUTH = ceb.analytic.GaussianMixture(
    [[-1.2, -0.6], [1.2, -0.6], [0.0, 1.3]],
    [[[0.35, 0.2], [0.2, 0.25]], [[0.3, -0.15], [-0.15, 0.25]], [[0.5, 0.0], [0.0, 0.12]]],
    weights=[0.2, 0.3, 0.5],
)
SHADES = LinearSegmentedColormap.from_list("shades", ["white", "#cfdfeb", "#8fb4d1", BLUE])

OBJECTIVES: dict[str, tuple[Objective, str]] = {
    "exact score matching": (ScoreMatching(trace="exact"), BLUE),
    "Hutchinson's trace": (ScoreMatching(trace="hutchinson"), GREEN),
    "sliced, variance reduced": (SlicedScoreMatching(), PURPLE),
    "sliced": (SlicedScoreMatching(variance_reduction=False), GREY),
    "denoising, σ = 0.1": (DenoisingAtOneLevel(noise_level=0.1), ORANGE),
    "contrastive divergence": (
        ContrastiveDivergence(
            cd_steps=20, buffer_size=1024, reinit_prob=0.02, energy_l2=0.0, data_noise=0.0, classification=0
        ),
        RED,
    ),
}
SAMPLER = ceb.Langevin(step_size=0.02)


class Network(nn.Module):
    """E(x) of points in the plane, with a parabola that holds it together far out."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) + 0.05 * x.square().sum(1, keepdim=True)


def train(objective: Objective, iterations: int) -> tuple[ceb.Energy, list[tuple[int, float]]]:
    """The learned energy, and its Fisher divergence along the way."""
    torch.manual_seed(0)
    network, generator = Network(), torch.Generator().manual_seed(0)
    energy = ceb.from_callable(lambda x: network(x)[:, 0], name="learned", event_shape=(2,))
    phase = objective.begin(Setting((2,), 1, (-REACH, REACH), BATCH, SAMPLER, generator))
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-2, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, iterations)
    fresh = TRUTH.draw(4000, torch.Generator().manual_seed(1))
    y, curve = torch.zeros(BATCH, dtype=torch.long), []
    marks = {round(math.exp(math.log(iterations) * i / (POINTS - 1))) for i in range(POINTS)}
    for i in range(1, iterations + 1):
        loss, _ = phase.loss(network, network, TRUTH.draw(BATCH, generator), y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if i in marks:
            curve.append((i, fisher_divergence(energy, TRUTH, fresh)))
    return energy, curve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--iterations", type=int, default=400)
    parser.add_argument("--out", type=Path, default=IMAGES / "score_matching.png")
    options = parser.parse_args()
    torch.set_num_threads(1)

    axis = torch.linspace(-REACH, REACH, 161)
    across, up = torch.meshgrid(axis, axis, indexing="xy")
    points = torch.stack([across, up], dim=-1).reshape(-1, 2)
    fig, axes = figure(2, 4, 13.2, 6.4, width_ratios=[1, 1, 1, 1])
    pictures = [axes[0, 0], axes[0, 1], axes[0, 2], axes[1, 0], axes[1, 1], axes[1, 2], axes[0, 3]]
    curves = axes[1, 3]

    def draw(ax, energy: ceb.Energy, title: str, note: str) -> None:
        density = energy(points).detach().neg().softmax(0).reshape(across.shape)
        ax.pcolormesh(across, up, (density / density.max()).clamp(0, 1).sqrt(), cmap=SHADES, vmin=0, vmax=1)
        ax.set(xlim=(-REACH, REACH), ylim=(-REACH, REACH), xticks=[], yticks=[], aspect="equal")
        ax.spines[:].set(visible=True, color="#dfe4e8")
        ax.grid(False)
        ax.set_title(title, loc="left")
        ax.set_xlabel(note, loc="left")

    for ax, (name, (objective, colour)) in zip(pictures, OBJECTIVES.items(), strict=False):
        energy, curve = train(objective, options.iterations)
        inside = float(upper_mass(energy, points))
        draw(ax, energy, name, f"Fisher divergence {curve[-1][1]:.2f}; upper blob {100 * inside:.0f} %")
        curves.plot(*zip(*curve, strict=True), color=colour, label=name)
        print(f"{name}: Fisher divergence {curve[-1][1]:.3f}, upper blob {100 * inside:.1f} %", flush=True)
    draw(pictures[-1], TRUTH, "the truth", f"upper blob {100 * upper_mass(TRUTH, points):.0f} %")
    curves.set(xscale="log", yscale="log", xlabel="iteration")
    curves.set_title("Fisher divergence to the truth", loc="left")
    curves.legend(fontsize=7.5, labelcolor=INK)
    save_figure(fig, options.out, dpi=110)
    print(options.out)


def upper_mass(energy: ceb.Energy, points: Tensor) -> Tensor:
    """Share of exp(-E) on the upper blob; 50 % of the truth."""
    shares = energy(points).detach().neg().softmax(0)
    return shares[points[:, 1] > 0.45].sum()


if __name__ == "__main__":
    main()
