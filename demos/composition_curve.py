"""Accuracy and diversity against the number of attributes asked for at once, for every form and rival.

Draws what `composable-ebm evaluate` found, of one file or several together:

    composable-ebm evaluate faces
    python demos/composition_curve.py
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from composable_ebm.evaluation.report import plot

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, nargs="+", default=[ROOT / "results/faces.json"])
    parser.add_argument("--out", type=Path, default=ROOT / "docs/images/composition_curve.png")
    arguments = parser.parse_args()
    first, *others = (json.loads(path.read_text()) for path in arguments.results)
    rows = first["rows"] + [row for other in others for row in other["rows"]]
    plot({**first, "rows": rows}, arguments.out)
    print(arguments.out)


if __name__ == "__main__":
    main()
