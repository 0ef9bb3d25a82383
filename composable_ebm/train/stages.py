"""What one command trains, stage by stage: a codec, a base, its contrastive last stage, an attribute."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from composable_ebm.experts.card import Card, CheckpointError
from composable_ebm.experts.catalogue import model_folders
from composable_ebm.experts.store import BASE, CODEC, read_card
from composable_ebm.train.config import OptimiserConfig, PictureCodec, TrainConfig
from composable_ebm.train.export import UNFINISHED
from composable_ebm.train.folder import folder_config, folder_digest
from composable_ebm.train.objectives.denoising import DenoisingScoreMatching
from composable_ebm.train.objectives.over_levels import ContrastiveOverLevels
from composable_ebm.train.objectives.reconstruction import Reconstruction

STARTER = Path("portraits") / CODEC
SHARES = {CODEC: 1, BASE: 3, "attribute": 1}
"""Of the minutes, where all are trained by one command."""
CONTRAST = "contrast"
"""What is still to come for an expert whose first stage is done, as its card says."""

__all__ = ["CONTRAST", "stages"]


def stages(config: TrainConfig, arguments: Sequence[str] = ()) -> list[TrainConfig]:
    """What is left to train for an expert of a folder, in order; the last is of the expert itself.

    The minutes are divided by fixed shares among what this command trains, or has trained when it was given
    before, so that it finds each part as long as then; what another command trained takes none of them.
    A training with `contrast` is divided once more: score matching, then contrast from where that ended, into
    the same expert. When the first of the two is done, or the expert is, only the second is left.

    Args:
        config: Of `folder_config`.
        arguments: The command's, as on cards.
    Raises:
        ValueError: If the codec or the base that is there has learned from another folder.
    """
    on_latents = config.latents and config.data.name == "folder"
    parts = _parts(config, arguments) if on_latents else [config]
    return [stage for part in parts for stage in _in_two(part)]


def _parts(config: TrainConfig, arguments: Sequence[str]) -> list[TrainConfig]:
    """What of a family on latents has to be trained for an expert, and the expert, each with its minutes."""
    family, digest = config.model_folder.parent, folder_digest(config.data.root)
    pictures = replace(
        config, data=replace(config.data, attribute=""), init="", fresh=False, push_to_hub="", contrast=0.0
    )
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
        contrast=base.contrast,
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
    return [replace(s, minutes=s.minutes * SHARES[_kind(s)] / total) for s in (*missing, config)]


def _in_two(config: TrainConfig) -> list[TrainConfig]:
    """A training and its contrastive last stage, at rates at which what is learned is not lost again."""
    share, objective = config.contrast, config.objective
    if not share or not isinstance(objective, DenoisingScoreMatching):
        return [config]
    first, last = (
        replace(
            config,
            contrast=0.0,
            minutes=part * config.minutes,
            num_iterations=max(round(part * config.num_iterations), 1),
        )
        for part in (1 - share, share)
    )
    batch_size = min(config.batch_size, 128)
    last = replace(
        last,
        objective=ContrastiveOverLevels(
            num_levels=40, rho=7.0, buffer_size=8 * batch_size, classification=objective.classification
        ),
        optimiser=OptimiserConfig(learning_rate=5e-5, beta2=0.99, grad_clip=1.0, ema=0.998),
        init=str(config.model_folder),
        runs=str(Path(config.runs) / CONTRAST),
        batch_size=batch_size,
        largest_gap=max(config.largest_gap, 1000.0),
        keep_best=False,  # held-out figures say nothing of what contrast mends
    )
    return [last] if _is_scored(config) else [first, last]


def _is_scored(config: TrainConfig) -> bool:
    """Whether the first of two stages is done."""
    card = _card(config.model_folder)
    if card is None or config.fresh:
        return False
    same_folder = card.training.get("folder") == folder_digest(config.data.root)
    same = same_folder and bool(card.codec) == config.latents
    return same and card.training.get(UNFINISHED, CONTRAST) == CONTRAST


def _shipped_codec(sizes: PictureCodec) -> str:
    """The folder of the codec that others start from, if there is one of these sizes; it has seen faces, and
    learns other pictures from there in a third of the time."""
    for folder in model_folders():
        card = _card(folder / STARTER)
        wanted = json.loads(json.dumps(asdict(sizes)))
        if card is not None and all(card.network.get(name) == value for name, value in wanted.items()):
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
    card = _card(expert)
    if card is None:
        return False
    if expert.name == BASE and not card.codec:
        raise ValueError(
            f"{expert} is about pixels, and an attribute on latents stands on a base of latents: add "
            f"--no-latents, or give this one another --family, or delete {expert}."
        )
    if card.training.get("folder") != digest:
        raise ValueError(
            f"{expert} has learned from another folder: give this one another --family, or delete {expert}."
        )
    return UNFINISHED not in card.training


def _card(expert: Path) -> Card | None:
    """The card of an expert or codec, None where there is none that anybody could use."""
    try:
        return read_card(expert)
    except CheckpointError:
        return None
