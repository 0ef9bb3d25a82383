"""Accuracy against the number of attributes asked for at once, for every form of composition.

Draws what `composable-ebm evaluate` found:

    composable-ebm evaluate faces --forms ratio --out results/faces.json
    composable-ebm evaluate faces --forms sum "base ratio" --weight 1 --samples 250 \
        --out results/faces_other_forms.json
    python demos/composition_curve.py
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from composable_ebm.evaluation.family import plot

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/images/composition_curve.png")
    arguments = parser.parse_args()
    paths = arguments.results or [ROOT / "results/faces.json", ROOT / "results/faces_other_forms.json"]
    first, *others = (json.loads(path.read_text()) for path in paths)
    rows = first["rows"] + [row for other in others for row in other["rows"]]
    plot({**first, "rows": rows}, arguments.out)
    print(arguments.out)


if __name__ == "__main__":
    main()
