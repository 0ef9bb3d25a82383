"""The proofs of `benchmarks/proofs`, at the size that a test run can afford; the docs have their figures."""

import subprocess
import sys
from pathlib import Path

import pytest

PROOFS = Path(__file__).parents[1] / "benchmarks" / "proofs"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("recipes", ["--texts", "20000", "--compositions", "1000"]),
        ("files", ["--flips", "40"]),
        ("inputs", ["--flips", "100"]),
        ("engine", ["--requests", "200"]),
        ("targets", ["--steps", "0.2", "--chains", "32", "--only", "correlated, 10 "]),
    ],
)
def test_proof_holds(name, options):
    command = [sys.executable, str(PROOFS / f"{name}.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
