"""A restricted Boltzmann machine beside scikit-learn's, on the same bits, epochs, batches and hidden units.

Both learn by persistent contrastive divergence with one Gibbs sweep an update. scikit-learn's is
plain gradient ascent at a constant rate; ours is the shared trainer, Adam at a falling rate with
averaged weights. Each is fitted at five rates, and the one with the best log pseudo-likelihood of
validation images counts; at that rate it is fitted twice more with other seeds. All three are judged
by the same code on test images: the exact log pseudo-likelihood, and the log likelihood with log Z by
annealed importance sampling. A third row is ours with fewer epochs, so that a reader sees what either
reaches in a given time. Figures are medians of three seeds with their extremes; times are of the
processor, one thread, fitting only, and include what the trainer writes.

    python benchmarks/rbm.py            # about four minutes
    python benchmarks/rbm.py --quick
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence

import torch
from common import write_results

from composable_ebm.data import LabelledImages, load_data
from composable_ebm.energy.bits import log_pseudo_likelihood
from composable_ebm.experts.networks.rbm import RBM
from composable_ebm.partition.log_z import log_z
from composable_ebm.train import ContrastiveDivergence, TrainConfig, train
from composable_ebm.train.config import RBM as Sizes
from composable_ebm.train.config import GenerationConfig, OptimiserConfig
from composable_ebm.train.trainer import TrainingDivergedError

BATCH = 100
OUR_RATES = (5e-3, 1e-2, 2e-2, 4e-2, 8e-2)
THEIR_RATES = (0.05, 0.1, 0.2, 0.4, 0.8)
SEEDS = (0, 1, 2)

Fit = Callable[[torch.Tensor, int, int, float, int], tuple[RBM, float]]


def bits(split: str, count: int) -> torch.Tensor:
    """The first images of MNIST, black and white at half, (count, 1, 28, 28)."""
    return (load_data("digits", split).images[:count] > 127).float()


def ours(x: torch.Tensor, hidden: int, epochs: int, rate: float, seed: int) -> tuple[RBM, float]:
    """An RBM by the shared trainer, and the seconds it took."""
    images = LabelledImages((x * 255).byte(), {}, {}, "digits as bits")
    iterations = epochs * len(x) // BATCH
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            family="bits",
            name="rbm",
            network=Sizes(hidden=hidden),
            objective=ContrastiveDivergence(
                cd_steps=1, buffer_size=BATCH, reinit_prob=0.0, energy_l2=0.0, data_noise=0.0
            ),
            optimiser=OptimiserConfig(learning_rate=rate, hold=0.1, grad_clip=100.0, ema=0.99),
            generation=GenerationConfig(num_steps=1),
            batch_size=BATCH,
            num_iterations=iterations,
            seed=seed,
            evaluate_every=iterations,
            save_every=iterations,
            log_every=iterations // 10,
            models=f"{folder}/models",
            runs=f"{folder}/runs",
            cpu=True,
        )
        start = time.process_time()
        expert = train(config, data=(images, images))
        return expert.network, time.process_time() - start  # type: ignore[return-value]


def theirs(x: torch.Tensor, hidden: int, epochs: int, rate: float, seed: int) -> tuple[RBM, float]:
    """scikit-learn's, as one of ours, and the seconds it took."""
    from sklearn.neural_network import BernoulliRBM
    from threadpoolctl import threadpool_limits

    model = BernoulliRBM(hidden, learning_rate=rate, batch_size=BATCH, n_iter=epochs, random_state=seed)
    with threadpool_limits(1):  # NumPy's products do not ask torch how many threads to take
        start = time.process_time()
        model.fit(x.flatten(1).numpy())
        seconds = time.process_time() - start
    network = RBM(x.shape[1:], hidden=hidden)
    with torch.no_grad():
        network.weight.copy_(torch.from_numpy(model.components_.T))
        network.visible_bias.copy_(torch.from_numpy(model.intercept_visible_))
        network.hidden_bias.copy_(torch.from_numpy(model.intercept_hidden_))
    return network.eval(), seconds


def pseudo_likelihood(network: RBM, x: torch.Tensor) -> float:
    """Mean log pseudo-likelihood in nats an image."""
    return float(log_pseudo_likelihood(network.free_energy(), x).mean())


