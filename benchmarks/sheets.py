"""64 samples of p(x) beside 64 held-out pictures: eight of each in every row, samples on the left.

PYTHONPATH=. python benchmarks/sheets.py portraits --out docs/images/portraits.png
"""

import argparse
from pathlib import Path

import torch

import composable_ebm as ceb
from composable_ebm.data import load_data
from composable_ebm.plotting import save_grid


def main() -> None:
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=kind)
    parser.add_argument("family")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    base = ceb.load_expert(f"{options.family}/base")
    drawn = ceb.sample(base, num_chains=64, seed=options.seed).images
    data = load_data(options.family, "validation")
    real = data.batch(torch.randperm(len(data), generator=torch.Generator().manual_seed(options.seed))[:64])
    rows = zip(drawn.split(8), real.split(8), strict=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    save_grid(torch.cat([part for row in rows for part in row]), options.out, 16)


if __name__ == "__main__":
    main()
