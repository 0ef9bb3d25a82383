"""Trainings killed at random moments: does what is resumed end in the bits of an uninterrupted one?

    python benchmarks/proofs/kills.py --kills 100            kill -9
    python benchmarks/proofs/kills.py --kills 20 --gently    SIGTERM

A training of 30 iterations that saves and exports all the time is killed after a random time, started
again, killed again, until it comes to its end; then the weights of its expert are compared, byte for byte,
with those of a training that nobody killed, and another round begins. Each process is forked from one that
has imported everything, so that most moments fall into the training and its writing.
"""

from __future__ import annotations

import argparse
import os
import random
import runpy
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.utils.tensorboard

import composable_ebm.train.trainer  # noqa: F401, for the processes forked from this one
from composable_ebm.train.checkpoint import checkpoints, read_facts

sys.path.insert(0, str(Path(__file__).parent))
from two_processes import pictures

LONGEST = 120  # seconds of an attempt
ARGUMENTS = (
    *("class", "--cpu", "--num-iterations", "30", "--save-every", "3", "--evaluate-every", "10"),
    *("--log-every", "1", "--batch-size", "8", "--data.size", "8"),
    *("--generation.num-steps", "4", "--generation.noise-levels", "4"),
    *("network:diffused-energy", "--network.hidden", "16", "--network.components", "8"),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--gently", action="store_true", help="SIGTERM instead of SIGKILL")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    draw, owner = random.Random(arguments.seed), os.getpid()
    folder = Path(tempfile.mkdtemp())
    os.chdir(folder)
    try:
        pictures(folder / "pictures")
        seconds = attempt("whole", None, 0)
        kills = rounds = 0
        while kills < arguments.kills:
            rounds += 1
            kills += one_round(f"round{rounds}", arguments, draw, seconds)
            print(f"{kills} kills in {rounds} trainings of {seconds:.1f} s", flush=True)
    finally:
        if os.getpid() == owner:
            shutil.rmtree(folder)
    name = "SIGTERM" if arguments.gently else "SIGKILL"
    print(f"{kills} times {name}, {rounds} trainings: all ended in the bits of the uninterrupted one")
    return 0


def one_round(name: str, arguments: argparse.Namespace, draw: random.Random, seconds: float) -> int:
    """One training to its end, and how often it was killed on the way."""
    number = signal.SIGTERM if arguments.gently else signal.SIGKILL
    kills = 0
    while True:
        # Later attempts begin later, so moments are drawn over what is left.
        wait = draw.uniform(0, 1.1 * seconds)
        if attempt(name, number, wait) >= 0:
            break
        kills += 1
        for path in checkpoints(Path(name) / "runs/pictures/class/checkpoints")[:1]:
            read_facts(path)  # the newest is always whole
    weights = "models/pictures/class/model.safetensors"
    if (Path(name) / weights).read_bytes() != (Path("whole") / weights).read_bytes():
        raise SystemExit(f"{name}, killed {kills} times, ended in other weights.")
    left = [path for path in Path(name).rglob(".*") if path.name != ".lock"]
    if left:
        raise SystemExit(f"{name} left {left} behind.")
    shutil.rmtree(name)
    return kills


def attempt(name: str, number: int | None, wait: float) -> float:
    """Starts the training, kills it after `wait` seconds; the seconds it took, or -1 if it was killed."""
    started = time.monotonic()
    child = os.fork()
    if not child:
        out = os.open("said.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        places = ("--models", f"{name}/models", "--runs", f"{name}/runs")
        sys.argv = ["composable_ebm.train", "pictures", ARGUMENTS[0], *places, *ARGUMENTS[1:]]
        sys.modules.pop("composable_ebm.train.__main__", None)
        runpy.run_module("composable_ebm.train", run_name="__main__", alter_sys=True)
    killed = False
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        passed = time.monotonic() - started
        if number is not None and not killed and passed > wait:
            os.kill(child, number)
            killed = True
        if passed > LONGEST:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise SystemExit(
                f"an attempt took longer than {LONGEST} s: {Path('said.txt').read_text()[-2000:]}"
            )
        time.sleep(0.002)
    status = os.waitstatus_to_exitcode(ended[1])
    if status == 0:
        return time.monotonic() - started
    if number is None or status not in (-number, 128 + number):
        raise SystemExit(f"an attempt ended with {status}: {Path('said.txt').read_text()[-2000:]}")
    return -1


if __name__ == "__main__":
    sys.exit(main())
