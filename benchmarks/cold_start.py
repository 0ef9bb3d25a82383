"""From nothing to a picture: `composable-ebm sample` of 16 faces, and where its time goes.

    python benchmarks/cold_start.py [--repeats 5] [--against FOLDER]

The whole command runs in a fresh process each time, in turns with that of another checkout if one is
given. Its parts are timed inside further fresh processes. CPU time is given beside wall time: where
other work shares the machine it is the steadier of the two.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import write_results

ROOT = Path(__file__).resolve().parents[1]
RECIPE = (
    "faces/base + 1.5*(faces/smile - faces/smile[any]) + 1.5*(faces/glasses - faces/glasses[any])"
    " + 1.5*(~faces/beard - faces/beard[any])"
)
PARTS = """
import json, sys, time
marks = [("python", time.perf_counter(), time.process_time())]
def mark(name):
    marks.append((name, time.perf_counter(), time.process_time()))
import torch
mark("import torch")
import composable_ebm.cli as cli
mark("import composable_ebm")
command = cli._read(["sample", sys.argv[1], "--out", sys.argv[2]])
mark("read the command line")
from composable_ebm import parse, sample
energy = parse(command.recipe)
mark("load four experts")
sample(energy, num_chains=1, num_steps=1)
mark("first step")
result = sample(energy, num_chains=16)
mark("80 steps of 16 chains")
result.save(command.out)
mark("write the PNG")
print(json.dumps([(b[0], b[1] - a[1], b[2] - a[2]) for a, b in zip(marks, marks[1:])]))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--against", type=Path, help="another checkout")
    options = parser.parse_args()
    checkouts = {"now": ROOT} | ({"before": options.against.resolve()} if options.against else {})
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in checkouts}
    parts: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "faces.png"
        for repeat in range(options.repeats + 1):
            for name, checkout in checkouts.items():
                arguments = ["-m", "composable_ebm.cli", "sample", RECIPE, "--out", str(picture)]
                taken = timed(arguments, checkout, options.threads)[0]
                if repeat:  # the first fills the file caches
                    times[name].append(taken)
        for _ in range(options.repeats):
            _, text = timed(["-c", PARTS, RECIPE, str(picture)], ROOT, options.threads)
            for name, wall, cpu in json.loads(text.splitlines()[-1]):
                parts.setdefault(name, []).append((wall, cpu))
    found: dict[str, object] = {
        "threads": options.threads,
        "total": {name: spread(values) for name, values in times.items()},
        "parts": {name: spread(values) for name, values in parts.items()},
    }
    if "before" in times:
        found["before / now"] = {
            kind: round(
                statistics.median(b[i] / a[i] for a, b in zip(times["now"], times["before"], strict=True)), 2
            )
            for i, kind in enumerate(("wall", "cpu"))
        }
    print(json.dumps(found, indent=2))
    print(write_results("cold_start", found))


def timed(arguments: list[str], checkout: Path, threads: int) -> tuple[tuple[float, float], str]:
    """Wall and CPU seconds of a Python process, and what it printed."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": str(threads)}
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=checkout,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return (wall, cpu), done.stdout


def spread(values: list[tuple[float, float]]) -> dict[str, float]:
    walls, cpus = zip(*values, strict=True)
    return {
        "wall": round(statistics.median(walls), 3),
        "wall_min": round(min(walls), 3),
        "wall_max": round(max(walls), 3),
        "cpu": round(statistics.median(cpus), 3),
    }


if __name__ == "__main__":
    main()
