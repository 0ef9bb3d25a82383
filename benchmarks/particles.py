"""What weighing chains is worth: estimators of a composition on the same experts, and live changes.

    particles            carried by p(x), weighed, resampled; by the experts' verdict in the end (the default)
    particles, posterior the same, weighed by p(request | x) in the end
    chains               the same kernel and levels without weights, at weight 1
    chains, weight 3     the taste that weights above 1 are
    best of n            chains at weight 1, as many as there are particles, drawn by the experts' verdict
    twisted              reverse diffusion towards the request, weighed by its transition densities, with the
                         experts' own p(request | x, σ) for a twist (Wu et al. 2023, arXiv 2306.17775, alg. 1)
    Feynman-Kac          reverse diffusion by the summed scores, weighed from the scores alone (Skreta et al.
                         2025, arXiv 2503.02819, prop. 3.3)

Every row asks for the same requests of one, three and five attributes, presence and absence alike.
`probability` holds log p(request) against how often samples of p(x) alone are like that. `live` turns one
attribute after another while chains run, and notes how many meet the mix after how long.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from common import RESULTS, write_results
from torch import Tensor

import composable_ebm as ceb
from composable_ebm.energy import Energy, carrier, satisfied
from composable_ebm.evaluation.judge import Judge, load_judge
from composable_ebm.evaluation.task import Task, requests, task_of
from composable_ebm.potential.potential import Potential
from composable_ebm.sampling.annealed import Annealed
from composable_ebm.sampling.particles import Population, drawn
from composable_ebm.sampling.request import calibrated_sampler
from composable_ebm.sampling.result import leaf_energies

Drawn = tuple[Tensor, int, int]
"""Samples, gradients taken for each of them, and distinct ancestors."""
Estimator = Callable[[Energy, int, int], Drawn]
"""From a composition, a number of samples and a seed."""


def by_sample(choose: Callable[[Energy], object | None]) -> Estimator:
    """An estimator that `sample` is, with the sampler that `choose` gives."""

    def estimate(mix: Energy, count: int, seed: int) -> Drawn:
        out = ceb.sample(
            mix, num_chains=count, sampler=choose(mix), num_steps=calibrated_sampler(mix)[1], seed=seed
        )
        if out.weighted is None:
            return out.images, out.evaluations, count
        return out.images, round(out.evaluations * len(out.weighted.states) / count), out.num_ancestors

    return estimate


def _posterior(mix: Energy) -> ceb.Particles:
    sampler = calibrated_sampler(mix)[0]
    return ceb.Particles(sampler.kernel, sampler.schedule)


def _chains(mix: Energy) -> Annealed:
    sampler = calibrated_sampler(mix)[0]
    return Annealed(sampler.kernel, sampler.schedule)


def best_of_n(mix: Energy, count: int, seed: int) -> Drawn:
    """Chains without weights, of which the experts choose."""
    sampler, num_steps = calibrated_sampler(mix)
    number = sampler.count(count)
    out = ceb.sample(mix, num_chains=number, sampler=_chains(mix), num_steps=num_steps, seed=seed)
    level = torch.tensor(sampler.schedule.noise_level(1.0))
    energies = leaf_energies(mix, out.samples, level)
    met = satisfied(mix, energies, mix.coefficients.float())
    chosen = drawn(torch.where(met, 0.0, -torch.inf), count, torch.tensor(0.5))
    return out.images[chosen], round(out.evaluations * number / count), len(chosen.unique())


def diffused(weigh: str) -> Estimator:
    """Reverse diffusion with weights: "twisted" or "scores"."""

    def estimate(mix: Energy, count: int, seed: int) -> Drawn:
        generator = torch.Generator().manual_seed(seed)
        sampler, num_steps = calibrated_sampler(mix)
        number = sampler.count(count)
        levels = sorted(set(sampler.schedule.values(sampler.schedule.noise_level, num_steps)), reverse=True)
        # Three gradients a level go into finer steps.
        fine = [a + (b - a) * i / 3 for a, b in pairwise(levels) for i in range(3)]
        levels = [*fine, levels[-1]]
        ground = carrier(mix)
        all_of_it, alone = Potential(mix), Potential(ground)
        each = [(w, Potential(t)) for t, w in zip(mix.operands, mix.weights, strict=True)]
        x = levels[0] * torch.randn(number, *mix.event_shape, generator=generator)
        population = None
        for sigma, after in pairwise(levels):
            level, next_level = torch.tensor(sigma), torch.tensor(after)
            whole, base = (p.at(noise_level=level) for p in (all_of_it, alone))
            parts = [(w, p.at(noise_level=level)) for w, p in each]
            energy, gradient = whole(x)
            variance = sigma**2 - after**2
            if weigh == "twisted":
                ground_energy, ground_gradient = base(x)
                said = ground_energy - energy
                if population is None:
                    population = Population.of(said)
            elif population is None:
                population = Population.of(torch.zeros(number))
            noise = torch.randn(x.shape, generator=generator) * math.sqrt(variance) * after / sigma
            y = x - variance * gradient + noise
            if weigh == "twisted":
                free, led = (y - x + variance * g for g in (ground_gradient, gradient))
                spread = 2 * variance * (after / sigma) ** 2
                ratio = (led.square() - free.square()).flatten(1).sum(1) / spread
                whole, base = (p.at(noise_level=next_level) for p in (whole, base))
                gain = ratio + base.energy(y) - whole.energy(y) - said
            else:
                squares = sum(w * p(x)[1].flatten(1).square().sum(1) for w, p in parts)
                gain = variance / 2 * (gradient.flatten(1).square().sum(1) - squares)
            u = torch.rand((), generator=generator)
            population, index = population.weighed(gain).resampled(u, 0.5)
            x = y[index]
        whole = all_of_it.at(noise_level=torch.tensor(levels[-1]))
        x = x - levels[-1] ** 2 * whole(x)[1]
        chosen = drawn(population.log_weights, count, torch.rand((), generator=generator))
        gradients = round(len(levels) * number / count)
        return mix.images(x[chosen]).clamp(-1, 1), gradients, len(population.ancestors[chosen].unique())

    return estimate


ESTIMATORS: dict[str, tuple[float, Estimator]] = {
    "particles": (1.0, by_sample(lambda mix: None)),
    "particles, posterior": (1.0, by_sample(_posterior)),
    "chains": (1.0, by_sample(_chains)),
    "chains, weight 3": (3.0, by_sample(_chains)),
    "best of n": (1.0, best_of_n),
    "twisted": (1.0, diffused("twisted")),
    "Feynman-Kac": (1.0, diffused("scores")),
}


def compare(
    task: Task,
    names: Sequence[str],
    sizes: Sequence[int],
    number: int,
    each: int,
    judges: Sequence,
    seed: int,
) -> list[dict]:
    """A row for each estimator and number of attributes."""
    rows = []
    for name in names:
        weight, estimate = ESTIMATORS[name]
        for size in sizes:
            generator = torch.Generator().manual_seed(50_000 + seed)
            right, ancestors, gradients, start = [], 0, 0, time.process_time()
            for i, request in enumerate(requests(task.askable, size, number, generator)):
                terms = [task.terms[attribute][value] for attribute, value in request.items()]
                mix = ceb.given(task.base, *terms, weight=weight)
                images, taken, alive = estimate(mix, each, seed + i)
                gradients, ancestors = max(gradients, taken), ancestors + alive / each / number
                seen = [judge.labels(images) for judge in judges]
                right.append([float(_all_right(labels, request).float().mean()) for labels in seen])
            accuracy = torch.tensor(right).mean(0).tolist()
            rows.append(
                {
                    "estimator": name,
                    "attributes": size,
                    "accuracy": [round(a, 4) for a in accuracy],
                    "ancestors": round(ancestors, 3),
                    "gradients": gradients,
                    "seconds": round(time.process_time() - start, 1),
                }
            )
            shown = " / ".join(f"{100 * a:.1f}" for a in accuracy)
            print(f"| {name} | {size} | {shown} % | {ancestors:.2f} | {gradients} |", flush=True)
    return rows


def _all_right(labels: dict[str, Tensor], request: dict[str, int]) -> Tensor:
    return torch.stack([labels[name] == value for name, value in request.items()]).all(0)


def probability(task: Task, sizes: Sequence[int], number: int, judge: Judge, seed: int) -> list[dict]:
    """log p(request) by particles, beside how often p(x)'s own samples are like that, in nats."""
    drawn = [ceb.sample(task.base, num_chains=1000, seed=seed + i).images for i in range(4)]
    labels = judge.labels(torch.cat(drawn))
    rows = []
    for size in sizes:
        generator = torch.Generator().manual_seed(50_000 + seed)
        estimates, frequencies = [], []
        for i, request in enumerate(requests(task.askable, size, number, generator)):
            mix = ceb.given(task.base, *(task.terms[name][value] for name, value in request.items()))
            estimates.append(ceb.sample(mix, num_chains=150, seed=seed + i).log_probability)
            frequencies.append(math.log(float(_all_right(labels, request).float().mean())))
        pairs = torch.tensor([estimates, frequencies])
        row = {
            "attributes": size,
            "estimate": round(float(pairs[0].mean()), 3),
            "frequency": round(float(pairs[1].mean()), 3),
            "rms": round(float((pairs[0] - pairs[1]).square().mean().sqrt()), 3),
        }
        rows.append(row)
        print(row, flush=True)
    return rows


