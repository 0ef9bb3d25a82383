"""A Boltzmann machine learns bars and stripes, and every figure is exact, by sums over all states.

Nine visible and six hidden bits, all coupled. Learning sees the fourteen patterns only through pair
statistics with the data clamped, less those of its own free chains; both come from Gibbs sampling.
Then the machine completes images: pixels that are given are clamped, the others sampled.

    python demos/boltzmann_machine.py --out boltzmann_machine.png
"""

import argparse
import math
from pathlib import Path

import torch

import composable_ebm as ceb
from composable_ebm.boltzmann import BoltzmannLearning, BoltzmannMachine
from composable_ebm.data.bars import bars_and_stripes
from composable_ebm.energy.bits import bit_states
from composable_ebm.plotting import BLUE, GREY, INK, ORANGE, figure, image_grid, save_figure

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
SIDE, HIDDEN = 3, 6
GIVEN = (  # pixel -> value that is held, a row of completions each
    {0: 1, 3: 1},
    {0: 1, 1: 1},
    {0: 0, 4: 1},
    {2: 1, 4: 0},
    {4: 0},
    {8: 1},
    {1: 1, 3: 0},
)


def learn(machine: BoltzmannMachine, data: torch.Tensor, iterations: int) -> list[tuple[int, float]]:
    """Trains in place; (iteration, exact mean log likelihood in nats) along the way."""
    learning = BoltzmannLearning(machine, data, num_chains=200, clamped_sweeps=3, free_sweeps=3)
    curve = []
    for i in range(iterations + 1):
        if i % 25 == 0:
            with torch.no_grad():
                curve.append((i, float(machine.log_likelihood(data).mean())))
        learning.step(0.25 / (1 + 3 * i / iterations))
    return curve


def completions(machine: BoltzmannMachine, given: dict[int, float], rows: int) -> torch.Tensor:
    """Images whose pixels `given` are held, (rows, 1, side, side)."""
    start = torch.zeros(rows, SIDE**2 + HIDDEN)
    mask = torch.ones(SIDE**2 + HIDDEN)
    for pixel, value in given.items():
        start[:, pixel], mask[pixel] = value, 0.0
    out = ceb.sample(machine, init=start, mask=mask, num_steps=200, sampler=ceb.Gibbs(), seed=4)
    return out.samples[:, : SIDE**2].reshape(-1, 1, SIDE, SIDE)


def shown(images: torch.Tensor, columns: int):
    """Bits, black on white, as one picture."""
    return image_grid(1 - 2 * images, columns, padding=1, scale=6, background=170)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--iterations", type=int, default=2000)
    parser.add_argument("--out", type=Path, default=IMAGES / "boltzmann_machine.png")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    patterns = bars_and_stripes(SIDE)
    data = patterns.flatten(1)
    machine = BoltzmannMachine(SIDE**2, HIDDEN).named("machine")
    curve = learn(machine, data, options.iterations)

    with torch.no_grad():
        probabilities = machine.log_likelihood(bit_states(SIDE**2)).exp()
        known = machine.log_likelihood(data).exp()
    out = ceb.sample(machine, num_chains=49, num_steps=300, sampler=ceb.Gibbs(), seed=1)
    samples = out.samples[:, : SIDE**2].reshape(-1, 1, SIDE, SIDE)
    right = float((samples[:, None] == patterns).all(4).all(3).all(2).any(1).float().mean())

    fig, ((ax, bars, free, held),) = figure(1, 4, 13, 3.2, width_ratios=[1.2, 1.7, 1, 1])
    ax.plot(*zip(*curve, strict=True), color=ORANGE)
    for level, label in ((-(SIDE**2) * math.log(2), "all images alike"), (-math.log(len(data)), "the best")):
        ax.axhline(level, color=GREY, linewidth=1, linestyle="--")
        ax.annotate(label, (options.iterations, level), ha="right", va="bottom", fontsize=8.5, color=INK)
    ax.set(xlabel="iteration", ylim=(-6.6, -2.2))
    ax.set_title("Mean log likelihood (nats, exact)", loc="left")

    index = torch.arange(len(known))
    bars.bar(index, known, color=ORANGE, width=0.7, label="machine")
    bars.axhline(1 / len(data), color=BLUE, linewidth=1.6, label="data")
    bars.set(xticks=[], ylim=(0, 1.5 * float(known.max())))
    bars.set_title(f"p(pattern), {100 * float(known.sum() / probabilities.sum()):.0f} % in all", loc="left")
    bars.legend(loc="upper right", ncols=2, frameon=False)
    bars.set_xlim(-0.6, len(known) - 0.4)
    for i, pattern in enumerate(patterns):
        small = bars.inset_axes(
            (i - 0.36, -0.13 * bars.get_ylim()[1], 0.72, 0.1 * bars.get_ylim()[1]), transform=bars.transData
        )
        small.imshow(1 - pattern[0], cmap="gray", vmin=0, vmax=1)
        small.set(xticks=[], yticks=[])
        small.grid(False)
        small.spines[:].set(visible=True, color=GREY)

    free.imshow(shown(samples, 7))
    free.set_title(f"Samples, {100 * right:.0f} % right", loc="left")
    held.imshow(shown(torch.cat([completions(machine, given, 7) for given in GIVEN]), 7))
    for row, given in enumerate(GIVEN):
        for pixel in given:
            for column in range(7):
                x = 1 + 19 * column + 6 * (pixel % SIDE) + 2.5
                y = 1 + 19 * row + 6 * (pixel // SIDE) + 2.5
                held.plot(x, y, "o", color=BLUE, markersize=2.6)
    held.set_title("Completed from the dots", loc="left")
    for picture in (free, held):
        picture.set(xticks=[], yticks=[])
        picture.grid(False)
        picture.spines[:].set_visible(False)
    save_figure(fig, options.out)
    print(f"log likelihood {curve[0][1]:.2f} -> {curve[-1][1]:.2f} nats; best possible {-math.log(14):.2f}")
    print(f"{right:.0%} of 49 samples are patterns")
    print(options.out)


if __name__ == "__main__":
    main()
