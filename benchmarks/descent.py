"""How far below data an energy can fall: normalised gradient descent from noise, wrong pictures and far away.

256 starts of each expert: noise, pictures of another family, pictures upside down, and points far away.
Each takes 1,000 steps against the gradient's direction, of lengths that fall from 1 to 0.01, at each noise
level; what counts is the lowest energy that any of them meets on the way, below the lowest 0.1 % of held-out
data. The energy of an expert with values is its marginal. Compositions `given(base, attributes)` come last:
they lie above their base everywhere, for -log p(a | x) is positive.

A density of n effective dimensions has its mode about n/2 nats below what it draws, so that the figure of a
Gaussian with the data's covariance stands beside: what its mean lies below the same data. With `--chains`,
chains at temperature 1 start from the lowest states: what has no volume is left at once.

    python benchmarks/descent.py                             # every shipped energy of grey levels or latents
    python benchmarks/descent.py faces/base --without-floor  # as it is learned
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from common import RESULTS, write_results
from torch import Tensor, nn

import composable_ebm as ceb
from composable_ebm.data import LabelledImages, load_data
from composable_ebm.experts.catalogue import cards
from composable_ebm.experts.networks.skeleton import GaussianSkeleton
from composable_ebm.sampling.chain import Chain
from composable_ebm.sampling.kernel import Noise
from composable_ebm.sampling.schedule import constant

EACH = 64
LOWEST = 0.001  # of data, whose energy counts as the lowest
HELD_OUT = 1024
FAR = 30.0  # in units of the data's range
OTHERS = {"digits": "faces"}  # a family's wrong pictures; faces have digits
DATA = {"contrastive_digits": "digits", "contrastive_faces": "faces"}
COMPOSED = {
    "digits": {"digit": "3", "thick": "thick", "slanted": "slanted"},
    "faces": dict.fromkeys(("smile", "glasses", "beard", "curly", "grey_hair"), 1),
    "letters": {"letter": "R", "bold": "bold", "italic": "italic", "serif": "serif"},
    "portraits": dict.fromkeys(("smile", "glasses", "beard", "curly", "grey_hair"), 1),
    "shapes": {"position": 0},
}
# The lowest of pixels lies between two levels of floors, where energies bend most.
LEVELS = {"latents": (0.1, 0.4, 1.6), "pixels": (0.0207, 0.1, 0.4)}


def shipped() -> list[str]:
    """Experts that are densities of their own: no bits, no probabilities on a base, no scores."""
    names = []
    for name, card in cards()[0].items():
        expert = ceb.load_expert(name)
        if expert.has_value and not expert.binary and expert.base is None and card.family in FAMILIES:
            names.append(name)
    return names


FAMILIES = ("contrastive_digits", "contrastive_faces", "digits", "faces", "letters", "portraits", "shapes")


def held_out(family: str) -> LabelledImages:
    return load_data(DATA.get(family, family), "validation")


def wrong(family: str, shape: tuple[int, ...]) -> Tensor:
    """Pictures of another family at this size, (64, *shape)."""
    data = held_out(OTHERS.get(DATA.get(family, family), "digits"))
    x = data.batch(torch.arange(EACH))
    x = x.mean(1, keepdim=True).expand(-1, shape[0], -1, -1)
    return nn.functional.interpolate(x, size=tuple(shape[1:]), mode="bilinear")


def starts(expert: ceb.Expert, family: str, pictures: Tensor) -> dict[str, Tensor]:
    """States that are no data, 64 of each kind."""
    generator = torch.Generator().manual_seed(0)
    shape = (EACH, *expert.event_shape)

    def state(x: Tensor) -> Tensor:
        return x if expert.codec is None else expert.codec.latents(x)

    return {
        "noise": torch.randn(shape, generator=generator),
        "other family": state(wrong(family, tuple(pictures.shape[1:]))),
        "upside down": state(pictures[:EACH].flip(2)),
        "far away": FAR * torch.randn(shape, generator=generator),
    }


Energy = Callable[[Tensor, Tensor | None], Tensor]
"""States and a level to energies, (batch,)."""


def energy_of(expert: ceb.Expert) -> Energy:
    """-log Σ_y exp(-E(x, y))."""
    network = expert.network
    return lambda x, level: -(-(network(x) if level is None else network(x, level))).logsumexp(1)


def composed(family: str) -> Energy:
    """base + Σ -log p(a | x) of every attribute of a family."""
    attributes = [ceb.load_expert(f"{family}/{name}")[value] for name, value in COMPOSED[family].items()]
    mix = ceb.given(ceb.load_expert(f"{family}/base"), *attributes, weight=1)
    return lambda x, level: mix(x, noise_level=level)


def descend(energy_at: Energy, x: Tensor, level: Tensor | None, steps: int) -> tuple[Tensor, Tensor]:
    """Lowest energy that each start meets, (batch,), and where."""
    low, where = torch.full((len(x),), float("inf")), x.clone()
    moving = torch.arange(len(x))  # what has come to rest on a floor stays there
    for i in range(steps):
        x = x.detach().requires_grad_()
        energy = energy_at(x, level)
        (gradient,) = torch.autograd.grad(energy.sum(), x)
        lower = energy.detach() < low[moving]
        low[moving[lower]], where[moving[lower]] = energy.detach()[lower], x.detach()[lower]
        length = gradient.flatten(1).norm(dim=1)
        on = length > 0
        if not on.any():
            break
        x = x - 0.01 ** (i / steps) * gradient / length.reshape(-1, *[1] * (x.ndim - 1))
        x, moving = x[on], moving[on]
    return low, where


def lowest_of(energies: Tensor) -> Tensor:
    return energies.kthvalue(max(1, round(LOWEST * len(energies)))).values


def gaussian(network: nn.Module, z: Tensor, level: float) -> dict[str, int]:
    """How far the mean of the skeleton's Gaussian lies below data."""
    if not isinstance(network, GaussianSkeleton) or network.mean.numel() != z[0].numel():  # of patches
        return {}
    d = z.flatten(1) - network.mean
    own = lowest_of(network.gaussian_energy(d, d @ network.axes.T, z.new_full((), level**2)))
    return {"gaussian": round(float(own))}


