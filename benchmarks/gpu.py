"""Everything that only a card can show, in one file: the gpu tests and the engine against others.

    make gpu        # or: python benchmarks/gpu.py [--device cuda] [--full]

Writes `benchmarks/results/gpu.json`: the card, each test with its outcome and message, and the benchmark's
rows, in which `path` tells whether steps were captured, or why not. A part that fails is written down
with what it printed, and the others still run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import torch
from common import RESULTS, write_results

ROOT = Path(__file__).resolve().parents[1]


def card() -> dict[str, object]:
    """What the card is."""
    about = torch.cuda.get_device_properties(0)
    return {
        "name": about.name,
        "memory_gib": round(about.total_memory / 2**30, 1),
        "capability": f"{about.major}.{about.minor}",
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
    }


def tests(folder: Path) -> dict[str, object]:
    """The tests that are marked gpu, one by one."""
    report = folder / "tests.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", f"--junitxml={report}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if not report.exists():
        return {"exit": done.returncode, "printed": (done.stdout + done.stderr)[-4000:]}
    outcomes = {}
    for case in ElementTree.parse(report).iter("testcase"):
        trouble = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        said = "" if trouble is None else f"{trouble.tag}: {(trouble.get('message') or '')[:500]}"
        outcomes[f"{case.get('classname')}::{case.get('name')}"] = said or "passed"
    return {"exit": done.returncode, "outcomes": outcomes}


def benchmark(folder: Path, device: str, full: bool) -> dict[str, object]:
    """The engine's benchmark on the card."""
    kind = torch.device(device).type
    command = [sys.executable, "benchmarks/engine.py", "--device", device, "--out", str(folder)]
    command += ["--precisions", "float32", "tf32", "bfloat16"] + ([] if full else ["--quick"])
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    found = sorted(folder.glob(f"engine_{kind}*.json"))
    if done.returncode or not found:
        return {"exit": done.returncode, "printed": (done.stdout + done.stderr)[-4000:]}
    return json.loads(found[0].read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--full", action="store_true", help="the long benchmark, several minutes")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the file")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit(
            f"PyTorch {torch.__version__} sees no card, so nothing was run: install its driver, or a build "
            "of PyTorch for it (https://pytorch.org/get-started)."
        )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        content = {"card": card(), "tests": tests(folder)}
        content["benchmark"] = benchmark(folder, options.device, options.full)
    path = write_results("gpu", content, options.out)
    outcomes = content["tests"].get("outcomes", {})  # type: ignore[attr-defined]
    passed = sum(outcome == "passed" for outcome in outcomes.values())
    print(f"{passed} of {len(outcomes)} tests passed; all of it is in {path}")


if __name__ == "__main__":
    main()
