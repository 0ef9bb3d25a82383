"""A configuration for a user's own images, so that a folder is all that a training needs."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from pathlib import Path

from composable_ebm.experts.card import CheckpointError
from composable_ebm.experts.store import read_card
from composable_ebm.train.config import (
    DataConfig,
    DiffusedEnergy,
    GenerationConfig,
    OptimiserConfig,
    TrainConfig,
)
from composable_ebm.train.objectives.denoising import DenoisingScoreMatching

__all__ = ["folder_config", "folder_digest"]


def folder_config(root: str | Path, attribute: str = "", models: str | Path = "models") -> TrainConfig:
    """Denoising score matching on a folder of images, with settings that suit a few thousand of them.

    The family is named after the folder and the expert after the attribute, "base" without one. An
    expert of an attribute starts from the folder's base expert if that has been trained.

    Args:
        root: The folder, see `composable_ebm.data.folder`.
        attribute: A column of its table, or "class" for a subfolder each; "" learns p(x).
        models: Folder of experts, where the base is looked for.
    """
    root = Path(root)
    family, name = _word(root.resolve().name), _word(attribute) if attribute else "base"
    base = Path(models) / family / "base"
    return TrainConfig(
        family=family,
        name=name,
        data=DataConfig(name="folder", root=str(root), attribute=attribute),
        network=DiffusedEnergy(hidden=448),
        objective=DenoisingScoreMatching(classification=0.5),
        optimiser=OptimiserConfig(learning_rate=2e-3, beta1=0.9, beta2=0.99, grad_clip=1.0, ema=0.998),
        generation=GenerationConfig(num_steps=80),
        num_iterations=3000,
        save_every=500,
        evaluate_every=500,
        models=str(models),
        init=str(base) if attribute and _learned_from(base, root) else "",
        half=True,
        keep_best=True,
    )


def folder_digest(root: str | Path) -> str:
    """What tells a folder from others of its name; a folder that moves is another."""
    return hashlib.sha256(str(Path(root).resolve()).encode()).hexdigest()[:16]


def _word(text: str) -> str:
    """A name that recipes can hold; of letters that they cannot, a digest keeps names apart."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    word = re.sub(r"[^A-Za-z0-9_]+", "_", plain).strip("_")
    lost = sum(c.isalnum() for c in text) - sum(c.isalnum() for c in plain)
    if lost or not word:
        word = f"{word}_{hashlib.sha256(text.encode()).hexdigest()[:6]}"
    return f"_{word}" if word[0].isdigit() else word


def _learned_from(expert: Path, root: Path) -> bool:
    """Whether the expert in a folder was trained on the images in `root`."""
    try:
        card = read_card(expert)
    except CheckpointError:
        return False
    named = card.data.startswith(f"{root.name}/train,")
    return named and card.training.get("folder", folder_digest(root)) == folder_digest(root)
