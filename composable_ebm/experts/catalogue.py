"""Experts by name: where they are looked for, and what there is."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path

import torch

from composable_ebm.experts.card import Card, CheckpointError
from composable_ebm.experts.expert import Expert
from composable_ebm.experts.store import BASE, CODEC, CONFIG, WEIGHTS, check_folder, load_folder

ENVIRONMENT = "COMPOSABLE_EBM_MODELS"

__all__ = ["catalogue", "find_folder", "load_expert", "model_folders"]


def model_folders() -> list[Path]:
    """Folders of experts, first found first served: $COMPOSABLE_EBM_MODELS (a search path), `models`
    in the working folder, the checkout's, the installed package's."""
    package = Path(__file__).resolve().parents[1]
    named = [Path(p) for p in os.environ.get(ENVIRONMENT, "").split(os.pathsep) if p]
    places = [*named, Path("models"), package.parent / "models", package / "models"]
    found: dict[Path, None] = {}
    for place in places:
        if place.is_dir():
            found.setdefault(place.resolve())
    return list(found)


def catalogue() -> dict[str, Path]:
    """Every expert there is: "family/name" -> its folder. New folders appear by themselves."""
    found: dict[str, Path] = {}
    for folder in model_folders():
        for config in sorted(folder.glob(f"*/*/{CONFIG}")):
            if config.parent.name != CODEC:
                found.setdefault("/".join(config.parts[-3:-1]), config.parent)
    return found


def cards() -> tuple[dict[str, Card], dict[str, str]]:
    """The cards of all experts that can be loaded by name, and why others cannot."""
    good: dict[str, Card] = {}
    bad: dict[str, str] = {}
    for name, folder in catalogue().items():
        try:
            good[name] = check_folder(folder)
        except CheckpointError as error:
            bad[name] = str(error)
    return good, bad


def load_expert(name: str | Path, device: torch.device | str | None = None) -> Expert:
    """A trained expert, ready to compose.

    Args:
        name: "family/name" of an expert in one of `model_folders`, a folder that holds one, or the
            id of a Hugging Face Hub repository that holds one.
        device: Where to put it.
    Raises:
        KeyError: If there is no such expert; the message lists near names.
        CheckpointError: If its files are damaged.
    Example:
        >>> three = load_expert("digits/digit")[3]
    """
    try:
        return load_folder(find_folder(name), device)
    except KeyError as error:
        if not _may_be_on_the_hub(str(name)):
            raise
        try:
            return load_folder(_download(str(name)), device)
        except (OSError, ValueError) as reason:
            said = str(reason).splitlines() or [type(reason).__name__]
            raise KeyError(f"{error.args[0]} The Hub did not give one either: {said[0]}") from reason


def find_folder(name: str | Path) -> Path:
    """The folder of an expert on this machine, given by name or as a folder.

    Raises:
        KeyError: If there is no such expert; the message lists near names.
    """
    known, folder = catalogue(), Path(name)
    if str(name) in known:
        return known[str(name)]
    if (folder / CONFIG).exists() or (folder / WEIGHTS).exists():
        return folder
    near = difflib.get_close_matches(str(name), known, 3) or [k for k in known if k.endswith(f"/{name}")]
    hint = f" Did you mean {' or '.join(near)}?" if near else f" There are: {', '.join(known) or 'none'}."
    raise KeyError(f"no expert named {str(name)!r}.{hint}")


def _may_be_on_the_hub(name: str) -> bool:
    """Whether a name looks like user/repository, and not like a slip in the name of an expert here."""
    known = catalogue()
    families = {other.split("/")[0] for other in known}
    shaped = re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None
    slip = difflib.get_close_matches(name, known, 1, cutoff=0.85)
    return shaped and name.split("/")[0] not in families and not slip


def _download(repository: str) -> Path:
    from huggingface_hub import snapshot_download  # slow to load, and only needed here

    files = [f"{place}{name}" for place in ("", f"{CODEC}/", f"{BASE}/") for name in (CONFIG, WEIGHTS)]
    return Path(snapshot_download(repository, allow_patterns=files))
