"""Many requests at once against one after another, and how long a short one waits beside a long one.

    python benchmarks/requests.py [--quick] [--device cuda]

Each request asks for 4 chains. "together" submits all of them to one `Engine`; "one after another"
calls `sample` for each. Both run in turns within one process, so that other work on the machine
slows both; the ratio is what counts.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from common import write_results

import composable_ebm as ceb

CHAINS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer steps and repeats")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--requests", type=int, default=16)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    steps, repeats = (6, 2) if options.quick else (20, 5)

    found: dict[str, object] = {}
    for name, mixes in workloads(options.requests, options.device).items():
        found[name] = throughput(mixes, steps, repeats, options.device)
        print(name, found[name])
    found["fairness"] = fairness(options.device, steps, repeats)
    print("fairness", found["fairness"])
    path = write_results("requests" if options.device == "cpu" else f"requests_{options.device}", found)
    print(path)


def workloads(count: int, device: str) -> dict[str, list[ceb.Energy]]:
    """Requests that ask for different experts, for the same ones with other weights, and small ones."""
    base = ceb.load_expert("faces/base", device)
    names = ("smile", "glasses", "beard", "curly", "grey_hair")
    experts = [ceb.load_expert(f"faces/{name}", device) for name in names]
    generator = torch.Generator().manual_seed(0)
    mixed, same = [], []
    for i in range(count):
        chosen = torch.randperm(len(experts), generator=generator)[:3].tolist()
        flips = torch.randint(2, (3,), generator=generator).tolist()
        mixed.append(
            ceb.given(base, *(~experts[k] if f else experts[k] for k, f in zip(chosen, flips, strict=True)))
        )
        same.append(ceb.given(base, *experts[:3], weight=1 + i / count))
    digit, thick = (ceb.load_expert(f"digits/{name}", device) for name in ("digit", "thick"))
    digits = [ceb.given(digit[i % 10], thick, weight=1 + i / count) for i in range(count)]
    return {
        "three of five face experts each": mixed,
        "the same three face experts": same,
        "a digit and a thickness": digits,
    }


def throughput(mixes: list[ceb.Energy], steps: int, repeats: int, device: str) -> dict[str, object]:
    """Seconds for all requests, together and one after another, in turns."""

    def alone() -> None:
        for seed, mix in enumerate(mixes):
            ceb.sample(mix, num_chains=CHAINS, num_steps=steps, seed=seed, on_divergence="report")

    with ceb.Engine(device) as engine:

        def together() -> None:
            runs = [
                engine.submit(mix, CHAINS, steps, seed, on_divergence="report")
                for seed, mix in enumerate(mixes)
            ]
            for run in runs:
                run.result()

        seconds: dict[str, list[float]] = {"one after another": [], "together": []}
        for repeat in range(repeats + 1):
            for name, work in (("one after another", alone), ("together", together)):
                taken = timed(work)
                if repeat:  # the first is for warming up
                    seconds[name].append(taken)
    ratios = [a / b for a, b in zip(seconds["one after another"], seconds["together"], strict=True)]
    chain_steps = len(mixes) * CHAINS * steps
    return {
        "requests": len(mixes),
        "chains_each": CHAINS,
        "steps": steps,
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "chain_steps_per_second": {
            name: round(chain_steps / statistics.median(values)) for name, values in seconds.items()
        },
        "ratio": spread(ratios),
    }


def fairness(device: str, steps: int, repeats: int) -> dict[str, object]:
    """Seconds that a short request takes alone, and beside a long one of 16 and of 128 chains."""
    base, smile, beard = (ceb.load_expert(f"faces/{name}", device) for name in ("base", "smile", "beard"))
    long, short = ceb.given(base, smile), ceb.given(base, beard)
    found: dict[str, object] = {"steps": steps, "chains": CHAINS}
    for chains in (0, 16, 128):
        taken = []
        with ceb.Engine(device, max_batch=128) as engine:
            running = engine.submit(long, chains, None) if chains else None
            while running is not None and running.num_steps < 3:
                time.sleep(0.01)
            for seed in range(repeats):
                taken.append(timed(lambda seed=seed: engine.submit(short, CHAINS, steps, seed).result()))  # type: ignore
        found[f"seconds beside {chains} chains" if chains else "seconds alone"] = spread(taken)
    return found


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def spread(values: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 3),
        "min": round(min(values), 3),
        "max": round(max(values), 3),
    }


if __name__ == "__main__":
    main()