def live(task: Task, chains: int, seconds: float, changes: int, seed: int) -> list[dict]:
    """Share of chains that meet a mix after each of some changes, by seconds of one core."""
    generator = torch.Generator().manual_seed(seed)
    names = list(task.terms)
    asked = {names[0]: 1}

    def mix() -> Energy:
        return ceb.given(task.base, *(task.terms[name][value] for name, value in asked.items()))

    rows = []
    with ceb.Engine() as engine:
        run = engine.submit(mix(), chains, num_steps=None, live=True, seed=seed)
        _follow(run, seconds)
        for _ in range(changes):
            name = names[int(torch.randint(len(names), (), generator=generator))]
            if name in asked and len(asked) > 1 and torch.rand((), generator=generator) < 0.3:
                del asked[name]
            else:
                asked[name] = 1 - asked.get(name, int(torch.randint(2, (), generator=generator)))
            before = run.frame.denoised
            run.steer(mix())
            shares, met_at_once, frame = _follow(run, seconds)
            moved = (frame.denoised - before).flatten(1).square().mean(1).sqrt()
            stays = float(moved[met_at_once].mean()) if bool(met_at_once.any()) else None
            row = {"change": name, "asked": dict(asked), "met": shares, "rms_of_those_that_stay": stays}
            rows.append(row)
            print(row, flush=True)
        run.cancel()
        run.result()
    return rows


