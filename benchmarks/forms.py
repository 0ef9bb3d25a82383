"""What the forms of evaluation gain: modules as people write them, and every shipped expert.

    python benchmarks/forms.py [--parts modules first_call experts threads roofline] [--rounds 9]
    COMPOSABLE_EBM_NATIVE_ARCH=x86-64-v3 ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 \\
        MKL_ENABLE_INSTRUCTIONS=AVX2 python benchmarks/forms.py --parts modules --name forms_avx2

`modules` runs the short-run recipe against ebmkit and a plain loop; `first_call` is 200 steps of energies
that nobody has evaluated before, so reading and packing are in the time; `experts` is energy and gradient
of 16 states against autograd; `threads` is one thread against two; `roofline` is how many GFLOP/s
PyTorch's own convolutions make, of kinds that experts consist of.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator
from functools import partial

import torch
from common import write_results
from rivals import chain, face_experts, in_ebmkit, plain_loop, textbook
from timing import add_machine, machine, race, relative
from torch import Tensor, nn
from torch.nn import functional as F

import composable_ebm as ceb
from composable_ebm.energy.weights import coefficient_type
from composable_ebm.experts.catalogue import catalogue
from composable_ebm.potential.evaluating import evaluating
from composable_ebm.potential.potential import Potential

OURS = "composable_ebm"
PARTS = ("modules", "first_call", "experts", "threads", "roofline")


class Own(nn.Module):
    """The textbook network as nearly everybody writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = textbook()[:-1]

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).squeeze(-1)


class Block(nn.Module):
    """Two convolutions with group norms, and the way around them."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, inputs), nn.GroupNorm(8, outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1)
        self.skip = (
            nn.Conv2d(inputs, outputs, 1, stride) if stride > 1 or inputs != outputs else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


class Residual(nn.Module):
    """A residual convolutional energy of eight layers, with norms and mean pooling."""

    def __init__(self, channels: int = 1, width: int = 16, first_stride: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(channels, width, 3, first_stride, 1)
        sizes = ((width, width, 1), (width, 2 * width, 2), (2 * width, 4 * width, 2))
        self.blocks = nn.Sequential(*(Block(*size) for size in sizes))
        self.norm, self.head = nn.GroupNorm(8, 4 * width), nn.Linear(4 * width, 1)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.norm(self.blocks(self.stem(x))))
        return self.head(h.mean(dim=(2, 3))).squeeze(-1)


class Transformer(nn.Module):
    """An encoder over patches, which is left to autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Conv2d(1, 48, 8, 8)
        self.layers = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(48, 4, 96, dropout=0.0, batch_first=True),
            2,
            enable_nested_tensor=False,
        )
        self.head = nn.Linear(48, 1)
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.into(x).flatten(2).mT).mean(1)).squeeze(-1)


class Unet(nn.Module):
    """Down, up, and a sum of squares at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.low, self.out = (nn.Conv2d(*c, 3, padding=1) for c in ((1, 16), (16, 32), (48, 4)))
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        first = F.silu(self.down(x))
        second = F.silu(self.low(F.avg_pool2d(first, 2)))
        both = torch.cat([first, F.interpolate(second, scale_factor=2.0)], dim=1)
        return self.out(both).square().mean(dim=(1, 2, 3))


class Perceptron(nn.Module):
    """A small network of points in the plane."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).squeeze(-1)


class Unreadable(Own):
    """The textbook network with a step that depends on values."""

    def forward(self, x: Tensor) -> Tensor:
        energy = super().forward(x)
        return energy if float(energy.detach().sum()) < 1e9 else energy * 2


def modules() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    """Networks as people write them, and the shape of their states."""
    torch.manual_seed(0)
    image = (1, 32, 32)
    return {
        "textbook, own class": (Own(), image),
        "textbook, Sequential": (textbook(), image),
        "residual, 16 to 64 channels": (Residual(), image),
        "residual, colour, 32 to 128 channels": (Residual(3, 32, 1), (3, 32, 32)),
        "U-Net": (Unet(), image),
        "transformer": (Transformer(), image),
        "steered by values": (Unreadable(), image),
        "points in the plane": (Perceptron(), (2,)),
    }


def states(batch: int, shape: tuple[int, ...]) -> Tensor:
    return 2 * torch.rand(batch, *shape, generator=torch.Generator().manual_seed(0)) - 1


def path(energy: ceb.energy.Energy, x: Tensor, level: Tensor | None = None) -> str:
    """How an energy is evaluated, in words."""
    potential = Potential(energy, stack=False)
    potential = potential.at(noise_level=level)
    potential(x)
    return potential.describe()


def against_others(name: str, rounds: int, batch: int) -> dict:
    """20 steps of the short-run recipe, of energies that were evaluated before."""
    network, shape = modules()[name]
    x, steps = states(batch, shape), 5 if "colour" in name else 20
    energy = ceb.from_callable(network, event_shape=shape, data_range=(-1, 1))
    contestants = {
        OURS: partial(chain, energy, x, steps),
        "ebmkit": partial(in_ebmkit, network, x, steps),
        "plain loop": partial(plain_loop, network, x, steps),
    }
    table = relative(race(contestants, rounds, x.device), OURS)
    return {"module": name, "batch": batch, "steps": steps, "path": path(energy, x), "contestants": table}


