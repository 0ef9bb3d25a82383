"""The curves of a training, from the metrics it wrote: is the energy gap near zero, does it still learn?

The gap between chains and data is the health of contrastive divergence: it should stay near zero. A
gap that grows costs quality long before anything looks diverged. What the expert has learned is in
the held-out panels, images it has not seen against noise.

    python demos/training_curves.py --metrics runs/contrastive_digits/digit/metrics.jsonl --out curves.png
"""

import argparse
from pathlib import Path

from composable_ebm.plotting import plot_training

ROOT = Path(__file__).resolve().parents[1]
METRICS = ROOT / "models/contrastive_digits/digit/metrics.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--metrics", type=Path, default=METRICS)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/images/training_curves.png")
    options = parser.parse_args()
    plot_training(options.metrics, options.out)
    print(options.out)


if __name__ == "__main__":
    main()
