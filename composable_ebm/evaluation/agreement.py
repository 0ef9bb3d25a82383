"""Whether energies mean what they say: exp(-E) at T = 1 against samplers that must give it.

At a small noise level σ, noisy data are exact samples of the density that a noise-conditioned energy
should be. An energy that is right at T = 1 keeps them: chains of ULA, MALA and HMC that start there stay
among them, in energy and in attributes, and those that start from the expert's own samples arrive there.
An energy that is only good for a sampler of its own (another temperature, a clipped gradient) does not.

Reference:
    Nijkamp et al. (2020), On the anatomy of MCMC-based maximum likelihood learning of energy-based
    models, arXiv 1903.12370, for long chains as the test of an energy.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from composable_ebm.data import LabelledImages
from composable_ebm.energy import Energy
from composable_ebm.evaluation.composition import draw
from composable_ebm.evaluation.diversity import diversity
from composable_ebm.evaluation.judge import Judge, see
from composable_ebm.evaluation.metrics import kolmogorov_smirnov
from composable_ebm.evaluation.rows import proportion, right
from composable_ebm.evaluation.task import Request, Task
from composable_ebm.experts.expert import Expert
from composable_ebm.potential.rows import as_one_batch
from composable_ebm.sampling.annealed import Annealed
from composable_ebm.sampling.block import Sampler
from composable_ebm.sampling.hmc import HMC
from composable_ebm.sampling.kernel import Kernel
from composable_ebm.sampling.langevin import Langevin
from composable_ebm.sampling.mala import MALA
from composable_ebm.sampling.request import calibrated_sampler
from composable_ebm.sampling.sample import sample
from composable_ebm.sampling.schedule import Schedule, constant

NOISE_LEVEL = 0.1
STEP = 0.02  # of ULA and MALA, in units of σ²
LENGTH, LEAPFROGS = 0.25, 5  # of HMC, in units of σ
GRADIENTS = 60
LEVEL_WITHOUT_NOISE = 0.02  # length scale for energies that take no noise level
MULTIPLES = (1, 5, 20)
LARGEST_DISTANCE, LARGEST_SHIFT = 0.35, 0.15  # see `verdict`
QUANTILES = 33

__all__ = ["agreement", "kernels", "stability", "verdict"]


def kernels(sigma: float) -> dict[str, tuple[Kernel, int]]:
    """The samplers that are compared, all at temperature 1, and steps of equally many gradients."""
    return {
        "ULA": (Langevin(STEP * sigma**2), GRADIENTS),
        "MALA": (MALA(STEP * sigma**2), GRADIENTS),
        "HMC": (HMC(LENGTH * sigma, num_leapfrog=LEAPFROGS), GRADIENTS // LEAPFROGS),
    }


def agreement(task: Task, name: str, judge: Judge, pool: LabelledImages, chains: int, seed: int) -> dict:
    """Chains of one expert at T = 1, from data and from noise, by three samplers.

    Args:
        task: The family.
        name: One of `task.all_experts`; its marginal p(x) is what is tested, which covers all values.
        judge: Says which attributes states show.
        pool: Held-out images.
        chains: Chains of each start.
        seed: Seeds images and chains.
    Returns:
        `noise_level`; for "data" and "own samples" as they start, and for each sampler from each start,
        energies (mean, standard deviation), acceptance, the share of each attribute's values whose
        largest difference from data is `attributes`, and `ks`, the Kolmogorov-Smirnov distance of
        energies to those of data; `ks_samplers`, the largest between samplers of one start;
        `ks_starts`, between the two starts under MALA; `ks_chance`, which equal distributions exceed
        once in twenty times; `quantiles` of the energies; and the verdict `calibrated`.
    """
    expert = task.all_experts[name]["any"]
    generator = torch.Generator().manual_seed(seed)
    sigma = NOISE_LEVEL if expert.noise_conditioned else 0.0
    data = pool.batch(torch.randperm(len(pool), generator=generator)[:chains])
    own = draw(_values(task, name, chains)[0], generator)[0]
    noise = [sigma * torch.randn(data.shape, generator=generator) for _ in range(2)]
    starts = {"data": data + noise[0], "own samples": own + noise[1]}
    runs = _runs(expert, starts, sigma, generator)

    energies = {run: ends.energies for run, ends in runs.items()}
    truth = _rates(judge, task, pool, starts["data"])
    found: dict = {"noise_level": sigma, "chains": chains, "gradients": GRADIENTS}
    found["runs"] = {
        run: _figures(ends, energies["data"], _rates(judge, task, pool, ends.states), truth)
        for run, ends in runs.items()
    }
    between = [
        kolmogorov_smirnov(energies[f"{a} from {start}"], energies[f"{b} from {start}"])
        for start in starts
        for a, b in combinations(kernels(1.0), 2)
    ]
    found["ks_samplers"] = round(max(between), 3)
    found["ks_starts"] = round(
        kolmogorov_smirnov(energies["MALA from data"], energies["MALA from own samples"]), 3
    )
    found["ks_chance"] = round(1.358 * (2 / chains) ** 0.5, 3)
    found["quantiles"] = _quantiles(energies)
    found["calibrated"] = verdict(found)
    return found


class _Ends(NamedTuple):
    """Where chains are at the end of a run: states, their energies, and the share of proposals accepted."""

    states: Tensor
    energies: Tensor
    acceptance: float | None = None


def _runs(
    expert: Expert, starts: Mapping[str, Tensor], sigma: float, generator: torch.Generator
) -> dict[str, _Ends]:
    """The starts as they are, and what each sampler makes of them."""
    level = torch.tensor(sigma) if sigma else None
    runs = {}
    for start, x in starts.items():
        with torch.no_grad():
            runs[start] = _Ends(x, expert(x, noise_level=level))
        for label, (kernel, num_steps) in kernels(sigma or LEVEL_WITHOUT_NOISE).items():
            sampler: Sampler = Annealed(kernel, Schedule(noise_level=constant(sigma))) if sigma else kernel
            out = sample(
                expert,
                init=x,
                num_steps=num_steps,
                sampler=sampler,
                generator=generator,
                on_divergence="report",
            )
            runs[f"{label} from {start}"] = _Ends(out.samples, out.energies, out.acceptance_rate)
    return runs


def _figures(
    ends: _Ends, of_data: Tensor, rates: Mapping[str, Tensor], truth: Mapping[str, Tensor]
) -> dict[str, float]:
    """How the end of a run compares with data, whose energies are `of_data` and shares `truth`."""
    figures = {
        "energy": round(float(ends.energies.mean()), 2),
        "energy_std": round(float(ends.energies.std()), 2),
        "ks": round(kolmogorov_smirnov(ends.energies, of_data), 3),
        "attributes": round(max(float((rates[n] - truth[n]).abs().max()) for n in truth), 3),
    }
    if ends.acceptance is not None:
        figures["acceptance"] = round(ends.acceptance, 3)
    return figures


def verdict(found: dict) -> bool:
    """Whether an expert is calibrated at T = 1, by size of effects rather than by significance.

    Chains that start from data keep its energies, the three samplers agree (every Kolmogorov-Smirnov
    distance at most 0.35, or what chance gives), no attribute's share moves by more than 0.15, and
    proposals are accepted.
    """
    runs, bound = found["runs"], max(LARGEST_DISTANCE, found["ks_chance"])
    kept = [runs[f"{label} from data"] for label in kernels(1.0)]
    return bool(
        max(*(run["ks"] for run in kept), found["ks_samplers"]) <= bound
        and max(run["attributes"] for run in kept) <= LARGEST_SHIFT
        and min(run["acceptance"] for run in kept if "acceptance" in run) > 0.3
    )


def stability(task: Task, name: str, judge: Judge, pool: LabelledImages, chains: int, seed: int) -> dict:
    """Samples of one expert from noise at 1, 5 and 20 times the usual number of steps.

    Args:
        task: The family.
        name: One of `task.all_experts`.
        judge: Says what samples show.
        pool: Held-out images.
        chains: Samples at each length, shared out over the expert's values.
        seed: Seeds the chains.
    Returns:
        By multiple of the usual steps: `num_steps`, `accuracy` of the values asked for (not of a base),
        `fid_attr`, that of real images of the same values in equal numbers, duplicates and seconds.
    """
    expressions, asked = _values(task, name, chains)
    structure, coefficients = as_one_batch(expressions)
    sampler, usual = calibrated_sampler(structure, coefficients)
    found = {}
    for multiple in MULTIPLES:
        out = sample(
            structure,
            num_chains=chains,
            num_steps=multiple * usual,
            sampler=sampler,
            coefficients=coefficients,
            seed=seed,
            on_divergence="report",
        )
        figures: dict = {"num_steps": multiple * usual, "seconds": round(out.seconds, 1)}
        if any(asked):
            figures["accuracy"] = proportion(right(see(judge, task.family, out.samples), asked))
        figures.update(diversity(out.samples, asked, judge, pool))
        found[str(multiple)] = figures
    return found


def _values(task: Task, name: str, count: int) -> tuple[list[Energy], list[Request]]:
    """An expert at each of its values in turn, and what that asks for."""
    expert = task.all_experts[name]
    terms: list[tuple[Energy, Request]] = [
        (term, {attribute: value})
        for attribute, values in task.terms.items()
        for value, term in values.items()
        if term.network is expert.network
    ]
    terms = terms or [(expert["any"], {})]
    chosen = [terms[i % len(terms)] for i in range(count)]
    return [term for term, _ in chosen], [request for _, request in chosen]


def _rates(judge: Judge, task: Task, pool: LabelledImages, x: Tensor) -> dict[str, Tensor]:
    """Share of each value of each reported attribute among states, as the judge sees them."""
    seen = see(judge, task.family, x.clamp(-1, 1))
    shares = {}
    for name in task.reported(pool):
        if name in seen:
            known = seen[name][seen[name] >= 0]
            shares[name] = torch.bincount(known, minlength=len(pool.values[name])) / max(1, len(known))
    return shares


def _quantiles(energies: dict[str, Tensor]) -> dict[str, list[float]]:
    """Energies of each run at equally spaced shares, from the least to the largest."""
    shares = torch.linspace(0, 1, QUANTILES)
    return {
        run: [round(float(value), 3) for value in torch.quantile(values, shares)]
        for run, values in energies.items()
    }
