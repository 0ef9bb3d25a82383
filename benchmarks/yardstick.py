"""The yardstick: how well each sampler draws from a product whose factors are known exactly.

Nothing is trained, so nothing but the sampler can be wrong. Two experts over the plane,

    ring   eight Gaussians of standard deviation 0.03 on a circle of radius 0.5
    bar    uniform on |x| < 0.2, |y| < 1

have as their product two Gaussians at (0, ±0.5). Both give the energy of their density blurred by
noise of any level σ in closed form. The sum of the two blurred energies is not the energy of the
blurred product, and that is the point: following the summed scores through a reverse diffusion puts
a third of the samples on the wrong Gaussians, and Markov chain steps at each level put them right.

The rows use no more gradients a chain than 100 levels of 10 steps of 3 leapfrogs, 3,000. What
decides is where the levels lie. By quadrature, the summed energies at level σ have

    σ                                       0.10   0.06   0.04   0.03   0.02
    mass on the six wrong Gaussians         26 %    8 %    2 %  0.4 %  0.03 %
    wall from a wrong to a right one, nats     0    1.0    2.6    3.9    5.3

so chains spend four fifths of the run between 0.06 and 0.02, where the wrong Gaussians still empty,
and then cool. On levels even in log σ, HMC needs three times the gradients for as few strays. The
step follows the width of the sharpest thing there is at σ.

Reference:
    Du et al. (2023), Reduce, reuse, recycle, arXiv 2302.11552, for the task.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from common import RESULTS, write_results
from matplotlib.patches import Circle
from torch import Tensor

import composable_ebm as ceb
from composable_ebm.plotting import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, RED, figure, save_figure
from composable_ebm.sampling.schedule import Curve, Schedule, geometric, through

BUDGET = 3_000  # gradients a chain
STD, WALL, REACH = 0.03, 0.01, 0.09
ANGLES = torch.arange(8) * math.pi / 4

RING = ceb.analytic.GaussianMixture(0.5 * torch.stack([ANGLES.cos(), ANGLES.sin()], dim=1), STD**2)
BAR = ceb.analytic.Box([-0.2, -1.0], [0.2, 1.0], softness=WALL)
PRODUCT = RING.named("ring") + BAR.named("bar")
TRUTH = ceb.analytic.GaussianMixture([[0.0, 0.5], [0.0, -0.5]], STD**2)

TRUE_SHARE = math.erf(REACH / STD / math.sqrt(2)) ** 2  # of true samples that are in place

NOISE = through((0, 0.5), (0.1, 0.06), (0.9, 0.02), (1, 0.003))
EVEN = geometric(1.0, 0.003)


@dataclass(frozen=True)
class Row:
    """One sampler: its name, its colour in the picture, and what it does with a budget of gradients."""

    name: str
    colour: str
    plan: Callable[[int], tuple[ceb.Annealed, int]]


def annealed(
    kernel: ceb.Kernel, noise: Curve = NOISE, follow_width: bool = True
) -> Callable[[int], tuple[ceb.Annealed, int]]:
    """`kernel` along the levels of `noise`, with a step in units of the local width, or a fixed one."""
    # Langevin and MALA state their step as a squared length, the kernels with momentum as a length.
    power = 2 if isinstance(kernel, (ceb.Langevin, ceb.MALA)) else 1

    def step_scale(t: float) -> float:
        precision = 1 / (STD**2 + noise(t) ** 2) + 1 / (WALL**2 + noise(t) ** 2)
        return precision ** (-power / 2)

    def plan(budget: int) -> tuple[ceb.Annealed, int]:
        levels = budget // 30  # each takes one gradient more than its steps do
        scale = step_scale if follow_width else None
        schedule = Schedule(noise_level=noise, step_scale=scale, num_levels=levels)
        return ceb.Annealed(kernel, schedule), (budget - levels) // kernel.gradients_per_step

    return plan


def particles(kernel: ceb.Kernel) -> Callable[[int], tuple[ceb.Particles, int]]:
    """Particles that the ring carries from level to level, weighed by what the bar says of them.

    The step is in units of the width at each level, as in `annealed`. A level takes two gradients more
    than its steps do: one of the ring, one where the next level begins.
    """

    def plan(budget: int) -> tuple[ceb.Particles, int]:
        along, _ = annealed(kernel, EVEN)(budget)
        levels = min(60, budget // 6)
        schedule = replace(along.schedule, predict=True, num_levels=levels)
        steps = (budget - 2 * levels - 3) // (kernel.gradients_per_step * levels) * levels
        return ceb.Particles(kernel, schedule, carrier=RING), min(steps, 4 * levels)

    return plan


def reverse_diffusion(budget: int) -> tuple[ceb.Annealed, int]:
    """The naive baseline: one Euler step a level of the reverse diffusion, with the summed scores.

        x ← x + √(Δσ²) ξ,   x ← x - Δσ² ∂E/∂x(x, σ),   Δσ² the variance that the level takes away,

    which is Langevin dynamics with η = Δσ² at T = 1/2.
    """

    def variance_removed(t: float) -> float:
        return EVEN(max(0.0, t - 1 / (budget - 1))) ** 2 - EVEN(t) ** 2

    kernel = ceb.Langevin(step_size=1.0, temperature=0.5, noise_first=True)
    return ceb.Annealed(kernel, Schedule(noise_level=EVEN, step_scale=variance_removed)), budget


BEST = Row("underdamped Langevin", ORANGE, annealed(ceb.UnderdampedLangevin(step_size=1.6, friction=20.0)))
ROWS = (
    Row("summed scores, reverse diffusion", GREY, reverse_diffusion),
    Row("HMC, fixed step, even levels", "#b9a37a", annealed(ceb.HMC(0.03, num_leapfrog=3), EVEN, False)),
    Row("HMC, even levels", INK, annealed(ceb.HMC(step_size=1.5, num_leapfrog=2), EVEN)),
    Row("Langevin", RED, annealed(ceb.Langevin(step_size=0.4))),
    Row("MALA", PURPLE, annealed(ceb.MALA(step_size=1.0))),
    Row("HMC", GREEN, annealed(ceb.HMC(step_size=1.5, num_leapfrog=2))),
    BEST,
    Row("particles, MALA", "#5b8c2a", particles(ceb.MALA(step_size=0.6))),
)


def measure(x: Tensor) -> dict[str, float]:
    """How well samples, (batch, 2), match the two Gaussians.

    Every figure but the balance counts the strays as well:

    - `in_place`: share within ±0.09 of a mode in both coordinates; 99.5 % of true samples are.
    - `log_density`: mean log density under the truth, in nats; 3.48 for true samples.
    - `excess`: how far that lies below the log density at a mode; 1 nat for true samples.
    - `variance`: mean square distance, an axis, from the nearer mode, over that of true samples;
      the larger of the two modes'.
    - `upper`: share of the samples in place that are in the upper mode.
    """
    offset = x[:, None] - TRUTH.means
    place = (offset.abs() < REACH).all(dim=-1)
    log_density = float(-TRUTH(x).mean())
    peak = float(-TRUTH(TRUTH.means).mean())
    upper = x[:, 1] > 0
    squares = [offset[side, k].square().mean() / STD**2 for k, side in enumerate((upper, ~upper))]
    return {
        "in_place": float(place.any(dim=1).float().mean()),
        "log_density": log_density,
        "excess": peak - log_density,
        "variance": float(torch.stack(squares).max()),
        "upper": float(place[:, 0].sum() / place.sum()),
    }


def reaches_goal(figures: dict[str, float]) -> bool:
    """97 % in place; excess and variance at most twice those of true samples; modes within 45 to 55 %."""
    return (
        figures["in_place"] >= 0.97
        and figures["excess"] <= 2.0
        and figures["variance"] <= 2.0
        and abs(figures["upper"] - 0.5) <= 0.05
    )


def run(row: Row, num_chains: int, seed: int, budget: int = BUDGET) -> tuple[ceb.SampleResult, dict]:
    """Draws from the product, from standard normal starts, and measures the samples."""
    sampler, num_steps = row.plan(budget)
    out = ceb.sample(
        PRODUCT,
        num_chains=num_chains,
        num_steps=num_steps,
        sampler=sampler,
        seed=seed,
        on_divergence="report",
    )
    figures: dict[str, float | None] = {
        **measure(out.samples),
        "acceptance": out.acceptance_rate,
        "gradients": out.evaluations,
        "seconds": out.seconds,
    }
    return out, figures


def average(runs: Sequence[dict]) -> dict:
    """The mean of each figure over the seeds."""
    return {
        name: None if first is None else round(sum(r[name] for r in runs) / len(runs), 4)
        for name, first in runs[0].items()
    }


def plot(samples: dict[str, Tensor], shares: dict[str, list[tuple[int, float]]], path: Path) -> None:
    """The two experts, where the naive way and the best one put samples, and strays against effort."""
    fig, axes = figure(1, 4, 13.6, 3.1, width_ratios=[1, 1, 1, 1.1])
    titles = {"ring and bar": None, **{name.split(",")[0]: x for name, x in samples.items()}}
    for ax, (title, x) in zip(axes[0, :3], titles.items(), strict=True):
        ax.axvspan(-0.2, 0.2, color=BLUE, alpha=0.12, linewidth=0)
        for mean in RING.means:
            for deviations in (1, 2, 3):
                ring = Circle(mean.tolist(), deviations * STD, fill=False, color=BLUE, linewidth=0.7)
                ax.add_patch(ring)
        ax.set(xlim=(-0.7, 0.7), ylim=(-0.7, 0.7), aspect="equal", xticks=[], yticks=[])
        ax.spines[:].set(visible=True, color="#dfe4e8")
        ax.set_title(title, loc="left")
        if x is not None:
            ax.scatter(x[:, 0], x[:, 1], s=3, color=ORANGE, alpha=0.5, linewidths=0, zorder=3)
            share = 100 * measure(x)["in_place"]
            ax.text(-0.67, -0.67, f"{share:.1f} % in place", fontsize=9.5, color=INK)
    ax = axes[0, 3]
    for row in ROWS:
        efforts, values = zip(*shares[row.name], strict=True)
        style = "--" if row in ROWS[:3] else "-"
        strays = [100 * (1 - value) for value in values]
        ax.plot(efforts, strays, style, color=row.colour, marker="o", markersize=4, label=row.name)
    for height, text in ((3, "goal"), (100 * (1 - TRUE_SHARE), "true samples")):
        ax.axhline(height, color=INK, linewidth=0.8, linestyle=":")
        ax.text(285, 1.04 * height, text, fontsize=8.5, color=INK, va="bottom")
    ax.set(xscale="log", yscale="log", ylim=(0.4, 60), xlim=(270, 3_300))
    ax.set_xticks([e for e, _ in shares[BEST.name]], [f"{e:,}" for e, _ in shares[BEST.name]])
    ax.set_yticks([0.5, 1, 3, 10, 30], ["0.5", "1", "3", "10", "30"])
    ax.minorticks_off()
    ax.set_xlabel("gradients a chain")
    ax.set_title("samples out of place (%)", loc="left")
    fig.legend(*ax.get_legend_handles_labels(), frameon=False, labelcolor=INK, loc="outside right center")
    save_figure(fig, path, dpi=110)


COLUMNS = {
    "in place": lambda f: f"{100 * f['in_place']:.1f} %",
    "log density": lambda f: f"{f['log_density']:.2f}",
    "excess": lambda f: f"{f['excess']:.2f}",
    "variance": lambda f: f"{f['variance']:.2f}",
    "upper": lambda f: f"{100 * f['upper']:.0f} %",
    "accepted": lambda f: f"{f['acceptance']:.2f}" if f.get("acceptance") else "",
    "gradients": lambda f: f"{f['gradients']:,.0f}" if "gradients" in f else "",
    "seconds": lambda f: f"{f['seconds']:.1f}" if "seconds" in f else "",
}


def line(name: str, figures: dict, goal: str) -> str:
    """One line of the printed table."""
    return "| " + " | ".join([name, *(show(figures) for show in COLUMNS.values()), goal]) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description="Sample a product of known experts with every sampler.")
    parser.add_argument("--num-chains", type=int, default=2_000)
    parser.add_argument("--num-seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args()
    torch.set_num_threads(1)

    true = measure(TRUTH.draw(100_000, torch.Generator().manual_seed(0)))
    print("| sampler | " + " | ".join(COLUMNS) + " | goal |")
    print("|---" * (len(COLUMNS) + 2) + "|")
    table, samples, shares = [], {}, {}
    for row in ROWS:
        results = [run(row, options.num_chains, seed) for seed in range(options.num_seeds)]
        runs = [figures for _, figures in results]
        mean, met = average(runs), all(map(reaches_goal, runs))
        kernel = results[0][0].kernel
        table.append({"sampler": row.name, "kernel": str(kernel), "goal": met, "mean": mean, "seeds": runs})
        shares[row.name] = [
            *((e, run(row, options.num_chains, 0, e)[1]["in_place"]) for e in (300, 1_000)),
            (BUDGET, mean["in_place"]),
        ]
        if row in (ROWS[0], BEST):
            samples[row.name] = results[0][0].samples
        print(line(row.name, mean, "yes" if met else "no"), flush=True)
    print(line("true samples", true, ""))
    content = {
        "task": " ".join((__doc__ or "").split("\n\n")[0].split()),
        "measures": " ".join((measure.__doc__ or "").split()),
        "goal": f"{reaches_goal.__doc__} At most {BUDGET} gradients a chain. In every seed.",
        "num_chains": options.num_chains,
        "true_samples": true,
        "rows": table,
        "in_place_by_gradients": shares,
    }
    print(write_results("yardstick", content, options.out))
    plot(samples, shares, options.out / "yardstick.png")
    print(options.out / "yardstick.png")


if __name__ == "__main__":
    main()
