"""Contrastive divergence at temperature 1 and score matching: one network, one data set, the same seconds.

Handwritten digits at 16 pixels and one conditional energy E(x, digit, σ). Each cell trains for so many
seconds of one core: from scratch, or the second half of them after a first stage of score matching. Figures
are of pictures drawn from noise by one sampler, and how they stay under an exact kernel (MALA), beside
held-out ones. The gap is mean E(samples) - mean E(held-out pictures with the noise of the level), after those
exact steps: 0 where energies are right at T = 1.

    python benchmarks/contrast.py --seconds 150               # 15 minutes of one core
    python benchmarks/contrast.py --seconds 50 --seeds 0 1 2  # score matching beside contrast, over seeds

With several seeds only those two run, the second without and with the denoising beside it.
"""

from __future__ import annotations

import argparse
import copy
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from common import RESULTS, write_results
from torch import nn
from torch.nn import functional as F

import composable_ebm as ceb
from composable_ebm.data import LabelledImages, load_data
from composable_ebm.evaluation.judge import Judge
from composable_ebm.experts.expert import Expert
from composable_ebm.plotting import save_grid
from composable_ebm.sampling.chain import Chain
from composable_ebm.sampling.kernel import Noise
from composable_ebm.train.config import AnyObjective, ConfinedEnergy, DataConfig, TrainConfig
from composable_ebm.train.export import held_out_metrics, sample_values
from composable_ebm.train.objectives.base import Setting
from composable_ebm.train.objectives.denoising import DenoisingScoreMatching
from composable_ebm.train.objectives.over_levels import AtLevels, ContrastiveOverLevels
from composable_ebm.train.objectives.recovery import RecoveryLikelihood
from composable_ebm.train.preparation import build, card_of

LOW, HIGH = 0.15, 5.0
SIZES = ConfinedEnergy(hidden=320, noise_range=(LOW, HIGH), level=LOW)
RATES = {"denoising": 2e-3, "recovery": 5e-4, "contrastive": 5e-4, "contrastive, denoising": 5e-4}
LATER = 0.5  # of these rates after a first stage
MORE = 100  # exact steps that samples are watched for


OBJECTIVES: dict[str, AnyObjective] = {
    "denoising": DenoisingScoreMatching(classification=0.5, log_sigma_mean=-0.6, log_sigma_std=1.0),
    "recovery": RecoveryLikelihood(langevin_steps=10, step_size=0.1, classification=0.5),
    "contrastive": ContrastiveOverLevels(buffer_size=512, denoising=0.0),
    "contrastive, denoising": ContrastiveOverLevels(buffer_size=512),
}


def small(data: LabelledImages) -> LabelledImages:
    """Digits at 16 pixels."""
    wide = F.pad(data.images.float(), (2, 2, 2, 2))
    images = F.avg_pool2d(wide, 2).round().byte()
    return replace(
        data, images=images, labels={"digit": data.labels["digit"]}, values={"digit": data.values["digit"]}
    )


def trained_judge(data: LabelledImages) -> Judge:
    """A classifier of small digits, 800 iterations."""
    torch.manual_seed(1)
    judge = Judge(data.event_shape, data.values, "convolutional")
    optimiser = torch.optim.AdamW(judge.parameters(), 2e-3)
    for _ in range(800):
        i = torch.randint(len(data), (128,))
        x = data.batch(i) + 0.15 * torch.rand(128, 1, 1, 1) * torch.randn(128, *data.event_shape)
        loss = F.cross_entropy(judge(x)["digit"], data.labels["digit"][i])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return judge.eval().requires_grad_(False)


def train(
    network: nn.Module,
    kind: str,
    seconds: float,
    data: LabelledImages,
    later: bool = False,
    seed: int = 0,
) -> tuple[nn.Module, int, float]:
    """The averaged network, its iterations, and the last mean gap, after so many seconds of one core."""
    generator = torch.Generator().manual_seed(seed)
    setting = Setting(data.event_shape, 10, (-1.0, 1.0), 128, ceb.Langevin(0.01), generator)
    phase = OBJECTIVES[kind].begin(setting)
    average = copy.deepcopy(network)
    rate = RATES[kind] * (LATER if later else 1)
    optimiser = torch.optim.Adam(network.parameters(), rate, betas=(0.9, 0.99))
    start, count, gaps = time.process_time(), 0, []
    while (done := (time.process_time() - start) / seconds) < 1:
        for group in optimiser.param_groups:
            group["lr"] = rate * min(1.0, (count + 1) / 50) * min(1.0, (1 - done) / 0.6)
        i = torch.randint(len(data), (128,), generator=generator)
        loss, figures = phase.loss(network, network, data.batch(i), data.labels["digit"][i])
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        count += 1
        gaps = [*gaps[-49:], float(figures.get("energy_gap", torch.tensor(float("nan"))))]
        with torch.no_grad():
            for mine, theirs in zip(average.parameters(), network.parameters(), strict=True):
                mine.lerp_(theirs, 1 - min(0.998, count / (count + 20)))
    return average, count, sum(gaps) / len(gaps)


