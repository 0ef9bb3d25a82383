"""Many samples of one recipe, shard by shard, on any number of processes.

    composable-ebm generate "faces/smile + faces/beard" --num-chains 100000 --out DIR
    accelerate launch --multi_gpu --num_processes 8 -m composable_ebm.generate RECIPE --out DIR

The chains are cut into shards. What a shard holds follows from the request and its number alone, so
one process and eight give the same samples, and a generation that was killed goes on where it
stopped: shards that are whole are kept, and each appears under its name only when it is whole.

In DIR: `generation.json`, the request and the experts it was made with, and for each shard
`shard-00000.safetensors`:

    samples     (chains, *event)
    energies    (chains,), in nats
    diverged    (chains,), True for chains that stopped being finite and were frozen

with `SampleResult.provenance` and a SHA-256 of the tensors as its metadata.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import torch
import tyro
from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from composable_ebm.energy import Energy
from composable_ebm.experts.expert import Expert
from composable_ebm.experts.recipe import parse
from composable_ebm.files import write_atomic
from composable_ebm.processes import check_launch, is_first, leave
from composable_ebm.sampling.request import calibrated_sampler
from composable_ebm.sampling.sample import sample

REQUEST = "generation.json"
SHARD, SHARDS = "shard-{:05d}.safetensors", "shard-*.safetensors"
TENSORS = ("samples", "energies", "diverged")
BARRIER_TIMEOUT = timedelta(days=30)
"""Processes wait for the last one at the end, however uneven the work was."""

__all__ = ["Generation", "generate", "read_shards", "shard_seed"]


@dataclass(frozen=True)
class Generation:
    """Draw many samples from a recipe, shard by shard, into a folder; goes on where it was stopped.

    Args:
        recipe: What to sample, as text.
        out: Folder for the shards.
        num_chains: Number of samples.
        num_steps: Steps of the sampler; what the experts were calibrated with unless given.
        seed: Each shard draws from a seed made of this one and its own number.
        shard_size: Chains in a shard, which run as one batch.
        cpu: Run on the CPU even where there is a GPU.
        num_threads: Threads of the CPU, for each process.
    """

    recipe: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE")]
    out: Path
    num_chains: int = 10_000
    num_steps: int | None = None
    seed: int = 0
    shard_size: int = 256
    cpu: bool = False
    num_threads: int | None = None

    @property
    def num_shards(self) -> int:
        """How many shards there are, the last one perhaps smaller."""
        return -(-self.num_chains // self.shard_size)

    @property
    def num_drawn(self) -> int:
        """Chains in the shards that are there."""
        numbers = (path.name.removeprefix("shard-").split(".")[0] for path in self.out.glob(SHARDS))
        shards = {int(number) for number in numbers if number.isdecimal() and len(number) < 20}
        return sum(self.size(shard) for shard in shards if shard < self.num_shards)

    def size(self, shard: int) -> int:
        """Chains in a shard."""
        return min(self.shard_size, self.num_chains - shard * self.shard_size)

    def path(self, shard: int) -> Path:
        """Where a shard is."""
        return self.out / SHARD.format(shard)


def shard_seed(seed: int, shard: int) -> int:
    """The seed of a shard's noise, from the seed of the request and the number of the shard."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{shard}".encode()).digest()[:8]) >> 1


def generate(generation: Generation) -> int:
    """Draws what is missing of a generation. Called by every process of a distributed run.

    Returns:
        How many of its chains diverged; 0 on all but the main process.
    Raises:
        ValueError: If the request makes no sense, or the folder holds another one.
        OSError: If the folder cannot be written, or its disk is too small.
    """
    for name in ("num_chains", "shard_size", "num_threads"):
        if (value := getattr(generation, name)) is not None and value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
    if generation.num_threads is not None:
        torch.set_num_threads(generation.num_threads)
    cpu = generation.cpu or not torch.cuda.is_available()
    processes = PartialState(cpu=cpu, timeout=BARRIER_TIMEOUT)
    try:
        return _generate(generation, processes)
    finally:
        processes.destroy_process_group()


def _generate(generation: Generation, processes: PartialState) -> int:
    energy = parse(generation.recipe).to(processes.device)
    request = _request(generation, energy)
    problem: Exception | None = None
    if processes.is_main_process:
        try:
            _claim(generation, request, energy)
        except (ValueError, OSError) as error:
            problem = error  # raised once no other process waits for this one
    processes.wait_for_everyone()
    if problem is not None:
        raise problem
    _check_same(generation.out, request)
    mine = range(processes.process_index, generation.num_shards, processes.num_processes)
    with tqdm(
        total=generation.num_chains,
        unit="chain",
        disable=not (processes.is_main_process and sys.stderr.isatty()),
    ) as bar:
        for shard in mine:
            if not _is_whole(generation, request, shard):
                _draw(generation, request, energy, shard)
            bar.update(generation.num_drawn - bar.n)
    processes.wait_for_everyone()
    if not processes.is_main_process:
        return 0
    return sum(int(tensors["diverged"].sum()) for tensors in read_shards(generation.out))


