"""64 samples of p(x) beside 64 held-out pictures: eight of each in every row, samples on the left.

PYTHONPATH=. python benchmarks/sheets.py portraits --out docs/images/portraits.png
PYTHONPATH=. python benchmarks/sheets.py portraits --requests 6 --out docs/images/portraits_requests.png

With `--requests`, every row is what one request of all attributes gives, beside held-out pictures that meet
it.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

import composable_ebm as ceb
from composable_ebm.data import load_data
from composable_ebm.data.combinations import satisfying
from composable_ebm.evaluation.task import requests, task_of
from composable_ebm.plotting import save_grid

EACH = 8


def of_base(family: str, seed: int) -> Iterator[Tensor]:
    """Eight samples of p(x), eight held-out pictures, and so on, (8, *event) each."""
    drawn = ceb.sample(ceb.load_expert(f"{family}/base"), num_chains=EACH**2, seed=seed).images
    data = load_data(family, "validation")
    some = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[: EACH**2]
    for ours, real in zip(drawn.split(EACH), data.batch(some).split(EACH), strict=True):
        yield from (ours, real)


def of_requests(family: str, count: int, seed: int) -> Iterator[Tensor]:
    """The same of requests of all attributes; white where there are not eight held-out pictures."""
    task, data = task_of(family), load_data(family, "validation")
    generator = torch.Generator().manual_seed(seed)
    for request in requests(task.askable, len(task.terms), count, generator, each=1):
        terms = [task.terms[name][value] for name, value in request.items()]
        yield ceb.sample(ceb.given(task.base, *terms), num_chains=EACH, seed=seed).images
        real = data.batch(satisfying(request, data).nonzero()[:EACH, 0])
        yield torch.cat([real, real.new_ones(EACH - len(real), *real.shape[1:])])


def main() -> None:
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=kind)
    parser.add_argument("family")
    parser.add_argument("--requests", type=int, default=0, help="rows of requests of all attributes")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    parts = (
        of_requests(options.family, options.requests, options.seed)
        if options.requests
        else of_base(options.family, options.seed)
    )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    save_grid(torch.cat(list(parts)), options.out, 2 * EACH)


if __name__ == "__main__":
    main()
