"""Speed of the engine against ebmkit, torchebm and a plain loop, and its distance from the machine.

Every comparison has the same energy, start, steps and settings, with the contestants taking turns in
one process. The ceiling is the rate of a 1024³ matrix product in the same process: the least time
that the multiplications of energy and gradient could take if they were one such product.

    python benchmarks/engine.py --quick
    python benchmarks/engine.py --device cuda --threads 8 --precisions float32 tf32 bfloat16
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from common import write_results
from rivals import (
    Product,
    chain,
    face_experts,
    face_mean,
    in_ebmkit,
    in_torchebm,
    operations,
    plain_loop,
    textbook,
)
from timing import add_machine, ceilings, exponent, machine, peak_memory, race, relative, uniform

import composable_ebm as ceb
from composable_ebm.plotting import BLUE, GREEN, GREY, INK, ORANGE, figure, save_figure
from composable_ebm.potential.potential import Potential
from composable_ebm.sampling.schedule import Schedule, constant

OURS = "composable_ebm"
LEVEL = 0.3  # noise level of the face experts, in the middle of a run
PRECISIONS = ("float32", "tf32", "bfloat16")
PARTS = ("textbook", "faces", "by_batch", "by_side", "by_experts")
COLOURS = {OURS: ORANGE, "ebmkit": BLUE, "torchebm": GREEN, "plain loop": GREY}


def textbook_race(batch: int, steps: int, rounds: int, device: torch.device, side: int = 32) -> dict:
    """The short-run recipe on the textbook network."""
    network = textbook(side).to(device)
    x = uniform((batch, 1, side, side), device)
    energy = ceb.from_callable(network, event_shape=(1, side, side), data_range=(-1, 1))
    contestants = {
        OURS: partial(chain, energy, x, steps),
        "ebmkit": partial(in_ebmkit, network, x, steps),
        "torchebm": partial(in_torchebm, network, x, steps),
        "plain loop": partial(plain_loop, network, x, steps),
    }
    table = relative(race(contestants, rounds, device), OURS)
    potential = Potential(energy, stack=device.type != "cpu")
    potential(x)
    return {
        "batch": batch,
        "side": side,
        "steps": steps,
        "path": potential.describe(),
        "gflop": operations(network, x) * (steps + 1) / 1e9,
        "contestants": table,
    }


def faces_race(count: int, batch: int, steps: int, rounds: int, device: torch.device, given: bool) -> dict:
    """A product of face experts at one noise level, as a plain sum or in the ratio form."""
    base = ceb.load_expert("faces/base").to(device) if given else None
    product = Product(face_experts(count, device), base, LEVEL)
    noise = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(device)
    x = face_mean(device) + LEVEL * noise
    kernel = ceb.Langevin(1e-3, noise_scale=0.005, grad_clip=0.03, clamp=(-1.0, 1.0))
    sampler = ceb.Annealed(kernel, Schedule(noise_level=constant(LEVEL), num_levels=1))
    contestants = {
        OURS: partial(chain, product.ours, x, steps, sampler),
        "ebmkit": partial(in_ebmkit, product.theirs, x, steps),
        "plain loop": partial(plain_loop, product.theirs, x, steps),
    }
    table = relative(race(contestants, rounds, device), OURS)
    form = "base + ratios" if given else "sum"
    potential = Potential(product.ours, stack=device.type != "cpu")
    potential(x)
    path = potential.describe()
    row = {"experts": count, "form": form, "batch": batch, "steps": steps, "path": path}
    return {**row, "contestants": table}


@contextmanager
def precision(name: str, device: torch.device) -> Iterator[None]:
    """Products in float32, in float32 with TF32 allowed, or in bfloat16 by autocast; CPUs know no TF32."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest" if name == "float32" else "high")
    torch.backends.cudnn.allow_tf32 = name != "float32"
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=name == "bfloat16"):
            yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def against_ceiling(row: dict, gflops: float) -> dict:
    """The row with its least time, and how many times that we took in our fastest round."""
    least = row["gflop"] / gflops
    return {**row, "times_the_ceiling": round(row["contestants"][OURS]["fastest"] / least, 2)}


def show(row: dict) -> None:
    """One line of the printed table."""
    what = ", ".join(f"{row[k]} {k}" for k in ("batch", "side", "experts", "form", "steps") if k in row)
    ours = row["contestants"][OURS]["seconds"]
    rest = [
        f"{name} {figures['ours_is_faster_by']:.2f} {figures['quartiles']}"
        for name, figures in row["contestants"].items()
        if name != OURS
    ]
    ceiling = f", {row['times_the_ceiling']} times the ceiling" if "times_the_ceiling" in row else ""
    print(
        f"{what}: {1e3 * ours / row['steps']:.2f} ms a step{ceiling}; faster than " + ", ".join(rest),
        flush=True,
    )