def _follow(run: ceb.Run, seconds: float) -> tuple[dict[str, float], Tensor, ceb.Frame]:
    """Shares that meet the mix after 1, 2, ... seconds of process time, and who did at the first look."""
    start, shares, first = time.process_time(), {}, None
    target = run.composition
    for frame in run.frames():
        if frame.composition is not target or frame.met is None:
            continue
        first = frame.met if first is None else first
        spent = time.process_time() - start
        while len(shares) < spent and len(shares) < seconds:
            shares[str(len(shares) + 1)] = round(float(frame.met.float().mean()), 4)
        if spent > seconds:
            return shares, first, frame
    raise RuntimeError("the run ended")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--family", default="faces")
    parser.add_argument("--estimators", nargs="+", choices=list(ESTIMATORS), default=list(ESTIMATORS))
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 3, 5])
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--each", type=int, default=48, help="samples of each request")
    parser.add_argument("--changes", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=5.0, help="of one core, after each live change")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--parts", nargs="+", default=["estimators", "probability", "live"])
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    task = task_of(options.family)
    content: dict[str, object] = {"family": options.family, "each": options.each, "seed": options.seed}
    if "estimators" in options.parts:
        judges = [load_judge(options.family, kind)[0] for kind in ("convolutional", "mixer")]
        print("| estimator | attributes | accuracy, two judges | ancestors | gradients a sample |")
        print("|---|---|---|---|---|")
        content["estimators"] = compare(
            task, options.estimators, options.sizes, options.requests, options.each, judges, options.seed
        )
    if "probability" in options.parts:
        judge = load_judge(options.family, "convolutional")[0]
        content["probability"] = probability(task, options.sizes, options.requests, judge, options.seed)
    if "live" in options.parts:
        content["live"] = live(task, 16, options.seconds, options.changes, options.seed)
    name = "particles" if options.family == "faces" else f"particles_{options.family}"
    print(write_results(name, content, options.out))


if __name__ == "__main__":
    main()
