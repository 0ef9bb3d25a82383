"""What is slow to load is loaded by whoever needs it: not by the import, and not by `sample`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import card, network

import composable_ebm

ROOT = Path(composable_ebm.__file__).parents[1]
HEAVY = [
    *("accelerate", "gradio", "torchvision", "matplotlib", "tensorboard", "huggingface_hub", "dicebear"),
    *("resvg_py", "scipy", "pandas", "sympy", "tyro", "torch._dynamo", "torch._inductor"),
    *("composable_ebm.train", "composable_ebm.evaluation"),
]
EXPERTS = (
    *("faces/base", "digits/digit", "shapes/base", "portraits/smile", "contrastive_digits/thick"),
    *("diffusion/base", "bits/rbm"),
)
STAGES = {
    "import": "import composable_ebm",
    "plotting": "import composable_ebm.plotting",
    "data": "import composable_ebm.data",
    "help": """
from composable_ebm.cli import main
try:
    main(["--help"])
except SystemExit:
    pass
""",
    "sample": "assert main(['sample', 'toys/thick + ~toys/wide', '--num-chains', '2']) == 0",
    "digits": "import composable_ebm.data.digits",
    "experts": f"""
from composable_ebm.experts.store import load_folder
for name in {EXPERTS}:
    load_folder({str(ROOT / "models")!r} + "/" + name)
""",
    "sympy": "import sympy",
}
RUN = """
import json, sys, time
import torch
heavy, stages = json.loads(sys.argv[1])
names, found = {}, {}
for stage, code in stages.items():
    start = time.process_time()
    exec(code, names)
    seconds = time.process_time() - start
    found[stage] = {"seconds": seconds, "loaded": [name for name in heavy if name in sys.modules]}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """What a fresh process takes for each stage, one after the other, which heavy packages it has then, and
    what it prints on the way."""
    folder = tmp_path_factory.mktemp("fresh")
    for name in ("thick", "wide"):
        description = card(name, ("no", "yes"))
        composable_ebm.save_expert(folder / "toys" / name, network(description), description)
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps([HEAVY, STAGES])],
        env={**os.environ, "PYTHONPATH": str(ROOT), "COMPOSABLE_EBM_MODELS": str(folder)},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    *printed, found = done.stdout.splitlines()
    return {**json.loads(found), "printed": "\n".join(printed), "folder": folder}


def test_the_import_is_quick_and_loads_nothing_heavy(fresh):
    assert fresh["import"]["loaded"] == []
    assert fresh["import"]["seconds"] < 3


def test_matplotlib_is_not_loaded_before_the_first_figure(fresh):
    assert fresh["plotting"]["loaded"] == []


def test_data_layer_loads_no_more_than_it_needs(fresh):
    assert fresh["data"]["loaded"] == []
    assert not {"accelerate", "gradio", "composable_ebm.train"} & set(fresh["digits"]["loaded"])


def test_help_names_every_subcommand_and_loads_nothing_heavy(fresh):
    for name in ("sample", "models", "train", "generate", "evaluate", "push", "mixer"):
        assert f"{name} " in fresh["printed"]
    assert fresh["help"]["loaded"] == ["tyro"]  # which reads the command line


def test_sampling_from_the_command_line_loads_nothing_heavy(fresh):
    assert fresh["sample"]["loaded"] == ["tyro"]
    assert (fresh["folder"] / "grid.png").exists()


def test_experts_of_every_kind_of_network_load_nothing_heavy(fresh):
    assert fresh["experts"]["loaded"] == fresh["digits"]["loaded"]


def test_the_heavy_packages_would_be_noticed(fresh):
    assert "sympy" in set(fresh["sympy"]["loaded"]) - set(fresh["sample"]["loaded"])