def measure(
    expert: Expert, judge: Judge, data: LabelledImages, per_value: int, seed: int = 0
) -> dict[str, float]:
    """Held-out figures, and those of samples from noise."""
    held_out = held_out_metrics(expert, data)
    drawn = torch.cat(list(sample_values(expert, per_value, seed=100 * seed).values()))
    labels = torch.arange(10).repeat_interleave(per_value)
    levels = torch.full((len(labels),), LOW)
    noise = Noise((torch.Generator().manual_seed(1), len(labels)))
    exact = Chain(AtLevels(expert.network, labels, levels), drawn, ceb.MALA(0.1 * LOW**2), noise)
    moved = exact.advance(MORE)
    x, y = data.batch(torch.arange(len(data))), data.labels["digit"]
    noisy = x + LOW * torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        of_data = expert.network(noisy, torch.tensor(LOW)).gather(1, y[:, None]).mean()
    return {
        "heldout_denoising": held_out["heldout_denoising"],
        "heldout_accuracy": held_out["heldout_accuracy"],
        "sample_accuracy": float((judge.labels(drawn)["digit"] == labels).float().mean()),
        "accuracy_after_mala": float((judge.labels(moved)["digit"] == labels).float().mean()),
        "gap_after_mala": float(exact.final_energies().mean() - of_data),
    }


class Bench:
    """What all cells share: the data, the judge and the network they begin with."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.data, self.held_out = (
            small(load_data("digits", "train")),
            small(load_data("digits", "validation")),
        )
        self.judge = trained_judge(self.data)
        config = TrainConfig(
            family="contrast",
            name="digit",
            network=SIZES,
            objective=OBJECTIVES["denoising"],
            data=DataConfig(name="digits", attribute="digit"),
        )
        self.card = card_of(config, self.data, self.data.values["digit"])
        self.rows: list[dict[str, object]] = []

    def on_real(self) -> float:
        """Share of held-out pictures that the judge reads right."""
        x = self.held_out.batch(torch.arange(len(self.held_out)))
        return float((self.judge.labels(x)["digit"] == self.held_out.labels["digit"]).float().mean())

    def fresh(self, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        network = build(self.card)
        network.fit(self.data.batch(torch.arange(10_000)))
        return network

    def report(
        self, start: str, kind: str, seconds: float, trained: tuple[nn.Module, int, float], seed: int = 0
    ) -> None:
        network, count, gap = trained
        expert = Expert.standing(network.eval().requires_grad_(False), self.card)
        row: dict[str, object] = {"start": start, "objective": kind, "seed": seed, "seconds": seconds}
        row["iterations"] = count
        row["training_gap"] = None if gap != gap else round(gap, 3)  # denoising has none
        figures = measure(expert, self.judge, self.held_out, self.options.samples, seed)
        row |= {name: round(value, 4) for name, value in figures.items()}
        self.rows.append(row)
        print(row, flush=True)
        if self.options.sheets:
            self.options.sheets.mkdir(parents=True, exist_ok=True)
            drawn = torch.stack(list(sample_values(expert, 8, seed=9).values()), dim=1)
            name = f"{start}-{kind}.png".replace(" ", "_")
            save_grid(drawn.flatten(0, 1), self.options.sheets / name, columns=10)

    def objectives(self) -> None:
        """Each objective from scratch and after a first stage."""
        seconds, data = self.options.seconds, self.data
        first = train(self.fresh(), "denoising", seconds / 2, data)
        self.report("first stage alone", "denoising", seconds / 2, first)
        for kind in OBJECTIVES:
            self.report("scratch", kind, seconds, train(self.fresh(), kind, seconds, data))
            warm = copy.deepcopy(first[0]).requires_grad_(True)
            self.report("first stage", kind, seconds, train(warm, kind, seconds / 2, data, later=True))

    def over_seeds(self, seed: int) -> None:
        """Score matching alone, and contrast after a first stage, without denoising beside it and with it."""
        seconds, data = self.options.seconds, self.data
        plain = train(self.fresh(seed), "denoising", seconds, data, seed=seed)
        self.report("scratch", "denoising", seconds, plain, seed)
        first = train(self.fresh(seed), "denoising", seconds / 2, data, seed=seed)[0]
        for kind in ("contrastive", "contrastive, denoising"):
            warm = copy.deepcopy(first).requires_grad_(True)
            done = train(warm, kind, seconds / 2, data, later=True, seed=seed)
            self.report("first stage", kind, seconds, done, seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=150, help="of one core, a cell")
    parser.add_argument("--samples", type=int, default=40, help="of each digit")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0], help="several: contrast alone and with denoising"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--sheets", type=Path, help="folder for pictures of samples")
    options = parser.parse_args()
    torch.set_num_threads(1)

    bench = Bench(options)
    if len(options.seeds) == 1:
        bench.objectives()
    for seed in options.seeds if len(options.seeds) > 1 else ():
        bench.over_seeds(seed)
    content = {
        "judge_on_real": round(bench.on_real(), 4),
        "network": asdict(SIZES),
        "objectives": {name: asdict(objective) for name, objective in OBJECTIVES.items()},
        "samples": 10 * options.samples,
        "rows": bench.rows,
    }
    write_results("contrast" if len(options.seeds) == 1 else "contrast_seeds", content, options.out)


if __name__ == "__main__":
    main()
