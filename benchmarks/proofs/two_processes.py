"""How often a training on two processes ends cleanly: the user's own command, again and again.

    python benchmarks/proofs/two_processes.py --runs 200 --load 2

Each run is what `accelerate launch --multi_gpu --num_processes 2 -m composable_ebm.train CONFIG` starts:
two processes of `python -m composable_ebm.train CONFIG`, joined by gloo, each of which goes through the
end of a Python process. To start a run in a second instead of ten, the processes are forked from one that
has imported everything; `--launcher accelerate` starts them as users do. A run is clean if both processes
exit with 0, the expert can be read, and only the main process spoke.
"""

from __future__ import annotations

import argparse
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import accelerate  # noqa: F401, for the processes forked from this one
import torch
import torch.utils.tensorboard
from PIL import Image

import composable_ebm.train.trainer  # noqa: F401, the same
from composable_ebm.experts.store import load_folder

PROCESSES = 2
LONGEST = 120  # seconds of a run
CONFIG = """
family = "sides"
name = "side"
batch_size = 8
num_iterations = 4
log_every = 2
save_every = 2
evaluate_every = 1000
cpu = true
models = "{folder}/models"
runs = "{folder}/runs"
data = {{ name = "folder", root = "{root}", attribute = "class", size = 8 }}
network = {{ widths = [4, 4], hidden = 8 }}
objective = {{ cd_steps = 2, buffer_size = 64 }}
generation = {{ num_steps = 2 }}
"""
BUSY = "while True: sum(range(10_000))"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--load", type=int, default=0, help="processes that do nothing but keep cores busy")
    parser.add_argument("--launcher", choices=("fork", "accelerate"), default="fork")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    busy = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(arguments.load)]
    ends: Counter[str] = Counter()
    started, owner = time.perf_counter(), os.getpid()
    folder = Path(tempfile.mkdtemp())
    try:
        pictures(folder / "pictures")
        for i in range(arguments.runs):
            ends[end := once(folder, i, arguments.launcher)] += 1
            if end != "clean":
                print(f"run {i + 1}: {end}", flush=True)
    finally:
        if os.getpid() == owner:  # and not a forked process of a training that comes by on its way out
            for process in busy:
                process.kill()
            shutil.rmtree(folder)
    seconds = time.perf_counter() - started
    print(
        f"{ends['clean']} of {arguments.runs} clean ends in {seconds:.0f} s, {arguments.load} busy processes"
    )
    return 0 if ends["clean"] == arguments.runs else 1


def pictures(root: Path) -> None:
    """Forty pictures of two classes."""
    for i in range(40):
        picture = Image.new("L", (8, 8), 5 * i)
        picture.paste(255, (0, 0, 4, 8) if i % 2 else (4, 0, 8, 8))
        path = root / ("left" if i % 2 else "right") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)


def once(folder: Path, number: int, launcher: str) -> str:
    """Trains once; "clean", or what was not."""
    run = folder / f"{number}"
    run.mkdir()
    config = run / "config.toml"
    config.write_text(CONFIG.format(folder=run, root=folder / "pictures"))
    said = [run / f"said{rank}" for rank in range(PROCESSES)]
    statuses = _forked(config, said) if launcher == "fork" else _launched(config, said[0])
    if any(statuses):
        return f"exit statuses {statuses}: {said[0].read_text()[-2000:]}"
    if launcher == "fork" and any(path.read_text() for path in said[1:]):
        return f"rank 1 said {said[1].read_text()[-2000:]}"
    load_folder(run / "models/sides/side")
    return "clean"


def _launched(config: Path, said: Path) -> list[int]:
    launch = f"-m accelerate.commands.launch --multi_gpu --num_processes {PROCESSES} --num_machines 1"
    settings = "--mixed_precision no --dynamo_backend no --main_process_port 0 -m composable_ebm.train"
    command = [sys.executable, *launch.split(), *settings.split(), str(config)]
    with said.open("wb") as out:
        done = subprocess.run(command, stdout=out, stderr=out, timeout=LONGEST, check=False)
    return [done.returncode]


def _forked(config: Path, said: list[Path]) -> list[int]:
    """Exit statuses of the processes of one run, forked from this one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank, path in enumerate(said):
        sys.stdout.flush()
        child = os.fork()
        if not child:
            _become(rank, port, config, path)
        children.append(child)
    deadline = time.monotonic() + LONGEST
    statuses: dict[int, int] = {}
    while len(statuses) < len(children) and time.monotonic() < deadline:
        for child in children:
            if child not in statuses:
                ended, status = os.waitpid(child, os.WNOHANG)
                if ended:
                    statuses[child] = os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    for child in children:
        if child not in statuses:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    return [statuses.get(child, -signal.SIGKILL) for child in children]


def _become(rank: int, port: int, config: Path, said: Path) -> None:
    """Turns this forked process into one of the training; it ends as such a process does."""
    out = os.open(said, os.O_WRONLY | os.O_CREAT)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(PROCESSES),
        "LOCAL_WORLD_SIZE": str(PROCESSES),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
    }
    sys.argv = ["composable_ebm.train", str(config)]
    sys.modules.pop("composable_ebm.train.__main__", None)
    runpy.run_module("composable_ebm.train", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    sys.exit(main())