def plot(batches: list[dict], experts: list[dict], path: Path) -> None:
    """Time a step over batch size and over the number of experts, log scales."""
    fig, axes = figure(1, 2, 10, 3.4)
    for ax, rows, key, title in (
        (axes[0, 0], batches, "batch", "textbook network, by batch"),
        (axes[0, 1], experts, "experts", "face experts in a sum, 16 chains"),
    ):
        for name, colour in COLOURS.items():
            points = [
                (r[key], 1e3 * r["contestants"][name]["seconds"] / r["steps"])
                for r in rows
                if name in r["contestants"]
            ]
            if points:
                ax.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=4, label=name)
        ax.set(xscale="log", yscale="log")
        ax.set_xticks([row[key] for row in rows], [str(row[key]) for row in rows])
        ax.minorticks_off()
        ax.set_xlabel(key)
        ax.set_title(f"ms a step: {title}", loc="left")
    fig.legend(
        *axes[0, 0].get_legend_handles_labels(), frameon=False, labelcolor=INK, loc="outside right center"
    )
    save_figure(fig, path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the engine against others, in turns.")
    parser.add_argument("--quick", action="store_true", help="a minute instead of several")
    add_machine(parser)
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS[:1])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="the others are kept")
    options = parser.parse_args()
    device = machine(options)
    name = "engine" if device.type == "cpu" else f"engine_{device.type}"
    name += f"_{options.threads}_threads" if options.threads > 1 else ""
    name += "_quick" if options.quick else ""
    path = options.out / f"{name}.json"
    content = json.loads(path.read_text()) if path.exists() else {}
    content.pop("environment", None)
    content |= {"device": device.type, "threads": options.threads}
    for part in options.parts:
        content[part] = {"ceilings": {}, "rows": []}
        for kind in options.precisions:
            with precision(kind, device):
                limits = ceilings(device)
                print(f"{part}, {kind}: ceilings {limits}")
                content[part]["ceilings"][kind] = limits
                for row in rows_of(part, options.quick, device):
                    if "gflop" in row:
                        row = against_ceiling(row, limits["gflops"])
                    show(row)
                    content[part]["rows"].append({"precision": kind, **row})
        content[part]["exponents"] = exponents(content[part]["rows"])
        content[part]["peak_memory_mib"] = peak_memory(device)
    print(write_results(name, content, options.out))
    if {"by_batch", "by_experts"} <= content.keys():
        batches, experts = (of_first_precision(content[key]["rows"]) for key in ("by_batch", "by_experts"))
        plot(batches, experts, path.with_suffix(".png"))
        print(path.with_suffix(".png"))


def rows_of(part: str, quick: bool, device: torch.device) -> Iterator[dict]:
    """The races of one part of the table."""
    rounds, few, steps = (3, 2, 20) if quick else (5, 3, 60)
    if part == "textbook":
        for batch in (64, 128) if device.type == "cpu" else (64, 1024, 4096):
            yield textbook_race(batch, steps, rounds, device)
    elif part == "faces":
        for given in (False, True):
            yield faces_race(4, 16, steps, rounds, device, given)
    elif part == "by_batch":
        for batch in (1, 4, 16, 64, 256) if quick else (1, 4, 16, 64, 256, 1024, 4096):
            yield textbook_race(batch, max(2, min(60, 4096 // batch)), few, device)
    elif part == "by_side":
        for side in (28, 32, 64):
            yield textbook_race(64, 10, few, device, side)
    else:
        for count in (1, 4) if quick else (1, 2, 4, 8, 16):
            yield faces_race(count, 16, 10, few, device, False)


def of_first_precision(rows: list[dict]) -> list[dict]:
    """The rows that ran in the precision of the first one."""
    return [row for row in rows if row.get("precision") == rows[0].get("precision")]


def exponents(rows: list[dict]) -> dict[str, float]:
    """How time a step grows along the rows; from 16 chains on where they differ in the batch."""
    rows = of_first_precision(rows)
    for key, smallest in (("batch", 16), ("side", 1), ("experts", 1)):
        kept = [row for row in rows if row.get(key, 0) >= smallest]
        if len({row[key] for row in kept}) > 1:
            sizes = [row[key] for row in kept]
            return {
                name: exponent(sizes, [row["contestants"][name]["seconds"] / row["steps"] for row in kept])
                for name in kept[0]["contestants"]
            }
    return {}


if __name__ == "__main__":
    main()
