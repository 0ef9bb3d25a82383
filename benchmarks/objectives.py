"""What an iteration of each objective costs, on the same network, data and batch.

One convolutional energy on 32 px images of three channels, and one noise-conditioned perceptron for the
objectives that need noise levels. Iterations of all objectives are interleaved, so that a busy machine
slows all alike; ratios are what to trust. An iteration is loss, backward pass and Adam step.

    python benchmarks/objectives.py            # CPU, one thread
    python benchmarks/objectives.py --quick    # a small size, for a look
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from common import RESULTS, write_results
from torch import nn

import composable_ebm as ceb
from composable_ebm.experts.networks import NETWORKS
from composable_ebm.train.objectives.base import Objective, Phase, Setting
from composable_ebm.train.objectives.contrastive import ContrastiveDivergence
from composable_ebm.train.objectives.denoising import DenoisingAtOneLevel, DenoisingScoreMatching
from composable_ebm.train.objectives.recovery import RecoveryLikelihood
from composable_ebm.train.objectives.score_matching import ScoreMatching, SlicedScoreMatching

SHORT_RUN = ceb.Langevin(
    step_size=10.0, noise_scale=0.005, grad_clip=0.03, clamp=(-1.0, 1.0), noise_first=True
)
CD20 = "contrastive divergence, 20 steps"


@dataclass(frozen=True)
class Row:
    """An objective, and the kind of network it trains."""

    name: str
    network: str
    objective: Objective
    passes: str


ROWS = (
    Row("denoising, one level", "ConvEnergy", DenoisingAtOneLevel(0.1, 0), "1 second-order"),
    Row("Hutchinson's trace", "ConvEnergy", ScoreMatching(data_noise=0.1), "2 second-order"),
    Row("sliced, variance reduced", "ConvEnergy", SlicedScoreMatching(data_noise=0.1), "2 second-order"),
    Row(CD20, "ConvEnergy", ContrastiveDivergence(cd_steps=20, buffer_size=1024), "20 input gradients"),
    Row(
        "contrastive divergence, 60 steps",
        "ConvEnergy",
        ContrastiveDivergence(cd_steps=60, buffer_size=1024),
        "60 input gradients",
    ),
    Row("denoising, all levels", "DiffusedEnergy", DenoisingScoreMatching(), "1 second-order"),
    Row("denoising, all levels", "Denoiser", DenoisingScoreMatching(), "1 first-order"),
    Row("recovery likelihood, 10 steps", "DiffusedEnergy", RecoveryLikelihood(), "10 input gradients"),
)


class Trial:
    """One row at work."""

    def __init__(self, row: Row, batch: int, device: torch.device) -> None:
        torch.manual_seed(0)
        self.row = row
        shape = (3, 32, 32)
        options = {"ConvEnergy": {}, "DiffusedEnergy": {"hidden": 448}, "Denoiser": {}}[row.network]
        self.network: nn.Module = NETWORKS[row.network](shape, **options).to(device)
        generator = torch.Generator(device).manual_seed(0)
        self.x = torch.rand(batch, *shape, generator=generator, device=device) * 2 - 1
        self.y = torch.zeros(batch, dtype=torch.long, device=device)
        setting = Setting(shape, 1, (-1.0, 1.0), batch, SHORT_RUN, generator)
        self.phase: Phase = row.objective.begin(setting)
        self.optimiser = torch.optim.Adam(self.network.parameters(), lr=1e-5)
        self.seconds: list[float] = []

    def iteration(self) -> None:
        """One iteration, timed."""
        start = time.perf_counter()
        loss, _ = self.phase.loss(self.network, self.network, self.x, self.y)
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        if self.x.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--iterations", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="batch 8, 3 iterations")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args()
    if options.quick:
        options.batch, options.iterations = 8, 3
    torch.set_num_threads(1)

    trials = [Trial(row, options.batch, torch.device(options.device)) for row in ROWS]
    for trial in trials:  # warm-up
        trial.iteration()
        trial.seconds.clear()
    for _ in range(options.iterations):
        for trial in trials:
            trial.iteration()
    # The ratio of each round, then its median: what slowed a round slowed both.
    reference = next(trial.seconds for trial in trials if trial.row.name == CD20)
    table = []
    print(
        "| objective | network | per iteration | ms | of CD with 20 steps |\n| --- | --- | --- | --- | --- |"
    )
    for trial in trials:
        ratio = statistics.median(a / b for a, b in zip(trial.seconds, reference, strict=True))
        row = {
            "objective": trial.row.name,
            "network": trial.row.network,
            "parameters": sum(p.numel() for p in trial.network.parameters()),
            "gradients": trial.row.passes,
            "milliseconds": round(1000 * statistics.median(trial.seconds), 1),
            "milliseconds_least": round(1000 * min(trial.seconds), 1),
            "ratio_to_cd20": round(ratio, 3),
        }
        table.append(row)
        cells = (row[key] for key in ("objective", "network", "gradients", "milliseconds"))
        print(f"| {' | '.join(map(str, cells))} | {ratio:.2f} |")
    content = {"batch": options.batch, "iterations": options.iterations, "rows": table}
    print(write_results("objectives", content, options.out))


if __name__ == "__main__":
    main()
