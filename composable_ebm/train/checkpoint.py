"""A training's full state as files, so that a killed run goes on as if it had not been.

A checkpoint is a folder `step-<n>` with one `rank<r>.safetensors` per process (weights, average,
optimiser, chains, generators: everything is a tensor) and `state.json`, which holds the digests of these
files and one of itself. It is written under a temporary name and renamed when complete, so the newest
folder is whole; should a bit of it change afterwards, the one before it serves. Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from composable_ebm.files import write_atomic

__all__ = [
    "checkpoints",
    "flatten_optimiser",
    "latest_checkpoint",
    "load_checkpoint",
    "read_facts",
    "remove_leftovers",
    "restore_optimiser",
    "save_checkpoint",
]

KEEP = 2
STATE = "state.json"


def save_checkpoint(
    folder: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    facts: Mapping,
    rank: int,
    wait: Callable[[], None],
) -> None:
    """Writes the checkpoint of `step`; every rank calls it.

    Args:
        folder: Holds all checkpoints of the run.
        step: Iterations done.
        tensors: This rank's state.
        facts: What is not a tensor; rank 0's is kept.
        rank: This process.
        wait: A barrier over all processes.
    Raises:
        OSError: If it cannot be written; the checkpoints before it are as they were.
    """
    temporary, final = folder / f".step-{step:07d}", folder / f"step-{step:07d}"
    if rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    wait()
    # Clones: tensors that share storage (tied weights, views) cannot be written.
    state = {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}
    try:
        write_atomic(temporary / f"rank{rank}.safetensors", save(state))
        wait()
        if rank == 0:
            files = {path.name: _digest(path) for path in sorted(temporary.glob("rank*.safetensors"))}
            content = {"step": step, **facts, "files": files}
            signed = {**content, "digest": _digest_of_facts(content)}
            write_atomic(temporary / STATE, json.dumps(signed, indent=2).encode())
            shutil.rmtree(final, ignore_errors=True)
            os.replace(temporary, final)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if rank == 0:
        for old in checkpoints(folder)[KEEP:]:
            shutil.rmtree(old, ignore_errors=True)
    wait()


def checkpoints(folder: Path) -> list[Path]:
    """All complete checkpoints, the newest first."""
    return sorted(folder.glob("step-*"), reverse=True)


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint, or None."""
    return next(iter(checkpoints(folder)), None)


def remove_leftovers(folder: Path) -> None:
    """Removes what a process that was killed while it wrote a checkpoint left behind."""
    for path in folder.glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)


def read_facts(path: Path) -> dict:
    """The facts of a checkpoint whose files are all as they were written.

    Raises:
        ValueError: If one is missing or changed.
    """
    try:
        facts = json.loads((path / STATE).read_text())
        digest = facts.pop("digest", None)
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{path / STATE} cannot be read: {error}.") from error
    if digest != _digest_of_facts(facts):
        raise ValueError(f"{path / STATE} was changed, or written by another version.")
    for name, expected in facts["files"].items():
        file = path / name
        try:
            same = _digest(file) == expected
        except OSError as error:
            raise ValueError(f"{file} cannot be read: {error.strerror}.") from error
        if not same:
            raise ValueError(f"{file} was changed: its digest is another than {STATE} says.")
    return facts


def load_checkpoint(path: Path, rank: int) -> dict[str, Tensor]:
    """This rank's tensors of a checkpoint whose digests have been checked, see `read_facts`.

    Raises:
        ValueError: If it was written by fewer processes.
    """
    file = path / f"rank{rank}.safetensors"
    try:
        return load(file.read_bytes())
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"cannot resume from {file}: {error}. Resume with as many processes as wrote it."
        ) from error


def flatten_optimiser(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state of an optimiser as named tensors."""
    state = optimiser.state_dict()["state"]
    return {
        f"optimiser.{i}.{name}": torch.as_tensor(value)
        for i, entry in state.items()
        for name, value in entry.items()
    }


def restore_optimiser(optimiser: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """The reverse of `flatten_optimiser`."""
    full = optimiser.state_dict()
    full["state"] = {}
    for name, value in tensors.items():
        if name.startswith("optimiser."):
            _, index, key = name.split(".", 2)
            # The optimiser takes tensors as they are and updates them in place.
            full["state"].setdefault(int(index), {})[key] = value.clone()
    optimiser.load_state_dict(full)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_of_facts(facts: Mapping) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