def best_rate(
    fit: Fit, rates: Sequence[float], x: torch.Tensor, validation: torch.Tensor, hidden: int, epochs: int
) -> tuple[float, dict[str, dict[str, float]]]:
    """The rate that suits validation images best, and how each did. One that diverges counts for nothing."""
    tried = {}
    for rate in rates:
        try:
            network, seconds = fit(x, hidden, epochs, rate, SEEDS[0])
        except TrainingDivergedError:
            print(f"{fit.__name__:7} rate {rate:<6g} diverged", flush=True)
            continue
        score = pseudo_likelihood(network, validation)
        print(f"{fit.__name__:7} rate {rate:<6g} {seconds:6.1f} s  validation {score:8.2f} nats", flush=True)
        if math.isfinite(score):
            tried[rate] = {"seconds": round(seconds, 2), "validation_log_pseudo_likelihood": round(score, 2)}
    best = max(tried, key=lambda rate: tried[rate]["validation_log_pseudo_likelihood"])
    return best, {f"{rate:g}": row for rate, row in tried.items()}


def judged(network: RBM, train_bits: torch.Tensor, test: torch.Tensor, levels: int) -> dict[str, float]:
    """Figures of an RBM on test images, in nats an image."""
    energy = network.free_energy()
    mean = train_bits.flatten(1).mean(0).clamp(0.01, 0.99).logit()
    z = log_z(energy, num_chains=100, levels=levels, start=mean, init=train_bits[:100], burn_in=100)
    with torch.no_grad():
        likelihood = -float(energy(test).mean()) - z.value
    return {
        "log_pseudo_likelihood": round(pseudo_likelihood(network, test[:300]), 2),
        "log_likelihood": round(likelihood, 2),
        "log_z": round(z.value, 2),
        "log_z_error": round(z.error, 3),
        "log_z_forward": round(z.forward, 2),
        "log_z_backward": round(z.backward, 2),
    }


def spread(runs: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Median and extremes of each figure over the seeds."""
    return {
        name: {
            "median": statistics.median(run[name] for run in runs),
            "low": min(run[name] for run in runs),
            "high": max(run[name] for run in runs),
        }
        for name in runs[0]
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a size that only shows that it runs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    count, hidden, epochs, levels = (1000, 32, 2, 50) if options.quick else (10_000, 200, 10, 500)
    seeds = SEEDS[:1] if options.quick else SEEDS
    x, validation, test = bits("train", count), bits("validation", 100), bits("test", 2000)

    def repeated(fit: Fit, rate: float, epochs: int) -> dict:
        runs = []
        for seed in seeds:
            network, seconds = fit(x, hidden, epochs, rate, seed)
            runs.append({"seconds": round(seconds, 2), **judged(network, x, test, levels)})
        return {"rate": rate, "epochs": epochs, **spread(runs)}

    rows: dict[str, dict] = {}
    short = max(1, epochs * 3 // 10)
    fits: tuple[tuple[str, Fit, Sequence[float]], ...] = (
        ("composable_ebm", ours, OUR_RATES),
        ("scikit-learn", theirs, THEIR_RATES),
    )
    for name, fit, rates in fits:
        rate, tried = best_rate(fit, rates[:1] if options.quick else rates, x, validation, hidden, epochs)
        rows[name] = {**repeated(fit, rate, epochs), "tried": tried}
        if fit is ours:
            rows[f"{name}, {short} epochs"] = repeated(fit, rate, short)
    for name, row in rows.items():
        seconds, pseudo, likelihood = (
            row[figure] for figure in ("seconds", "log_pseudo_likelihood", "log_likelihood")
        )
        print(
            f"{name:24} rate {row['rate']:<6g} {seconds['median']:5.1f} s  "
            f"log pseudo-likelihood {pseudo['median']:8.2f} ({pseudo['low']} to {pseudo['high']})  "
            f"log likelihood {likelihood['median']:8.2f} ({likelihood['low']} to {likelihood['high']}) nats"
        )
    other = rows.pop("scikit-learn")
    summary = {
        name: {
            "log_pseudo_likelihood_gained": round(_less(row, other, "log_pseudo_likelihood"), 2),
            "log_likelihood_gained": round(_less(row, other, "log_likelihood"), 2),
            "seconds_over_scikit_learn": round(row["seconds"]["median"] / other["seconds"]["median"], 2),
        }
        for name, row in rows.items()
    }
    print(summary)
    rows["scikit-learn"] = other
    settings = {"images": count, "hidden": hidden, "batch": BATCH, "levels": levels, "seeds": len(seeds)}
    if not options.quick:
        print(write_results("rbm", {"settings": settings, "rows": rows, "against_scikit_learn": summary}))


def _less(row: dict, other: dict, figure: str) -> float:
    return row[figure]["median"] - other[figure]["median"]


if __name__ == "__main__":
    main()
