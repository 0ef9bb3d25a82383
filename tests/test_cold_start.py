"""What is slow to load is loaded by whoever needs it: not by the import, and not by `sample`."""

import json
import os
import subprocess
import sys
from pathlib import Path

from helpers import card, network

import composable_ebm

ROOT = Path(composable_ebm.__file__).parents[1]
HEAVY = [
    *("accelerate", "gradio", "torchvision", "matplotlib", "tensorboard", "huggingface_hub", "dicebear"),
    *("resvg_py", "scipy", "pandas", "sympy", "tyro", "torch._dynamo", "torch._inductor"),
    *("composable_ebm.train", "composable_ebm.evaluation"),
]


def loaded(code, *arguments, **environment):
    """Which of the heavy packages a fresh process has loaded after some code."""
    report = f"\nimport json, sys\nprint(json.dumps([name for name in {HEAVY} if name in sys.modules]))"
    done = subprocess.run(
        [sys.executable, "-c", code + report, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def test_neither_the_import_nor_sampling_from_the_command_line_loads_anything_heavy(tmp_path):
    for name in ("thick", "wide"):
        description = card(name, ("no", "yes"))
        composable_ebm.save_expert(tmp_path / "toys" / name, network(description), description)
    code = f"""
import sys
import composable_ebm
assert not set({HEAVY}) & set(sys.modules), set({HEAVY}) & set(sys.modules)
from composable_ebm.cli import main
assert main(sys.argv[1:]) == 0
"""
    picture = tmp_path / "grid.png"
    arguments = ["sample", "toys/thick + ~toys/wide", "--out", str(picture), "--num-chains", "2"]
    # tyro reads the command line.
    assert loaded(code, *arguments, COMPOSABLE_EBM_MODELS=str(tmp_path)) == ["tyro"]
    assert picture.exists()


def test_the_heavy_packages_would_be_noticed():
    assert loaded("import sympy") == ["sympy"]