def from_nothing(name: str, rounds: int, batch: int) -> dict:
    """200 steps, of a copy of the network that nobody has evaluated."""
    network, shape = modules()[name]
    x, steps = states(batch, shape), 200

    def ours() -> Tensor:
        fresh = ceb.from_callable(copy.deepcopy(network), event_shape=shape, data_range=(-1, 1))
        return chain(fresh, x, steps)

    contestants = {OURS: ours, "plain loop": lambda: plain_loop(copy.deepcopy(network), x, steps)}
    table = relative(race(contestants, rounds, x.device), OURS)
    told = path(ceb.from_callable(network), x)
    return {"module": name, "batch": batch, "steps": steps, "path": told, "contestants": table}


def gradients(energy: Callable[[Tensor], Tensor], x: Tensor, times: int) -> None:
    """Energy and gradient by autograd."""
    for _ in range(times):
        x = x.detach().requires_grad_()
        torch.autograd.grad(energy(x).sum(), x)


def as_in_a_chain(energy: ceb.energy.Energy, x: Tensor, level: Tensor | None) -> Potential:
    """The potential that `Chain` makes for such states; it evaluates it inside `evaluating`."""
    coefficients = energy.coefficients.to(coefficient_type(x))
    return Potential(energy, coefficients, noise_level=level, stack=False)


def expert_row(name: str, rounds: int) -> dict:
    """A shipped expert at 16 states, against autograd."""
    expert = ceb.load_expert(name)
    energy = expert[expert.card.values[0]] if len(expert.card.values) > 1 else expert
    level = torch.tensor(0.3) if energy.noise_conditioned else None
    x = torch.randn(16, *energy.event_shape, generator=torch.Generator().manual_seed(0))
    potential = as_in_a_chain(energy, x, level)
    times = 10

    def ours() -> None:
        with evaluating(energy.modules()):
            for _ in range(times):
                potential(x)

    contestants = {OURS: ours, "autograd": partial(gradients, lambda s: energy.energy(s, level), x, times)}
    table = relative(race(contestants, rounds, x.device), OURS)
    return {"expert": name, "batch": 16, "path": potential.describe(), "contestants": table}


def thread_row(name: str, rounds: int) -> dict:
    """Two threads against one, by the clock: 128 chains of the textbook network, 16 of four faces."""
    level = None
    if name == "faces":
        energy: ceb.energy.Energy = sum(face_experts(4, torch.device("cpu")))  # type: ignore[assignment]
        x, level = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.tensor(0.3)
    else:
        energy, x = ceb.from_callable(Own()), states(128, (1, 32, 32))
    potential = as_in_a_chain(energy, x, level)

    def run(threads: int) -> None:
        torch.set_num_threads(threads)
        with evaluating(energy.modules()):
            for _ in range(20):
                potential(x)

    run(2)
    table = relative(race({"two": partial(run, 2), "one": partial(run, 1)}, rounds, x.device), "two")
    return {"energy": name, "batch": len(x), "path": potential.describe(), "contestants": table}


def roofline_row(channels: int, side: int, rounds: int) -> dict:
    """PyTorch's 3x3 convolution of 16 images, channels last, in GFLOP/s."""
    x = torch.randn(16, channels, side, side).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(channels, channels, 3, 3).contiguous(memory_format=torch.channels_last)
    times = 100

    def convolve() -> None:
        with torch.no_grad():
            for _ in range(times):
                F.conv2d(x, weight, padding=1)

    seconds = min(race({"": convolve}, rounds, x.device)[""]) / times
    rate = 2e-9 * x.numel() * 9 * channels / seconds
    name = f"convolution, {channels} channels, {side}x{side}"
    return {"kind": name, "batch": 16, "path": f"{rate:.0f} GFLOP/s", "contestants": {}}


def rows_of(part: str, rounds: int) -> Iterator[dict]:
    if part == "modules":
        for name in modules():
            for batch in (64, 128) if "textbook" in name else (64,):
                yield against_others(name, rounds, batch)
    elif part == "first_call":
        for name in modules():
            yield from_nothing(name, max(3, rounds // 3), 2 if "colour" in name else 16)
    elif part == "experts":
        for name in catalogue():
            yield expert_row(name, rounds)
    elif part == "roofline":
        for channels, side in ((64, 8), (32, 14), (64, 7), (128, 16)):
            yield roofline_row(channels, side, rounds)
    else:
        for name in ("textbook", "faces"):
            yield thread_row(name, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--name", default="forms")
    add_machine(parser)
    options = parser.parse_args()
    machine(options)
    content: dict[str, object] = {}
    for part in options.parts:
        rows = []
        for row in rows_of(part, options.rounds):
            rows.append(row)
            ratios = {
                name: (figures["ours_is_faster_by"], figures["quartiles"])
                for name, figures in row["contestants"].items()
                if figures["ours_is_faster_by"] != 1
            }
            what = next(iter(row.values()))
            print(f"{part}: {what}, {row['batch']}: {ratios} {row['path']}", flush=True)
        content[part] = rows
    print(write_results(options.name, content, options.out))


if __name__ == "__main__":
    main()
