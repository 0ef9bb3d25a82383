"""What a training learns from: pictures or latents, and what its expert stands on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm.auto import tqdm

from composable_ebm.data import LabelledImages, LabelledLatents
from composable_ebm.data.copies import without_copies
from composable_ebm.data.jitter import mirrored, with_jitter
from composable_ebm.data.ranges import as_states
from composable_ebm.data.summary import summary
from composable_ebm.experts.card import Card, CheckpointError
from composable_ebm.experts.expert import Expert
from composable_ebm.experts.networks import NETWORKS
from composable_ebm.experts.networks.codec import PictureCodec
from composable_ebm.experts.store import BASE, CODEC, find_base, load_codec, read_card
from composable_ebm.train.codec import encoded
from composable_ebm.train.config import TrainConfig
from composable_ebm.train.objectives.classification import NoisyClassification
from composable_ebm.train.preparation import card_of, check_memory, load_split

Split = tuple[LabelledImages, LabelledImages]
"""Pictures to learn from, and held-out ones."""

__all__ = ["Material", "Split", "gather"]


@dataclass(frozen=True)
class Material:
    """What a training learns from.

    Attributes:
        pictures: As they were given.
        data: What is learned from: the pictures, their copies among them, or their latents.
        held_out: The same of held-out pictures, on the CPU.
        values: Those of the attribute.
        card: What becomes of it, before anything is learned.
        codec: Whose latents they are.
        base: The density that an expert of a classifier stands on.
    """

    pictures: Split
    data: LabelledImages
    held_out: LabelledImages
    values: tuple[str, ...]
    card: Card
    codec: PictureCodec | None = None
    base: Expert | None = None

    def expert(self, network: nn.Module) -> Expert:
        """The expert with these weights."""
        return Expert.standing(network, self.card, self.codec, self.base)

    def labelled(self, attribute: str) -> LabelledImages:
        """What is learned from, without pictures of middling values."""
        return self.data.where(attribute) if attribute else self.data

    def batch(self, config: TrainConfig, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """States and labels of one batch."""
        data, attribute = self.data, config.data.attribute
        index = torch.randint(len(data), (config.batch_size,), generator=generator, device=data.images.device)
        labels = data.labels[attribute][index] if attribute else torch.zeros_like(index)
        x = data.batch(index)
        if not isinstance(data, LabelledLatents) and config.data_range is not None:
            x = as_states(x, config.data_range, config.binary, generator)
        return x, labels


def gather(
    config: TrainConfig, accelerator: Accelerator, data: Split | None = None, told: bool = False
) -> Material:
    """Renders, downloads or reads what a configuration names.

    Args:
        config: What to train.
        accelerator: The processes; one of them does it first.
        data: Pictures in place of those that `config` names.
        told: Whether a training before it has said what is in the folder.
    """
    codec = load_codec(config.model_folder.parent / CODEC, "cpu") if config.latents else None
    if data is None:
        with accelerator.main_process_first():  # so that one process renders or downloads
            own = isinstance(config.objective, NoisyClassification)
            data = load_split(config.data, "train", own), load_split(config.data, "validation", own)
        if config.data.name == "folder":
            data = without_copies(*data), data[1]
    found = summary(*data, config.data.attribute, told) if config.data.name == "folder" else ""
    if found and accelerator.is_main_process:
        tqdm.write(found)
    pictures = data
    if config.data.mirror:
        data = mirrored(data[0]), data[1]
    if config.data.jitter:
        data = with_jitter(data[0], config.data.jitter), data[1]
    if codec is not None:
        cache = config.run_folder.parent
        with accelerator.main_process_first():
            data = encoded(data[0], codec, cache), encoded(data[1], codec, cache)
    learned = data[0].to(accelerator.device)
    values = learned.attribute(config.data.attribute) if config.data.attribute else ("image",)
    base = _base(config, accelerator.device)
    # Before the training: it refuses names that no recipe could hold, and what does not fit into memory.
    card = card_of(config, learned, values, codec, base, len(pictures[0]))
    check_memory(card, accelerator.device)
    return Material(pictures, learned, data[1], values, card, codec, base)


def _base(config: TrainConfig, device: torch.device) -> Expert | None:
    if not getattr(NETWORKS.get(type(config.network).__name__), "adds_to_base", False):
        return None
    folder = config.model_folder
    try:
        digest = str(read_card(folder.parent / BASE).weights.get("sha256"))
        return find_base(folder, digest, device)
    except CheckpointError as error:
        raise ValueError(
            f"an attribute is learned beside the base expert of its family, which is not there: {error} "
            f"Train {config.family}/base first."
        ) from error
