"""One iteration of persistent contrastive divergence, the textbook recipe, against ebmkit.

60 steps for 128 chains from a buffer of 8,192, then a forward and backward pass over data and
negatives and a step of Adam; the same network and settings, taking turns.

    python benchmarks/training.py --quick
    python benchmarks/training.py --device cuda
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import ebm
import torch
from common import write_results
from rivals import CLIP, LIMITS, NOISE, STEP_SIZE, textbook
from timing import add_machine, ceilings, machine, race, relative, uniform
from torch import nn

import composable_ebm as ceb
from composable_ebm.train.objectives.base import Setting
from composable_ebm.train.objectives.contrastive import ContrastiveDivergence

OURS = "composable_ebm"
BUFFER, RESTART, ENERGY_L2 = 8192, 0.05, 0.1


def our_iteration(batch: int, steps: int, device: torch.device) -> Callable[[], None]:
    """An iteration as the trainer runs it."""
    network = nn.Sequential(*textbook()[:-1]).requires_grad_(True).to(device)  # outputs (batch, 1)
    kernel = ceb.Langevin(STEP_SIZE, noise_scale=NOISE, grad_clip=CLIP, clamp=LIMITS)
    objective = ContrastiveDivergence(
        cd_steps=steps, buffer_size=BUFFER, reinit_prob=RESTART, energy_l2=ENERGY_L2, classification=0.0
    )
    generator = torch.Generator(device).manual_seed(0)
    phase = objective.begin(Setting((1, 32, 32), 1, LIMITS, batch, kernel, generator))
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-4)
    x, y = uniform((batch, 1, 32, 32), device), torch.zeros(batch, dtype=torch.long, device=device)

    def iteration() -> None:
        loss, _ = phase.loss(network, network, x, y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    return iteration


def ebmkit_iteration(batch: int, steps: int, device: torch.device) -> Callable[[], None]:
    """The same in ebmkit, with the same noise on the data."""
    network = textbook().requires_grad_(True).to(device)
    sampler = ebm.samplers.LangevinDynamics(STEP_SIZE, steps, NOISE, CLIP, LIMITS)
    buffer = ebm.ReplayBuffer(BUFFER, (1, 32, 32), RESTART, lambda shape: 2 * torch.rand(shape) - 1)
    objective = ebm.ContrastiveDivergence(sampler, buffer, energy_reg=ENERGY_L2)
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-4)
    x = uniform((batch, 1, 32, 32), device)

    def iteration() -> None:
        loss = objective(network, x + 0.02 * torch.randn_like(x)).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    return iteration


def main() -> None:
    parser = argparse.ArgumentParser(description="Time an iteration of contrastive divergence, in turns.")
    parser.add_argument("--quick", action="store_true", help="10 steps of 64 chains instead of 60 of 128")
    add_machine(parser)
    options = parser.parse_args()
    device = machine(options)
    batch, steps, rounds = (64, 10, 3) if options.quick else (128, 60, 7)
    contestants = {
        OURS: our_iteration(batch, steps, device),
        "ebmkit": ebmkit_iteration(batch, steps, device),
    }
    content = {
        "device": device.type,
        "threads": options.threads,
        "ceilings": ceilings(device),
        "batch": batch,
        "steps": steps,
        "contestants": relative(race(contestants, rounds, device), OURS),
    }
    for name, figures in content["contestants"].items():
        ratio = f"{figures['ours_is_faster_by']:.2f} {figures['quartiles']}"
        print(f"{name}: {figures['seconds']:.3f} s an iteration, {ratio} times ours")
    name = "training" if device.type == "cpu" else f"training_{device.type}"
    print(write_results(name, content, options.out))


if __name__ == "__main__":
    main()
