"""How far below data an energy can fall: normalised gradient descent from noise, wrong pictures and far away.

A density of n effective dimensions has its mode about n/2 nats below what it draws, so that the figure of a
Gaussian with the data's covariance stands beside: what its mean lies below the same data.

    PYTHONPATH=. python benchmarks/descent.py portraits --levels 0.4 0.1
"""

import argparse

import torch
from torch import Tensor, nn

import composable_ebm as ceb
from composable_ebm.data import load_data

EACH = 64


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


def descend(network: nn.Module, x: Tensor, level: Tensor, steps: int) -> Tensor:
    """Lowest energy that each start meets, (batch,); steps have lengths from 1 down to 0.01."""
    low = torch.full((len(x),), float("inf"))
    for i in range(steps):
        x = x.detach().requires_grad_()
        energy = network(x, level)[:, 0]
        (gradient,) = torch.autograd.grad(energy.sum(), x)
        low = torch.minimum(low, energy.detach())
        length = gradient.flatten(1).norm(dim=1).clamp(min=1e-12).reshape(-1, *[1] * (x.ndim - 1))
        x = x - 0.01 ** (i / steps) * gradient / length
    return low


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("family", nargs="?", default="portraits")
    parser.add_argument("--levels", type=float, nargs="+", default=[0.4, 0.1])
    parser.add_argument("--steps", type=int, default=1000)
    options = parser.parse_args()
    base = ceb.load_expert(f"{options.family}/base")
    data = load_data(options.family, "validation", num_images=2000)
    pictures = data.batch(torch.arange(len(data)))
    with torch.no_grad():
        z = (
            pictures
            if base.codec is None
            else torch.cat([base.codec.latents(x) for x in pictures.split(250)])
        )
    begun = starts(base, pictures, torch.Generator().manual_seed(0))
    network = base.network
    for value in options.levels:
        level = torch.tensor(value)
        with torch.no_grad():
            energies = torch.cat([network(part, level)[:, 0] for part in z.split(250)])
        lowest = energies.kthvalue(max(1, round(0.001 * len(energies)))).values
        d = (z.flatten(1) - network.mean) @ network.axes.T
        gaussian = (d.square() / (network.variances + value**2)).sum(1) / 2
        own = gaussian.kthvalue(max(1, round(0.001 * len(z)))).values
        print(f"sigma {value:g}: lowest 0.1 % of data {lowest:.0f}; a Gaussian's mean lies {own:.0f} below")
        for name, x in begun.items():
            low = descend(network, x, level, options.steps)
            print(f"  {name:<12} {float(lowest - low.min()):8.0f} nats below at most")


if __name__ == "__main__":
    main()
