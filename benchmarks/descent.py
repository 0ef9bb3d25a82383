"""How far below data an energy can fall: normalised gradient descent from noise, wrong pictures and far away.

A density of n effective dimensions has its mode about n/2 nats below what it draws, so that the figure of a
Gaussian with the data's covariance stands beside: what its mean lies below the same data, and below its own
draws. Chains at temperature 1 start from the lowest states: what has no volume is left at once.

    PYTHONPATH=. python benchmarks/descent.py portraits letters --levels 0.4 0.1 --without-floor
"""

import argparse
from pathlib import Path

import torch
from common import RESULTS, write_results
from torch import Tensor, nn

import composable_ebm as ceb
from composable_ebm.data import load_data
from composable_ebm.experts.networks import ConfinedEnergy
from composable_ebm.sampling.chains import Chain
from composable_ebm.sampling.kernel import Noise
from composable_ebm.sampling.schedule import constant

EACH = 64
LOWEST = 0.001  # of data, whose energy counts as the lowest


def starts(base: ceb.Expert, pictures: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """States that are no data: noise, pictures upside down, blocks of colour, and points far away."""
    shape = (EACH, *base.event_shape)
    blocks = 2 * torch.rand(EACH, pictures.shape[1], 8, 8, generator=generator) - 1
    blocks = nn.functional.interpolate(blocks, size=tuple(pictures.shape[2:]))

    def state(x: Tensor) -> Tensor:
        return x if base.codec is None else base.codec.latents(x)

    return {
        "noise": torch.randn(shape, generator=generator),
        "upside down": state(pictures[:EACH].flip(2)),
        "blocks": state(blocks),
        "far away": 30 * torch.randn(shape, generator=generator),
    }


def descend(network: nn.Module, x: Tensor, level: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Lowest energy that each start meets, (batch,), and where; steps have lengths from 1 down to 0.01."""
    low, where = torch.full((len(x),), float("inf")), x.clone()
    for i in range(steps):
        x = x.detach().requires_grad_()
        energy = network(x, level)[:, 0]
        (gradient,) = torch.autograd.grad(energy.sum(), x)
        lower = energy.detach() < low
        low[lower], where[lower] = energy.detach()[lower], x.detach()[lower]
        length = gradient.flatten(1).norm(dim=1).clamp(min=1e-12).reshape(-1, *[1] * (x.ndim - 1))
        x = x - 0.01 ** (i / steps) * gradient / length
    return low, where


def lowest_of(energies: Tensor) -> Tensor:
    return energies.kthvalue(max(1, round(LOWEST * len(energies)))).values


def gaussian(network: nn.Module, z: Tensor, level: float) -> dict[str, float]:
    """How far a Gaussian's mean lies below data, and below its own draws with the noise of the level."""
    if network.mean.numel() != z[0].numel():  # of patches
        return {}
    d = z.flatten(1) - network.mean
    own = lowest_of(network.gaussian_energy(d, d @ network.axes.T, z.new_full((), level**2)))
    draws = network.prior(torch.randn(4000, *z.shape[1:], generator=torch.Generator().manual_seed(0)), level)
    d = draws.flatten(1) - network.mean
    drawn = lowest_of(network.gaussian_energy(d, d @ network.axes.T, z.new_full((), level**2)))
    return {"gaussian_below_data": round(float(own)), "gaussian_below_its_draws": round(float(drawn))}


def left(base: ceb.Expert, x: Tensor, level: float, steps: int) -> Tensor:
    """Energies of chains at temperature 1 that began at x, (batch,)."""
    noise = Noise((torch.Generator().manual_seed(0), len(x)))
    chain = Chain(base, x, ceb.Annealed(ceb.Langevin(0.1 * level**2), at(level)), noise, num_steps=steps)
    chain.advance(steps)
    return chain.final_energies()


def at(level: float) -> ceb.Schedule:
    """One noise level throughout."""
    return ceb.Schedule(noise_level=constant(level))


@torch.no_grad()
def states(base: ceb.Expert, pictures: Tensor) -> Tensor:
    return pictures if base.codec is None else torch.cat([base.codec.latents(x) for x in pictures.split(250)])


def measure(
    family: str, levels: list[float], steps: int, chains: int, floor: bool
) -> list[dict[str, object]]:
    """One row for a noise level."""
    base = ceb.load_expert(f"{family}/base")
    data = load_data(family, "validation", num_images=2000) if base.codec else load_data(family, "validation")
    pictures = data.batch(torch.arange(min(len(data), 2000)))
    z = states(base, pictures)
    begun = starts(base, pictures, torch.Generator().manual_seed(0))
    network, rows = base.network, []
    if not floor and isinstance(network, ConfinedEnergy):
        network.set_floor(())
    for value in levels:
        level = torch.tensor(value)
        with torch.no_grad():
            lowest = lowest_of(torch.cat([network(part, level)[:, 0] for part in z.split(250)]))
        row: dict[str, object] = {"family": family, "level": value, "lowest_of_data": round(float(lowest))}
        row |= gaussian(network, z, value) if hasattr(network, "axes") else {}
        print(row, flush=True)
        for name, x in begun.items():
            low, where = descend(network, x, level, steps)
            deep = round(float(lowest - low.min()))
            after = left(base, where, value, chains)
            row[name] = {"below": deep, "after_chains": round(float(lowest - after.min()))}
            print(f"  {name:<12} {deep:8} nats below at most, {row[name]['after_chains']} after chains")
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("families", nargs="*", default=["portraits", "letters", "digits", "faces", "shapes"])
    parser.add_argument("--levels", type=float, nargs="+", default=[0.4, 0.1])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--chains", type=int, default=500, help="steps of chains from the lowest states")
    parser.add_argument("--without-floor", action="store_true", help="energies as they are learned")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [
        row
        for family in options.families
        for row in measure(family, options.levels, options.steps, options.chains, not options.without_floor)
    ]
    write_results("descent", {"steps": options.steps, "chains": options.chains, "rows": rows}, options.out)


if __name__ == "__main__":
    main()
