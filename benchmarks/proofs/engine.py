"""The engine under energies that misbehave: others undisturbed, threads and memory back.

    python benchmarks/proofs/engine.py --requests 1000

Good requests run beside bad ones of ten kinds: energies that raise at begin or later, give NaN, change
their states in place, interrupt, exit, return too much, sleep; requests that are cancelled; callbacks that
raise. The samples of the good ones must be those that `sample` gives them alone, whatever
happened beside them; bad ones must end with their own error. Then callers in many threads, a fork while the
engine runs, 1,000 requests one after another, and a look at threads and memory.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import random
import resource
import threading
import time
from collections import Counter

import torch

import composable_ebm as ceb

torch.set_num_threads(1)
KERNEL = ceb.MALA(0.1)


class Bad(ceb.Energy):
    """An energy that misbehaves after some evaluations."""

    event_shape = (2,)

    def __init__(self, kind: str, after: int) -> None:
        super().__init__()
        self.kind, self.after, self.calls = kind, after, 0

    def energy(self, x: torch.Tensor, noise_level: torch.Tensor | None = None) -> torch.Tensor:
        self.calls += 1
        if self.calls > self.after:
            match self.kind:
                case "raises":
                    raise RuntimeError("no such layer")
                case "interrupts":
                    raise KeyboardInterrupt
                case "exits":
                    raise SystemExit(3)
                case "exhausts memory":
                    raise MemoryError
                case "is NaN":
                    return x.sum(1) * torch.nan
                case "changes its states":
                    with torch.no_grad():
                        x.mul_(1.5)
                case "returns too much":
                    return x
                case "returns nothing":
                    return None
                case "sleeps":
                    time.sleep(0.002)
                case "loses the graph":
                    return x.detach().square().sum(1)
        return x.square().sum(1) / 2


KINDS = (
    "raises",
    "interrupts",
    "exits",
    "exhausts memory",
    "is NaN",
    "changes its states",
    "returns too much",
    "returns nothing",
    "sleeps",
    "loses the graph",
)


def good(i: int) -> ceb.Energy:
    return ceb.analytic.Gaussian([i % 3, -1.0], 0.5 + i % 2).named("good")


def abused(r: random.Random, requests: int) -> Counter:
    counts: Counter = Counter()
    with ceb.Engine() as engine:
        runs = []
        for i in range(requests):
            options = {"num_chains": 2, "num_steps": 30, "seed": i, "sampler": KERNEL}
            if i % 2:
                kind, after = r.choice(KINDS), r.choice([0, 1, 5, 20])
                runs.append((kind, i, engine.submit(Bad(kind, after), **options)))
            elif i % 10 == 4:
                run = engine.submit(good(i), **{**options, "num_steps": None})
                threading.Timer(r.random(), run.cancel).start()
                runs.append(("cancelled", i, run))
            elif i % 10 == 8:
                call = lambda frame: [][0]  # noqa: E731
                runs.append(("a callback that raises", i, engine.submit(good(i), on_frame=call, **options)))
            else:
                runs.append(("good", i, engine.submit(good(i), **options)))
            if len(runs) >= 40:
                counts += _collected(runs)
                runs = []
        counts += _collected(runs)
        counts[f"runs left: {len(engine.runs)}"] += 1
    return counts


def _collected(runs: list) -> Counter:
    counts: Counter = Counter()
    for kind, i, run in runs:
        try:
            result = run.result(timeout=120)
        except TimeoutError:
            counts[f"{kind}: HANGS"] += 1
        except BaseException as error:
            counts[f"{kind}: {'DISTURBED by ' if kind == 'good' else ''}{type(error).__name__}"] += 1
        else:
            if kind == "good":
                alone = ceb.sample(good(i), num_chains=2, num_steps=30, seed=i, sampler=KERNEL)
                same = torch.allclose(result.samples, alone.samples, rtol=1e-4, atol=1e-4)
                counts["good: as alone" if same else "good: CHANGED"] += 1
            else:
                counts[f"{kind}: ended"] += 1
    return counts


def threads(count: int) -> Counter:
    """One module in training mode and one engine, sampled by many threads."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Linear(2, 8), torch.nn.SiLU(), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1)
    )
    energy = good(0) + ceb.from_callable(net.train(), name="net", event_shape=(2,))
    alone = ceb.sample(energy, num_chains=2, num_steps=20, seed=1, sampler=KERNEL).samples
    counts: Counter = Counter()
    with ceb.Engine() as engine:

        def work(i: int) -> None:
            options = {"num_chains": 2, "num_steps": 20, "seed": 1, "sampler": KERNEL}
            for _ in range(5):
                run = engine.submit(energy, **options) if i % 2 else None
                one = (run.result() if run else ceb.sample(energy, **options)).samples
                same = torch.allclose(one, alone, atol=1e-4)
                counts["threads: as alone" if same else "threads: CHANGED"] += 1

        callers = [threading.Thread(target=work, args=(i,)) for i in range(count)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
    counts["threads: mode kept" if all(m.training for m in net.modules()) else "threads: MODE LOST"] += 1
    return counts


def forked() -> Counter:
    """A process forked while the engine runs samples for itself, and ends."""
    with ceb.Engine() as engine:
        run = engine.submit(good(0), num_chains=2, num_steps=None, sampler=KERNEL)
        child = os.fork()
        if child == 0:
            out = ceb.sample(good(0), num_chains=2, num_steps=5, sampler=KERNEL)
            os._exit(0 if out.samples.isfinite().all() else 1)
        deadline = time.monotonic() + 60
        while (done := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
            time.sleep(0.01)
        if done == (0, 0):
            os.kill(child, 9)
            os.waitpid(child, 0)
        run.cancel()
        run.result(timeout=30)
    return Counter({"fork: both go on" if done[1] == 0 and done[0] else f"fork: FAILED {done}": 1})


def flat(requests: int) -> Counter:
    """Requests one after another: memory and threads."""
    with ceb.Engine() as engine:
        sizes = []
        for i in range(requests):
            engine.submit(good(i), num_chains=4, num_steps=3, seed=i, sampler=KERNEL).result()
            if i % (requests // 4) == requests // 8:
                gc.collect()
                sizes.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
    grown = sizes[-1] - sizes[0]
    return Counter({f"{requests} requests: {'flat' if grown < 30 else f'GREW by {grown} MB'}": requests})


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=200)
    options = parser.parse_args(argv)
    logging.disable(logging.CRITICAL)
    started, before = time.perf_counter(), threading.active_count()
    counts = abused(random.Random(0), options.requests)
    counts += threads(8)
    counts += forked()
    counts += flat(options.requests)
    time.sleep(1.5)  # timers of cancellations
    left = threading.active_count() - before
    for what, count in sorted(counts.items()):
        print(f"{count:6d}  {what}")
    print(f"threads left {left}; {time.perf_counter() - started:.0f} s in all")
    words = ("HANGS", "DISTURBED", "CHANGED", "LOST", "FAILED", "GREW")
    return int(left > 0 or any(word in what for what in counts for word in words))


if __name__ == "__main__":
    raise SystemExit(main())
