"""Samplers on targets that played no part in making them: within 3 standard errors, or they say so.

    python benchmarks/proofs/targets.py

Rosenbrock's banana, Neal's funnel, far modes, Gaussians correlated to 100 dimensions, and a logistic
regression. Truths are closed forms, or for the regression a long run of random walk Metropolis written here
with NumPy alone. A figure is the mean of a statistic over all chains and kept draws; its standard error comes
from the spread of the chains' own means, which are independent. A sampler passes where it is within 3 of
them, or where its own report says that chains have not mixed, or gives an R-hat above 1.01.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import composable_ebm as ceb
from composable_ebm.sampling.diagnostics import r_hat

torch.set_num_threads(1)


@dataclass(frozen=True)
class Case:
    """A target, statistics of it with their true means, and where chains start."""

    name: str
    energy: ceb.Energy
    statistics: dict[str, tuple[Callable[[Tensor], Tensor], float]]
    start: Tensor
    kernels: dict[str, ceb.Kernel]
    warmup: int
    steps: int


def rosenbrock(chains: int) -> Case:
    """x₁ ~ N(1, 1.5), x₂ | x₁ ~ N(x₁², 1/5): a banana whose moments are known."""
    s, p = 1.5, 5.0
    energy = ceb.from_callable(
        lambda x: (x[:, 0] - 1).square() / (2 * s) + p * (x[:, 1] - x[:, 0].square()).square() / 2,
        name="rosenbrock",
        event_shape=(2,),
    )
    truths = {
        "x₁": (lambda x: x[:, 0], 1.0),
        "x₁²": (lambda x: x[:, 0].square(), 1 + s),
        "x₂": (lambda x: x[:, 1], 1 + s),
        "x₂²": (lambda x: x[:, 1].square(), 1 + 6 * s + 3 * s**2 + 1 / p),
    }
    start = torch.randn(chains, 2, generator=torch.Generator().manual_seed(1))
    kernels = {
        "MALA": ceb.MALA(0.02, target_acceptance=0.6),
        "HMC": ceb.HMC(0.1, num_leapfrog=15, target_acceptance=0.8),
    }
    return Case("Rosenbrock", energy, truths, start, kernels, 1000, 4000)


def funnel(chains: int) -> Case:
    """v ~ N(0, 9), xᵢ | v ~ N(0, exp v), nine of them (Neal 2003)."""
    energy = ceb.from_callable(
        lambda x: x[:, 0].square() / 18 + 4.5 * x[:, 0] + x[:, 1:].square().sum(1) / 2 * (-x[:, 0]).exp(),
        name="funnel",
        event_shape=(10,),
    )
    truths = {"v": (lambda x: x[:, 0], 0.0), "v²": (lambda x: x[:, 0].square(), 9.0)}
    start = torch.randn(chains, 10, generator=torch.Generator().manual_seed(1))
    kernels = {
        "MALA": ceb.MALA(0.05, target_acceptance=0.6),
        "HMC": ceb.HMC(0.1, num_leapfrog=10, target_acceptance=0.9),
    }
    return Case("funnel", energy, truths, start, kernels, 1000, 4000)


def modes(chains: int) -> Case:
    """Two modes eight standard deviations apart, three to one; chains start in the smaller."""
    energy = ceb.analytic.GaussianMixture([[-4.0, 0.0], [4.0, 0.0]], 1.0, [3.0, 1.0]).named("modes")
    truths = {"x₁": (lambda x: x[:, 0], -2.0), "x₁ > 0": (lambda x: (x[:, 0] > 0).float(), 0.25)}
    start = torch.randn(chains, 2, generator=torch.Generator().manual_seed(1))
    start[:, 0] += torch.where(torch.arange(chains) % 2 == 0, 4.0, -4.0)
    kernels = {
        "MALA": ceb.MALA(0.5, target_acceptance=0.6),
        "HMC": ceb.HMC(0.5, num_leapfrog=8, target_acceptance=0.8),
    }
    return Case("far modes", energy, truths, start, kernels, 500, 2000)


def correlated(dimension: int, chains: int) -> Case:
    """N(0, C), C of an autoregression of 0.9 along the axes: condition number about 360."""
    gap = (torch.arange(dimension)[:, None] - torch.arange(dimension)).abs()
    covariance = 0.9**gap
    energy = ceb.analytic.Gaussian(torch.zeros(dimension), covariance).named(f"correlated_{dimension}")
    truths = {
        "x₁": (lambda x: x[:, 0], 0.0),
        "x₁²": (lambda x: x[:, 0].square(), 1.0),
        "x₁x₂": (lambda x: x[:, 0] * x[:, 1], 0.9),
        "mean²": (lambda x: x.mean(1).square(), float(covariance.mean())),
    }
    start = 2 * torch.randn(chains, dimension, generator=torch.Generator().manual_seed(1))
    kernels = {
        "MALA": ceb.MALA(0.02, target_acceptance=0.57),
        "HMC": ceb.HMC(0.1, num_leapfrog=20, target_acceptance=0.8),
    }
    return Case(f"correlated, {dimension} dimensions", energy, truths, start, kernels, 500, 1500)


def regression(chains: int) -> Case:
    """The posterior of a logistic regression on 200 made-up cases, five coefficients, N(0, 4) before."""
    g = np.random.default_rng(7)
    features = np.concatenate([np.ones((200, 1)), g.normal(size=(200, 4))], axis=1)
    features[:, 2] += 0.8 * features[:, 1]
    labels = g.random(200) < 1 / (1 + np.exp(-features @ np.array([0.3, 1.0, -1.5, 0.5, 0.0])))

    def energies(beta: np.ndarray) -> np.ndarray:
        z = beta @ features.T
        return (np.logaddexp(0, z) - z * labels).sum(1) + (beta**2).sum(1) / 8

    # Random walk Metropolis, 400 walkers, by NumPy alone.
    walkers = g.normal(size=(400, 5)) * 0.3
    height, total, seen = energies(walkers), [], 0
    for step in range(6000):
        moved = walkers + g.normal(size=walkers.shape) * 0.22
        new = energies(moved)
        taken = np.log(g.random(400)) < height - new
        walkers[taken], height[taken] = moved[taken], new[taken]
        if step >= 1000:
            seen += 1
            total.append(np.stack([walkers.mean(0), (walkers**2).mean(0)]))
    reference = np.mean(total, axis=0)
    x, y = torch.from_numpy(features).float(), torch.from_numpy(labels).float()
    energy = ceb.from_callable(
        lambda b: torch.nn.functional.softplus(b @ x.T).sum(1) - (b @ x.T) @ y + b.square().sum(1) / 8,
        name="posterior",
        event_shape=(5,),
    )
    truths: dict = {}
    for i in range(5):
        truths[f"β{i}"] = (lambda v, i=i: v[:, i], float(reference[0, i]))
        truths[f"β{i}²"] = (lambda v, i=i: v[:, i].square(), float(reference[1, i]))
    start = torch.randn(chains, 5, generator=torch.Generator().manual_seed(1))
    kernels = {
        "MALA": ceb.MALA(0.01, target_acceptance=0.6),
        "HMC": ceb.HMC(0.1, num_leapfrog=8, target_acceptance=0.8),
    }
    return Case("logistic regression", energy, truths, start, kernels, 500, 1500)


def run(case: Case, name: str, kernel: ceb.Kernel) -> list[str]:
    """One line a statistic: its value, truth, error in standard errors, R-hat, and the verdict."""
    started, kept = time.perf_counter(), {label: [] for label in case.statistics}

    def look(step: int, chain: ceb.Chain) -> None:
        if step > case.warmup:
            for label, (statistic, _) in case.statistics.items():
                kept[label].append(statistic(chain.x).double())

    out = ceb.sample(
        case.energy,
        init=case.start,
        num_steps=case.steps,
        num_warmup=case.warmup,
        sampler=kernel,
        seed=3,
        callback=look,
        on_divergence="report",
    )
    lines, seconds, report = [], time.perf_counter() - started, out.report()
    for label, (_, truth) in case.statistics.items():
        draws = torch.stack(kept[label])  # (draws, chains)
        means = draws.mean(0)
        error = float(means.std()) / math.sqrt(len(means))
        off, own = (float(means.mean()) - truth) / max(error, 1e-12), r_hat(draws)
        if abs(off) <= 3:
            verdict = "within 3 errors"
        elif "have not mixed" in report:
            verdict = "off, and the report says that chains have not mixed"
        elif not out.r_hat <= 1.01:
            verdict = "off, and the report's R-hat says so"
        else:
            verdict = "OFF WITHOUT A WORD"
        lines.append(
            f"{case.name:26} {name:5} {label:7} {float(means.mean()):9.4f} ± {error:.4f}  truth {truth:9.4f} "
            f"{off:+6.2f}  R-hat {own:.3f}, reported {out.r_hat:.3f}  {verdict}"
        )
    diverged = int(out.divergence.chains.sum())
    lines[-1] += f"  ({seconds:.0f} s, {diverged} chains lost)"
    return lines


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chains", type=int, default=128)
    parser.add_argument("--only", default="", help="targets whose name begins so")
    parser.add_argument("--steps", type=float, default=1.0, help="a factor for all numbers of steps")
    options = parser.parse_args(argv)
    makers = [
        rosenbrock,
        funnel,
        modes,
        lambda n: correlated(10, n),
        lambda n: correlated(100, n),
        regression,
    ]
    bad = passed = 0
    for make in makers:
        case = make(options.chains)
        if not case.name.startswith(options.only):
            continue
        case = Case(**{**vars(case), "steps": int(case.steps * options.steps)})
        for name, kernel in case.kernels.items():
            for line in run(case, name, kernel):
                print(line, flush=True)
                bad += "WITHOUT A WORD" in line
                passed += "within" in line
    print(f"{passed} within 3 standard errors, {bad} off without a word")
    return int(bad > 0)


if __name__ == "__main__":
    raise SystemExit(main())
