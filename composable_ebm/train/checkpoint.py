"""A training's full state as files, so that a killed run goes on as if it had not been.

A checkpoint is a folder `step-<n>` with one `rank<r>.safetensors` per process (weights, average,
optimiser, chains, generators: everything is a tensor) and `state.json`. It is written under a
temporary name and renamed when complete, so the newest folder is always whole. Nothing is
unpickled.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

__all__ = [
    "check_identity",
    "flatten_optimiser",
    "latest_checkpoint",
    "load_checkpoint",
    "restore_optimiser",
    "save_checkpoint",
]

KEEP = 2


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
    """
    temporary, final = folder / f".step-{step:07d}", folder / f"step-{step:07d}"
    if rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    wait()
    # Clones: tensors that share storage (tied weights, views) cannot be written.
    state = {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}
    save_file(state, temporary / f"rank{rank}.safetensors")
    wait()
    if rank == 0:
        (temporary / "state.json").write_text(json.dumps({"step": step, **facts}, indent=2))
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        for old in sorted(folder.glob("step-*"))[:-KEEP]:
            shutil.rmtree(old, ignore_errors=True)
    wait()


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint, or None."""
    return max(folder.glob("step-*"), default=None)


def load_checkpoint(path: Path, rank: int) -> tuple[dict[str, Tensor], dict]:
    """This rank's tensors and the facts of a checkpoint.

    Raises:
        ValueError: If it is damaged, or was written by fewer processes.
    """
    file = path / f"rank{rank}.safetensors"
    try:
        return load_file(file), json.loads((path / "state.json").read_text())
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(
            f"cannot resume from {file}: {error}. Resume with as many processes as wrote it, or delete "
            f"{path} to go back to the checkpoint before."
        ) from error


def check_identity(path: Path, stored: Mapping, wanted: Mapping) -> None:
    """Refuses to go on from the checkpoint of another training.

    Args:
        path: The checkpoint.
        stored: `TrainConfig.identity` of the training that wrote it; what it does not say may be anything.
        wanted: That of the training that would go on from it.
    Raises:
        ValueError: If they differ; the message says where.
    """
    plain = json.loads(json.dumps(wanted))
    differing = [name for name in plain if name in stored and stored[name] != plain[name]]
    if differing:
        settings = ", ".join(f"{n} = {stored[n]!r} (now {plain[n]!r})" for n in differing)
        raise ValueError(
            f"cannot resume from {path}: it was trained with {settings}. Put that back to go on, or start "
            f"anew: delete {path.parent}, or give another `runs` or `name`."
        )


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