def read_shards(folder: str | Path) -> Iterator[dict[str, Tensor]]:
    """The shards of a folder in order: samples, energies and diverged of each.

    Raises:
        ValueError: If the folder holds no generation, or a shard is missing or damaged.
    """
    request = _read_request(Path(folder))
    for shard in range(-(-request["num_chains"] // request["shard_size"])):
        path = Path(folder) / SHARD.format(shard)
        tensors = _read(path)[0] if path.exists() else None
        if tensors is None:
            state = "is damaged" if path.exists() else "is missing"
            raise ValueError(f"{path} {state}: run the generation again, it draws what is missing.")
        yield tensors


# -- the request -----------------------------------------------------------------------------------


def _request(generation: Generation, energy: Energy) -> dict:
    """What the samples follow from."""
    num_steps = generation.num_steps
    if num_steps is None:
        num_steps = calibrated_sampler(energy)[1]
    experts = {
        leaf.card.full_name: str(leaf.card.weights.get("sha256"))
        for leaf in energy.leaves()
        if isinstance(leaf, Expert)
    }
    return {
        "recipe": str(energy),
        "num_chains": generation.num_chains,
        "num_steps": num_steps,
        "seed": generation.seed,
        "shard_size": generation.shard_size,
        "experts": experts,
    }


def _claim(generation: Generation, request: dict, energy: Energy) -> None:
    """Writes the request into a new folder; what was left half-written in an old one goes."""
    folder = generation.out
    if not (folder / REQUEST).exists():
        if any(folder.glob(SHARDS)):
            raise ValueError(f"{folder} holds shards but no {REQUEST}: choose another --out.")
        write_atomic(folder / REQUEST, json.dumps(request, indent=2).encode() + b"\n")
    _check_same(folder, request)
    for left in folder.glob(".shard-*.safetensors.*"):
        left.unlink(missing_ok=True)
    missing = generation.num_chains - generation.num_drawn
    needed = missing * (4 * math.prod(energy.event_shape or ()) + 5)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"the shards still to draw need {needed / 1e9:.1f} GB, and {folder} has {free / 1e9:.1f} GB "
            "free: choose another --out."
        )


def _read_request(folder: Path) -> dict:
    try:
        request = json.loads((folder / REQUEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{folder} holds no generation: {REQUEST} cannot be read ({error}).") from error
    for name in ("num_chains", "shard_size"):
        count = request.get(name) if isinstance(request, dict) else None
        if type(count) is not int or count < 1:
            raise ValueError(f"{folder} holds no generation: {REQUEST} gives {name} as {count!r}.")
    return request


def _check_same(folder: Path, request: dict) -> None:
    known = _read_request(folder)
    for name, wanted in request.items():
        if known.get(name) != wanted:
            raise ValueError(
                f"{folder} holds a generation with {name} {known.get(name)!r}, this one has {wanted!r}: "
                "choose another --out, or delete that folder."
            )


# -- shards ----------------------------------------------------------------------------------------


def _draw(generation: Generation, request: dict, energy: Energy, shard: int) -> None:
    result = sample(
        energy,
        num_chains=generation.size(shard),
        num_steps=request["num_steps"],
        seed=shard_seed(generation.seed, shard),
        on_divergence="report",
    )
    tensors = {
        "samples": result.samples.cpu().contiguous(),
        "energies": result.energies.cpu().contiguous(),  # they may be a column of a network's outputs
        "diverged": result.divergence.chains.cpu().contiguous(),
    }
    provenance = {**result.provenance(), "shard": str(shard), "sha256": _digest(tensors)}
    if result.weighted is not None:
        provenance["log_probability"] = f"{result.log_probability:.4f}"
    try:
        write_atomic(generation.path(shard), save(tensors, provenance))
    except OSError as error:
        error.add_note(f"while writing {generation.path(shard)}; the shards written so far are kept")
        raise


def _is_whole(generation: Generation, request: dict, shard: int) -> bool:
    """Whether a shard is there and holds what it should."""
    path = generation.path(shard)
    if not path.exists():
        return False
    tensors, provenance = _read(path)
    wanted = {
        "recipe": request["recipe"],
        "num_chains": str(generation.size(shard)),
        "num_steps": str(request["num_steps"]),
        "seed": str(shard_seed(generation.seed, shard)),
    }
    if tensors is not None and all(provenance.get(name) == value for name, value in wanted.items()):
        return True
    print(f"{path} is damaged and is drawn again.", file=sys.stderr)
    path.unlink()
    return False


def _read(path: Path) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
    """The tensors of a shard, or None if they are not what was written, and its metadata."""
    try:
        with safe_open(path, framework="pt") as file:
            provenance = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in TENSORS}
    except (SafetensorError, OSError):
        return None, {}
    return tensors if _digest(tensors) == provenance.get("sha256") else None, provenance


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in TENSORS:
        digest.update(tensors[name].contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _say(problem: str) -> None:
    """On the error stream, and in which process where it is not the first."""
    print(problem if is_first() else f"process {os.environ['RANK']}: {problem}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line and returns its exit status."""
    prog = "composable-ebm generate"
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        check_launch(arguments, "generate")
        generation = tyro.cli(Generation, prog=prog, args=arguments)
        diverged = generate(generation)
    except (ValueError, OSError) as error:
        _say("\n  ".join([f"generate: {error}", *getattr(error, "__notes__", ())]))
        return 2
    except KeyboardInterrupt:
        _say("generate: stopped; the same command goes on from here.")
        return 130
    if diverged:
        print(
            f"generate: {diverged} of {generation.num_chains} chains diverged; `diverged` in the shards says "
            "which.",
            file=sys.stderr,
        )
    if is_first():
        print(generation.out)
    return 0


if __name__ == "__main__":
    leave(main())