def left(expert: ceb.Expert, x: Tensor, level: float, steps: int) -> Tensor:
    """Energies of chains at temperature 1 that began at x, (batch,)."""
    noise = Noise((torch.Generator().manual_seed(0), len(x)))
    schedule = ceb.Schedule(noise_level=constant(level))
    kernel = ceb.Annealed(ceb.Langevin(0.1 * level**2), schedule)
    chain = Chain(expert["any"], x, kernel, noise, num_steps=steps)
    chain.advance(steps)
    return chain.final_energies()


@torch.no_grad()
def states(expert: ceb.Expert, pictures: Tensor) -> Tensor:
    return (
        pictures
        if expert.codec is None
        else torch.cat([expert.codec.latents(x) for x in pictures.split(250)])
    )


def measure(name: str, options: argparse.Namespace) -> list[dict[str, object]]:
    """One row for a noise level, of an expert or, named by its family alone, of a composition."""
    family, _, alone = name.partition("/")
    expert = ceb.load_expert(name if alone else f"{family}/base")
    network = expert.network
    energy_at = energy_of(expert) if alone else composed(family)
    data = held_out(family)
    pictures = data.batch(torch.arange(min(len(data), HELD_OUT)))
    z = states(expert, pictures)
    begun = starts(expert, family, pictures)
    if options.without_floor and isinstance(network, GaussianSkeleton):
        network.set_floor(())
    levels: tuple[float | None, ...] = (None,)
    if expert.noise_conditioned:
        levels = tuple(options.levels or LEVELS["pixels" if expert.codec is None else "latents"])
    rows = []
    for value in levels:
        level = None if value is None else torch.tensor(value)
        with torch.no_grad():
            lowest = lowest_of(torch.cat([energy_at(part, level) for part in z.split(250)]))
        given = "" if alone else f"given {', '.join(COMPOSED[family])}"
        row: dict[str, object] = {
            "expert": name if alone else f"{family}/base {given}",
            "level": value,
            "lowest_of_data": round(float(lowest), 1),
        }
        row["floor"] = bool(getattr(network, "floor", ()))
        row |= {} if value is None or not alone else gaussian(network, z, value)
        low, where = descend(energy_at, torch.cat(list(begun.values())), level, options.steps)
        for kind, part in zip(begun, low.split(EACH), strict=True):
            row[kind] = round(float(lowest - part.min()), 1)
        if options.chains and value is not None and alone:
            row["after_chains"] = round(float(lowest - left(expert, where, value, options.chains).min()), 1)
        row["below"] = round(float(lowest - low.min()), 1)
        rows.append(row)
        print(row, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "experts", nargs="*", help="or families, for compositions; all that are shipped unless given"
    )
    parser.add_argument("--levels", type=float, nargs="+")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--chains", type=int, default=0, help="steps of chains from the lowest states")
    parser.add_argument("--without-floor", action="store_true", help="energies as they are learned")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    path = options.out / "descent.json"
    before = json.loads(path.read_text())["rows"] if path.exists() else []
    rows: list[dict[str, object]] = []
    for name in options.experts or [*shipped(), *COMPOSED]:
        rows += measure(name, options)
        again = {(row["expert"], row["level"], row["floor"]) for row in rows}
        kept = [row for row in before if (row["expert"], row["level"], row["floor"]) not in again]
        content = {"steps": options.steps, "starts": 4 * EACH, "held_out": HELD_OUT, "rows": [*kept, *rows]}
        write_results("descent", content, options.out)  # as it goes: all of them take an hour


if __name__ == "__main__":
    main()
