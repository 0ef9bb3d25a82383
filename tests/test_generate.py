"""Sharded generation: the same samples however many processes, and whatever was interrupted."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from helpers import card, network

import composable_ebm as ceb
from composable_ebm import cli
from composable_ebm.generate import Generation, generate, main, read_shards, shard_seed

ROOT = Path(ceb.__file__).parents[1]
RECIPE = "toys/digit[1] + 0.5*toys/thick"


@pytest.fixture
def toys(tmp_path, monkeypatch):
    """Two tiny experts that recipes may name."""
    for seed, (name, values) in enumerate({"digit": ("0", "1", "2"), "thick": ("no", "yes")}.items()):
        description = card(name, values)
        ceb.save_expert(tmp_path / "models/toys" / name, network(description, seed), description)
    monkeypatch.setenv("COMPOSABLE_EBM_MODELS", str(tmp_path / "models"))
    return tmp_path


def request(out, **changes):
    return Generation(
        **{"recipe": RECIPE, "out": out, "num_chains": 22, "shard_size": 8, "num_steps": 5, **changes}
    )


def drawn(folder):
    shards = list(read_shards(folder))
    return [torch.cat([shard[name] for shard in shards]) for name in ("samples", "energies", "diverged")]


def test_shards_hold_the_samples_of_their_seeds(toys):
    assert generate(request(toys / "out")) == 0
    assert sorted(p.name for p in (toys / "out").iterdir()) == [
        "generation.json",
        *(f"shard-0000{i}.safetensors" for i in range(3)),
    ]
    shards = list(read_shards(toys / "out"))
    assert [len(shard["samples"]) for shard in shards] == [8, 8, 6]
    energy = ceb.parse(RECIPE)
    for i, shard in enumerate(shards):
        alone = ceb.sample(energy, num_chains=len(shard["samples"]), num_steps=5, seed=shard_seed(0, i))
        torch.testing.assert_close(shard["samples"], alone.samples, rtol=0, atol=0)
        torch.testing.assert_close(shard["energies"], alone.energies, rtol=0, atol=0)
    samples, _, diverged = drawn(toys / "out")
    assert len(samples.flatten(1).unique(dim=0)) == 22
    assert not diverged.any()


def test_seeds_of_shards_are_all_different():
    seeds = {shard_seed(seed, shard) for seed in range(30) for shard in range(30)}
    assert len(seeds) == 900
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_generation_goes_on_where_it_stopped(toys, capsys):
    generate(request(toys / "whole"))
    shutil.copytree(toys / "whole", toys / "part")
    kept, missing, damaged = (toys / "part" / f"shard-0000{i}.safetensors" for i in range(3))
    missing.unlink()
    content = bytearray(damaged.read_bytes())
    content[-5] ^= 1
    damaged.write_bytes(content)
    (toys / "part/.shard-00001.safetensors.abc").write_bytes(b"half of a shard")
    before = kept.stat().st_mtime_ns
    with pytest.raises(ValueError, match=r"shard-00001.safetensors is missing: run the generation again"):
        drawn(toys / "part")
    generate(request(toys / "part"))
    assert kept.stat().st_mtime_ns == before
    assert "shard-00002.safetensors is damaged and is drawn again" in capsys.readouterr().err
    assert not list((toys / "part").glob(".shard*"))
    for one, two in zip(drawn(toys / "whole"), drawn(toys / "part"), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)


@pytest.mark.parametrize("cut", [0, 10, 300])
def test_a_truncated_shard_is_noticed(toys, cut):
    generate(request(toys / "out"))
    path = toys / "out/shard-00001.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"shard-00001.safetensors is damaged: run the generation again"):
        drawn(toys / "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"recipe": "toys/thick"},
            r"holds a generation with recipe 'toys/digit\[1\] \+ 0.5\*toys/thick', this",
        ),
        ({"seed": 1}, "holds a generation with seed 0, this one has 1: choose another --out"),
        ({"num_chains": 23}, "with num_chains 22, this one has 23"),
        ({"num_steps": 6}, "with num_steps 5, this one has 6"),
        ({"shard_size": 9}, "with shard_size 8, this one has 9"),
    ],
)
def test_a_folder_with_another_generation_is_refused(toys, changes, message):
    generate(request(toys / "out"))
    with pytest.raises(ValueError, match=message):
        generate(request(toys / "out", **changes))


def test_an_expert_that_was_retrained_is_another_generation(toys):
    generate(request(toys / "out"))
    description = card("thick", ("no", "yes"))
    ceb.save_expert(toys / "models/toys/thick", network(description, 9), description)
    with pytest.raises(ValueError, match="holds a generation with experts"):
        generate(request(toys / "out"))


def test_the_same_recipe_in_other_words_is_the_same_generation(toys):
    generate(request(toys / "out"))
    generate(request(toys / "out", recipe="(2*toys/digit[1] + toys/thick) / 2"))
    with pytest.raises(ValueError, match="holds a generation with recipe"):
        generate(request(toys / "out", recipe="toys/digit[1] + 0.6*toys/thick"))


def test_a_disk_that_is_too_small_is_noticed_before_the_work(toys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("usage", "free")(100))
    with pytest.raises(OSError, match=r"the shards still to draw need 0\.0 GB, and .* has 0\.0 GB free"):
        generate(request(toys / "out"))


def test_a_generation_without_end_is_refused_before_its_shards_are_listed(toys):
    start = time.process_time()
    with pytest.raises(OSError, match=r"need \d+\.0 GB, and .* choose another --out"):
        generate(request(toys / "out", num_chains=10**15))
    assert time.process_time() - start < 5
    assert Generation("a", toys, num_chains=3 * 10**20 + 1, shard_size=3).num_shards == 10**20 + 1


def test_a_disk_that_fills_up_leaves_whole_shards(toys, monkeypatch, capsys):
    fsync, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > 2:  # the request and the first shard
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    arguments = [
        RECIPE,
        "--out",
        str(toys / "out"),
        "--num-chains",
        "22",
        "--shard-size",
        "8",
        "--num-steps",
        "5",
    ]
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert "No space left on device" in said
    assert "shards written so far are kept" in said
    assert len(list((toys / "out").glob("shard-*"))) == 1
    assert not list((toys / "out").glob(".shard-*"))
    monkeypatch.setattr(os, "fsync", fsync)
    assert main(arguments) == 0
    assert len(drawn(toys / "out")[0]) == 22


def test_generate_is_a_subcommand(toys, capsys):
    out = toys / "out"
    arguments = ["generate", RECIPE, "--out", str(out), "--num-chains", "3", "--num-steps", "2"]
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert len(drawn(out)[0]) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["toys/nobody"], "unknown expert 'toys/nobody'"),
        (["toys/thick", "--num-chains", "0"], "`num_chains` must be at least 1, got 0"),
        (["-1*toys/thick", "--num-steps", "3"], "no term with a positive weight"),
    ],
)
def test_mistakes_are_explained(toys, capsys, arguments, message):
    assert main([*arguments, "--out", str(toys / "out")]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_of_something_else_is_refused(toys):
    (toys / "other").mkdir()
    (toys / "other/shard-00000.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"holds shards but no generation.json"):
        generate(request(toys / "other"))
    with pytest.raises(ValueError, match="holds no generation"):
        drawn(toys)


# -- processes -------------------------------------------------------------------------------------


def command(toys, name, *options):
    arguments = [
        RECIPE,
        "--out",
        str(toys / name),
        "--num-chains",
        "22",
        "--shard-size",
        "4",
        "--cpu",
        *options,
    ]
    return ["-m", "composable_ebm.generate", *arguments]


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}


def test_a_generation_that_was_killed_goes_on(toys):
    options = ("--num-steps", "50")
    process = subprocess.Popen([sys.executable, *command(toys, "out", *options)], env=environment())
    first = toys / "out/shard-00000.safetensors"
    deadline = time.monotonic() + 60
    while not first.exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL  # it was still running
    written = first.stat().st_mtime_ns
    assert main([*command(toys, "out", *options)[2:]]) == 0
    assert first.stat().st_mtime_ns == written
    assert len(drawn(toys / "out")[0]) == 22


def test_a_launch_that_silently_starts_one_process_is_refused_with_the_command_that_works(
    toys, monkeypatch, capsys
):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert main(["one", "--out", str(toys / "out")]) == 2
    works = "accelerate launch --multi_gpu --num_processes 2 -m composable_ebm.generate one --out"
    assert works in capsys.readouterr().err
    assert not (toys / "out").exists()


@pytest.mark.slow
def test_two_processes_give_the_samples_of_one(toys):
    # `--cpu --num_processes 2` would silently start one process.
    launch = "accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no"
    start = [sys.executable, "-m", *launch.split(), "--dynamo_backend", "no", "--main_process_port", "0"]
    options = ("--num-steps", "5")
    done = subprocess.run(
        [*start, *command(toys, "two", *options)],
        env={**environment(), "ACCELERATE_LOG_LEVEL": "info"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count(str(toys / "two")) == 1
    assert main(command(toys, "one", *options)[2:]) == 0
    for one, two in zip(drawn(toys / "one"), drawn(toys / "two"), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)
