"""What of the plan for many machines two processes can show; see docs/scale.md."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from encode_two_processes import pictures
from safetensors.torch import load_file

import composable_ebm as ceb
from composable_ebm.generate import Generation, read_shards

TESTS = Path(__file__).parent
LAUNCH = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no"
# `--cpu --num_processes 2` would silently start one process.


def launch(*program):
    command = [sys.executable, *LAUNCH.split(), "--main_process_port", "0", *map(str, program)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_two_processes_encode_a_data_set_between_them(tmp_path):
    launch(TESTS / "encode_two_processes.py", tmp_path, 50, 8)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert [file.stem.split("-")[1] for file in files] == [f"{i:05d}" for i in range(7)]
    assert {file.stem[-1] for file in files} == {"0", "1"}  # each took its part
    latents = torch.cat([load_file(file)["latents"] for file in files])
    torch.testing.assert_close(latents.float(), pictures(50)[..., ::2, ::2], rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_shards_of_two_processes_are_read_as_one_run(tmp_path):
    recipe, out = "contrastive_digits/digit[3]", tmp_path / "threes"
    options = "--num-chains 20 --num-steps 5 --shard-size 4 --cpu --num-threads 1"
    launch("-m", "composable_ebm.generate", recipe, "--out", out, *options.split())
    shards = list(read_shards(out))
    assert [len(shard["samples"]) for shard in shards] == [4] * 5
    three = ceb.load_expert("contrastive_digits/digit")[3]
    generation = Generation(recipe, out, num_chains=20, num_steps=5, shard_size=4)
    assert generation.num_shards == len(list(out.glob("shard-*.safetensors"))) == 5
    samples = torch.cat([shard["samples"] for shard in shards])
    energies = torch.cat([shard["energies"] for shard in shards])
    with torch.no_grad():
        torch.testing.assert_close(three(samples), energies, rtol=1e-3, atol=1e-2)
