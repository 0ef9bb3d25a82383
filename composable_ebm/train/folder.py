"""A configuration for a user's own images, so that a folder is all that a training needs."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from composable_ebm.data.names import word
from composable_ebm.experts.card import CheckpointError
from composable_ebm.experts.catalogue import model_folders
from composable_ebm.experts.store import BASE, CODEC, read_card
from composable_ebm.train.config import (
    ConfinedEnergy,
    DataConfig,
    DiffusedEnergy,
    GenerationConfig,
    NoisyClassifier,
    OptimiserConfig,
    PictureCodec,
    TrainConfig,
)
from composable_ebm.train.objectives.classification import NoisyClassification
from composable_ebm.train.objectives.denoising import DenoisingScoreMatching
from composable_ebm.train.objectives.reconstruction import Reconstruction

STARTER = Path("portraits") / CODEC
SHARES = {CODEC: 1, BASE: 3, "attribute": 1}
"""Of the minutes, where all are trained by one command."""

__all__ = ["folder_config", "folder_digest", "stages_before"]


def folder_config(
    root: str | Path, attribute: str = "", models: str | Path = "models", latents: bool = False
) -> TrainConfig:
    """Denoising score matching on a folder of images, with settings that suit a few thousand of them.

    The family is named after the folder and the expert after the attribute, "base" without one. An
    expert of an attribute starts from the folder's base expert if that has been trained. On latents it is a
    classifier that stands on the base; `stages_before` says what is trained first.

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
    if attribute:
        return replace(
            common,
            network=NoisyClassifier(),
            objective=NoisyClassification(),
            batch_size=128,
            num_iterations=900,
            latents=True,
        )
    return replace(
        common,
        network=ConfinedEnergy(),
        objective=DenoisingScoreMatching(classification=0, log_sigma_mean=-0.6, log_sigma_std=1.0),
        batch_size=256,
        num_iterations=9000,
        latents=True,
    )


def stages_before(
    config: TrainConfig, arguments: Sequence[str] = ()
) -> tuple[list[TrainConfig], TrainConfig]:
    """What has to be trained before an expert on latents, and its configuration with its share of the time.

    The minutes are divided by fixed shares among what this command trains, or has trained when it was given
    before, so that it finds each part as long as then; what another command trained takes none of them.

    Args:
        config: Of `folder_config`, with `latents`.
        arguments: The command's, as on cards.
    Raises:
        ValueError: If the codec or the base that is there has learned from another folder.
    """
    family, digest = config.model_folder.parent, folder_digest(config.data.root)
    pictures = replace(config, data=replace(config.data, attribute=""), init="", fresh=False, push_to_hub="")
    base = folder_config(config.data.root, latents=True)
    shipped = _shipped_codec(PictureCodec())
    codec = replace(
        pictures,
        name=CODEC,
        network=PictureCodec(),
        objective=Reconstruction(),
        init=shipped,
        # What is there already is lost at the rate that a beginner needs.
        optimiser=replace(base.optimiser, learning_rate=3e-4 if shipped else 1e-3, hold=0.4, ema=0.99),
        batch_size=32,
        num_iterations=600 if shipped else 3000,
        latents=False,
        keep_best=False,
    )
    below = replace(
        pictures,
        name=BASE,
        network=base.network,
        objective=base.objective,
        optimiser=base.optimiser,
        batch_size=base.batch_size,
        num_iterations=base.num_iterations,
    )
    first = [codec] if config.name == BASE else [codec, below]
    missing = [stage for stage in first if not _is_there(family / stage.name, digest)]
    for there in (family / stage.name for stage in first if stage not in missing):
        print(
            f"{there} stays as it is, learned from {read_card(there).data}: delete it to learn it from the "
            "pictures as they are now."
        )
    own = [s for s in first if s in missing or _is_of(arguments, family / s.name)]
    total = sum(SHARES[_kind(stage)] for stage in (*own, config))
    timed = [replace(s, minutes=s.minutes * SHARES[_kind(s)] / total) for s in (*missing, config)]
    return timed[:-1], timed[-1]


def _shipped_codec(sizes: PictureCodec) -> str:
    """The folder of the codec that others start from, if there is one of these sizes; it has seen faces, and
    learns other pictures from there in a third of the time."""
    for folder in model_folders():
        try:
            network = read_card(folder / STARTER).network
        except CheckpointError:
            continue
        wanted = json.loads(json.dumps(asdict(sizes)))
        if all(network.get(name) == value for name, value in wanted.items()):
            return str(folder / STARTER)
    return ""


def _is_of(arguments: Sequence[str], expert: Path) -> bool:
    """Whether the command that trained an expert has these arguments."""
    command = str(read_card(expert).training.get("command", ""))
    return command.endswith(f"train {shlex.join(arguments)}")


def _kind(config: TrainConfig) -> str:
    return config.name if config.name in SHARES else "attribute"


def _is_there(expert: Path, digest: str) -> bool:
    """Whether a finished part of a family is there, learned from this folder."""
    try:
        card = read_card(expert)
    except CheckpointError:
        return False
    training = card.training
    if expert.name == BASE and not card.codec:
        raise ValueError(
            f"{expert} is about pixels, and an attribute on latents stands on a base of latents: add "
            f"--no-latents, or give this one another --family, or delete {expert}."
        )
    if training.get("folder") != digest:
        raise ValueError(
            f"{expert} has learned from another folder: give this one another --family, or delete {expert}."
        )
    return "unfinished" not in training


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
