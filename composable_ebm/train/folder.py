"""A configuration for a user's own images, so that a folder is all that a training needs."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

from composable_ebm.data.names import word
from composable_ebm.experts.card import CheckpointError
from composable_ebm.experts.store import BASE, CODEC, read_card
from composable_ebm.train.config import (
    ConfinedEnergy,
    DataConfig,
    DiffusedEnergy,
    GenerationConfig,
    NoisyClassifier,
    OptimiserConfig,
    TrainConfig,
)
from composable_ebm.train.objectives.classification import NoisyClassification
from composable_ebm.train.objectives.denoising import DenoisingScoreMatching

CONTRAST = 0.5
"""Share of a base's training that its contrastive last stage has."""

__all__ = ["folder_config", "folder_digest"]


def folder_config(
    root: str | Path, attribute: str = "", models: str | Path = "models", latents: bool = False
) -> TrainConfig:
    """Denoising score matching on a folder of images, with settings that suit a few thousand of them.

    The family is named after the folder and the expert after the attribute, "base" without one. An
    expert of an attribute starts from the folder's base expert if that has been trained. On latents it is a
    classifier that stands on the base; `train.stages` says what is trained first.

    Args:
        root: The folder, see `composable_ebm.data.folder`.
        attribute: A column of its table, or "class" for a subfolder each; "" learns p(x).
        models: Folder of experts, where the base is looked for.
        latents: Learns on the latents of a codec, pictures of 64 pixels.
    """
    root = Path(root)
    family, name = word(root.resolve().name), word(attribute) if attribute else BASE
    if attribute and name in (BASE, CODEC):  # those are others
        name = f"{name}_"
    base = Path(models) / family / BASE
    common = TrainConfig(
        family=family,
        name=name,
        data=DataConfig(name="folder", root=str(root), attribute=attribute, size=64 if latents else 0),
        network=DiffusedEnergy(hidden=448),
        objective=DenoisingScoreMatching(classification=0.5),
        optimiser=OptimiserConfig(learning_rate=2e-3, beta1=0.9, beta2=0.99, grad_clip=1.0, ema=0.998),
        generation=GenerationConfig(num_steps=80),
        num_iterations=3000,
        save_every=500,
        evaluate_every=500,
        models=str(models),
        half=True,
        keep_best=True,
    )
    if not latents:
        started = attribute and _learned_from(base, root)
        return replace(common, init=str(base) if started else "")
    # Of bases that a stranger's minutes pay for many a sample is poor: there is more to choose from.
    weighed = replace(common.generation, per_chain=3.0, surest=True)
    if attribute:
        return replace(
            common,
            generation=weighed,
            network=NoisyClassifier(),
            objective=NoisyClassification(),
            batch_size=128,
            num_iterations=900,
            latents=True,
        )
    return replace(
        common,
        generation=weighed,
        network=ConfinedEnergy(),
        objective=DenoisingScoreMatching(classification=0, log_sigma_mean=-0.6, log_sigma_std=1.0),
        batch_size=256,
        num_iterations=9000,
        latents=True,
        contrast=CONTRAST,
    )


def folder_digest(root: str | Path) -> str:
    """What tells a folder from others of its name; a folder that moves is another."""
    return hashlib.sha256(str(Path(root).resolve()).encode()).hexdigest()[:16]


def _learned_from(expert: Path, root: Path) -> bool:
    """Whether the expert in a folder was trained on the images in `root`."""
    try:
        card = read_card(expert)
    except CheckpointError:
        return False
    named = card.data.startswith(f"{root.name}/train,")
    return (
        named and not card.codec and card.training.get("folder", folder_digest(root)) == folder_digest(root)
    )
