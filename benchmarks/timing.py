"""Contestants timed in turn, and what the machine can do at most.

What counts is the ratio within a round. With one thread on a CPU the time is that of the process on
a core, so that work of others on the machine (which costs a core, or part of its cache) does not
count as ours; with several threads or on a GPU it is that of the clock.
"""

from __future__ import annotations

import argparse
import math
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from common import RESULTS
from torch import Tensor

from composable_ebm.potential import native

Work = Callable[[], object]

__all__ = ["add_machine", "ceilings", "exponent", "machine", "peak_memory", "race", "relative", "uniform"]


def add_machine(parser: argparse.ArgumentParser) -> None:
    """The options that say where to time, and where the results go."""
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")


def machine(options: argparse.Namespace) -> torch.device:
    """The device that is asked for, with its threads set and the C functions compiled."""
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    if device.type == "cpu":
        try:
            native.build()
        except native.NativeUnavailable as reason:
            print(f"no C functions: {reason}")
    return device


def race(contestants: Mapping[str, Work], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each contestant in each round, after one round to warm up."""
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds + 1):
        for name, work in contestants.items():
            _wait(device)
            start = clock()
            work()
            _wait(device)
            if number:
                seconds[name].append(clock() - start)
    return seconds


def relative(seconds: Mapping[str, list[float]], ours: str) -> dict[str, dict[str, float]]:
    """For each contestant: its median time, and how many times as fast `ours` is, with quartiles."""
    table = {}
    for name, times in seconds.items():
        ratios = sorted(theirs / mine for theirs, mine in zip(times, seconds[ours], strict=True))
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        table[name] = {
            "seconds": round(statistics.median(times), 5),
            "fastest": round(min(times), 5),
            "ours_is_faster_by": round(middle, 3),
            "quartiles": [round(low, 3), round(high, 3)],
        }
    return table


def ceilings(device: torch.device, rounds: int = 15) -> dict[str, float]:
    """Matrix product in GFLOP/s and copy bandwidth in GB/s, the best of several, in this process."""
    a, b = (torch.randn(1024, 1024, device=device) for _ in range(2))
    source = torch.randn(16 << 20, device=device)
    target = torch.empty_like(source)
    product = min(race({"": lambda: a @ b}, rounds, device)[""])
    copy = min(race({"": lambda: target.copy_(source)}, rounds, device)[""])
    return {"gflops": round(2e-9 * 1024**3 / product, 1), "copy_gb_s": round(8e-9 * len(source) / copy, 1)}


def exponent(sizes: list[float], seconds: list[float]) -> float:
    """Slope of log time over log size, by least squares: 1 means that time grows in proportion."""
    xs, ys = ([math.log(v) for v in values] for values in (sizes, seconds))
    return round(statistics.linear_regression(xs, ys).slope, 2)


def peak_memory(device: torch.device) -> float:
    """Largest memory in use so far, in MiB: of the device, or of the process on a CPU."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated() / 2**20, 1)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10, 1)


def uniform(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """The same states in [-1, 1] for all contestants."""
    return (2 * torch.rand(shape, generator=torch.Generator().manual_seed(0)) - 1).to(device)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
